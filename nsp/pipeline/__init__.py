"""The way from prompts or class ids to images."""
