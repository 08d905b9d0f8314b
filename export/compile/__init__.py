"""Compiles graphs to engines, in separate processes."""
