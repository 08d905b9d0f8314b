"""Ends without a word."""

import sys

sys.exit(7)
