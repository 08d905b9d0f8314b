"""What lies on disk: checkpoint and engine folders."""
