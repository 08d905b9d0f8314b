"""Make pictures from Python, and save what the model shows after every step.

    nsp export && python examples/previews.py engines previews "red apple" "grinning face"

The folder gets every step of both pictures, from the coarsest scale to the finished picture.
"""

import sys
from pathlib import Path

from PIL import Image

import nsp

if len(sys.argv) < 4:
    sys.exit(__doc__)
engines, folder, prompts = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
folder.mkdir(parents=True, exist_ok=True)
pipe = nsp.Pipeline.from_pretrained(engines)

for step in pipe.stream(prompts=prompts, seed=7):
    pictures = (step.decode() * 255).round().astype("uint8")  # (B, 3, H, W), values in 0 to 255
    for number, picture in enumerate(pictures):
        path = folder / f"{number}_step{step.scale}.png"
        Image.fromarray(picture.transpose(1, 2, 0)).save(path)
    print(f"step {step.scale + 1} of {step.num_scales}")

# The call is what users of diffusers know; seeds make every picture again, alone or in a batch.
output = pipe(prompts[0], num_images_per_prompt=3, seed=7, guidance_scale=2.0)
for image, seed in zip(output.images, output.seeds, strict=True):
    image.save(folder / f"seed{seed}.png")

# Orders are what everything becomes: one per picture, each with its own settings.
plain = nsp.Order(prompts[0], 7, pipe.sampling.changed({"guidance_scale": 1.0}))
strong = nsp.Order(prompts[0], 7, pipe.sampling.changed({"guidance_scale": 4.0}))
for batch in pipe.batches([plain, strong]):  # those that can share a batch
    *_, last = pipe.run(batch)
    print(f"pictures in this batch: {len(batch)}, steps: {last.total}")
