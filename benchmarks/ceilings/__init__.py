"""What a machine can do at most, measured in the run that is compared with it."""
