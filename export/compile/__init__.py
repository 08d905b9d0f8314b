"""Graphs compiled to engines, in a process of their own."""
