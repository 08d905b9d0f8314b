"""What a stage is and how it is run: tensors, cache, the contract of backends."""
