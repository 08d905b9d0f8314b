"""Latency, memory, start-up and parity of an engine folder, measured beside PyTorch."""
