"""Print pip's option for an extra package index; if it cannot be reached, say so and print nothing.

pip itself would try several times, for a minute, and end with a page of warnings.
"""

import sys
import urllib.error
import urllib.request

index = sys.argv[1]
try:
    with urllib.request.urlopen(f"{index}/torch/", timeout=5):
        print(f"--extra-index-url {index}")
except (OSError, ValueError) as error:
    print(f"{index} cannot be reached ({error}): torch comes from the usual index", file=sys.stderr)
