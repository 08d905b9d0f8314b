"""Backends: code that runs stages."""
