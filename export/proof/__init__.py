"""Exported stages held to PyTorch."""
