"""Runtimes: each runs stages on named arrays."""
