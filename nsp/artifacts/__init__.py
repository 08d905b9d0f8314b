"""Checkpoint folders and engine folders on disk."""
