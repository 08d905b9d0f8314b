"""Runtime backends: each runs stages on named arrays."""
