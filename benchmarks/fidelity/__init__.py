"""Whether pictures show what their prompts name."""
