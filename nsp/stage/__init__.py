"""Stages and how they run: their tensors, the KV cache, and the contract of backends."""
