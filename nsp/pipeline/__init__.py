"""From prompts or class ids to images."""
