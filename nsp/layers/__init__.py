"""What families share and is hard: attention over an explicit cache, resampling matrices."""
