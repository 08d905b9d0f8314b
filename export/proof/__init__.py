"""Compares exported stages with PyTorch."""
