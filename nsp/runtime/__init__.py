"""Running exported stages: I/O declarations, engine folders, KV arena, pipeline, backends."""
