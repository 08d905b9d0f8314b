"""The trainer: devices and precision by accelerate, nothing that belongs to one family."""
