"""Latency, memory, start-up and parity of an engine folder, compared with PyTorch."""
