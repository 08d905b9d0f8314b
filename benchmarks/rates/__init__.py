"""How fast the trainer and the data loaders are."""
