"""Difficult code shared by families: attention over an explicit cache, resampling matrices."""
