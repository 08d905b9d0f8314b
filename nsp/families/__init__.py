"""Model families: one folder each, one registry."""
