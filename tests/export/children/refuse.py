"""Reports that it cannot do it."""

import sys

print('{"error": "no such operator"}', flush=True)
sys.exit(1)
