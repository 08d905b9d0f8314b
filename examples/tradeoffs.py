"""What int8 weights and weaker or shorter guidance cost and save, as a table.

    nsp export --fp32 && nsp export --int8
    python examples/tradeoffs.py engines "red apple" "grinning face"

For every setting: milliseconds per picture, and how much the pictures differ from those of fp32
engines with the model's own settings (PSNR in dB; higher is closer, inf is equal). For a careful
measurement use `nsp bench`; this script shows the calls.
"""

import math
import statistics
import sys
import time

import numpy as np

import nsp

ROUNDS = 3
if len(sys.argv) < 3:
    sys.exit(__doc__)
folder, *prompts = sys.argv[1:]
SETTINGS = [{}, {"guidance_until": 3}, {"guidance_scale": 1.0}]


def timed(pipe, settings):
    """Return the pictures, and the median milliseconds of one of them."""
    made = pipe.generate(prompts=prompts, seed=0, **settings)  # the first call loads and warms up
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        pipe.generate(prompts=prompts, seed=0, **settings)
        times.append(time.perf_counter() - start)
    return made.images.astype(float), 1e3 * statistics.median(times) / len(prompts)


def psnr_db(one, other):
    """Return the peak signal-to-noise ratio of two sets of 8-bit pictures."""
    mean_square = float(np.mean((one - other) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


first = None
for precision in ("fp32", "int8"):
    pipe = nsp.Pipeline.from_pretrained(folder, precision=precision)
    for settings in SETTINGS:
        pictures, ms = timed(pipe, settings)
        first = pictures if first is None else first
        words = ", ".join(f"{key}={value}" for key, value in settings.items()) or "own settings"
        print(f"{precision}  {words:20}  {ms:7.1f} ms  {psnr_db(pictures, first):5.1f} dB")
