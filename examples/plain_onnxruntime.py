"""Make a picture with onnxruntime, tokenizers and NumPy from an engine folder; nsp is not needed.

nsp export --target onnxruntime && python examples/plain_onnxruntime.py engines "red apple" out.png
The pixels are those of `nsp generate --fp32 --prompt "red apple"`. Text models of the family `var`
with greedy settings can be used, such as the bundled one; docs/graphs.md describes every stage.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, prompt, output, f32, i64 = Path(sys.argv[1]), *sys.argv[2:], np.float32, np.int64
manifest = json.loads((folder / "manifest.json").read_text())
config, guidance = manifest["config"], manifest["sampling"]["guidance_scale"]
sides, net, width = config["patch_nums"], config["predictor"], config["vae"]["latent_channels"]
sessions = {}
for stage, built in manifest["stages"].items():
    files = next(engine["files"] for engine in built if engine["precision"] == "fp32")
    sessions[stage] = onnxruntime.InferenceSession(str(folder / next(iter(files))))
words = Tokenizer.from_file(str(folder / min(manifest["files"], key=len)))


def run(stage, **feeds):
    names = [output.name for output in sessions[stage].get_outputs()]
    return dict(zip(names, sessions[stage].run(names, feeds), strict=True))


def bicubic(a, b):  # the matrix that enlarges a cells to b: half-pixel centres, clamped border
    d = np.abs((np.arange(b)[:, None] + 0.5) * a / b - 0.5 - np.arange(-2, a + 2))
    near, far = (1.25 * d - 2.25) * d**2 + 1, ((d - 5) * d + 8) * -0.75 * d + 3
    clamped = np.eye(a)[np.clip(np.arange(-2, a + 2), 0, a - 1)]
    return (np.where(d <= 1, near, np.where(d < 2, far, 0)) @ clamped).astype(f32)


def area(a, b):  # the matrix of adaptive average pooling
    ends = [(i * a // b, -(-(i + 1) * a // b)) for i in range(b)]
    return np.array([[(s <= c < e) / (e - s) for c in range(a)] for s, e in ends], f32)


ids = words.encode(prompt).ids + [words.token_to_id("<|endoftext|>")] * 99
text = run("text_encoder", token_ids=np.array([ids[: config["condition"]["max_tokens"]]]))
given = run("condition", rows=np.array([0, 1]), **text)  # row 1 is the learned null condition
x, latent = given.pop("x"), np.zeros((1, width, sides[-1], sides[-1]), f32)
empty = np.zeros((2, net["num_heads"], 0, net["width"] // net["num_heads"]), f32)
past = {f"past_{kind}_{i}": empty for i in range(net["depth"]) for kind in "kv"}
one, first = np.ones(1, f32), np.zeros(1, i64)
shared = config["vae"]["share_quant_resi"]  # convolutions phi, each for the scales nearest to it
ticks = np.linspace(edge := 1 / (3 if shared == 4 else 2) / shared, 1 - edge, shared)
for scale, side in enumerate(sides):
    done, cells = sum(s**2 for s in sides[:scale]), side**2
    step = run("step", x=x, positions=np.arange(done, done + cells), **given, **past)
    past = {n.replace("new", "past"): array for n, array in step.items() if n != "logits"}
    ratio = scale / (len(sides) - 1)
    strength = np.array([1 + (guidance - 1) * ratio], f32)
    free = {"uniforms": np.zeros((1, cells), f32), "forced": np.full((1, cells), -1)}
    free |= {"top_k": np.ones(1, i64), "ranks": first, "temperature": one, "top_p": one}
    drawn = run("select", logits=step["logits"], guidance=strength, **free)
    codes = drawn["codes"].reshape(1, side, side, width)
    resize = dict.fromkeys(("up_rows", "up_cols"), bicubic(side, sides[-1]))
    following = area(sides[-1], sides[(scale + 1) % len(sides)])  # nothing follows the last scale
    resize |= {"down_rows": following, "down_cols": following, "rows": np.zeros(2, i64)}
    phi = np.abs(ticks - ratio).argmin()
    grown = run("accumulate", codes=codes, latent=latent, phi=np.array(phi), **resize)
    latent, x = grown["new_latent"], grown["x"]
image = run("decoder", latent=latent)["image"][0].transpose(1, 2, 0)
Image.fromarray((image * 255).round().astype(np.uint8)).save(output)
