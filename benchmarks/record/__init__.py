"""What a benchmark found, as records: read, written, doubted and compared."""
