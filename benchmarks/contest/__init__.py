"""Who is measured, and how: contenders in interleaved rounds, fresh processes, parity."""
