"""The contract between model families and the rest of the package."""
