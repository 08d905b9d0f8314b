"""The program around the public VAR code: a line of JSON per batch.

The first line read is the job (`peer_job`), answered with what was built; every
further line asks for a batch and is answered with its times. What that code prints goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any


def main() -> None:
    """Build the model, then time batches until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the public code prints
    job = json.loads(sys.stdin.readline())
    sys.path.insert(0, job["path"])
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    var, vae = build(job)
    parameters = sum(p.numel() for p in var.parameters())
    what = (
        f"FoundationVision/VAR eager, {parameters / 1e6:.1f} M random weights, class-conditional, "
        f"stock decoder of {job['vae']['ch']} channels"
    )
    print(json.dumps({"what": what}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(var, vae, job, json.loads(line))), file=answers, flush=True)


def build(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the public transformer and tokenizer, with the weights their constructors draw."""
    from models.var import VAR  # type: ignore[import-not-found]  # of the clone
    from models.vqvae import VQVAE  # type: ignore[import-not-found]

    vae_arguments, var_arguments = dict(job["vae"]), dict(job["var"])
    for arguments, key in ((vae_arguments, "v_patch_nums"), (var_arguments, "patch_nums")):
        arguments[key] = tuple(arguments[key])
    vae = VQVAE(**vae_arguments).eval()
    return VAR(vae_local=vae, **var_arguments).eval(), vae


def timed(var: Any, vae: Any, job: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the times of one batch in ms, to uint8 pixels as everybody's."""
    import torch

    decode, decoder_ms = vae.fhat_to_img, [0.0]

    def clocked(latent: Any) -> Any:
        start = time.perf_counter()
        image = decode(latent)
        decoder_ms[0] += 1e3 * (time.perf_counter() - start)
        return image

    batch = request["batch"]
    start = time.perf_counter()
    vae.fhat_to_img = clocked
    try:
        with torch.inference_mode():
            images = var.autoregressive_infer_cfg(
                batch,
                torch.arange(batch) % job["var"]["num_classes"],
                g_seed=request["seed"],
                cfg=job["cfg"],
                top_k=job["top_k"],
                top_p=job["top_p"],
            )
            images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    finally:
        del vae.fhat_to_img
    return {"wall_ms": 1e3 * (time.perf_counter() - start), "decoder_ms": decoder_ms[0]}


if __name__ == "__main__":
    main()
