"""The program around the public VAR code, run by `nsp bench` in a process of its own.

The first job (`nsp.families.var.peers.job`) is answered with what was built; every further one asks
for a batch and is answered with its times.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any


def answers(jobs: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Build the model, then time batches until there are no more jobs."""
    job = next(jobs)
    sys.path.insert(0, job["path"])
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    var, vae = build(job)
    parameters = sum(p.numel() for p in var.parameters())
    yield {
        "what": f"FoundationVision/VAR eager, {parameters / 1e6:.1f} M random weights, "
        f"class-conditional, stock decoder of {job['vae']['ch']} channels"
    }
    for request in jobs:
        yield timed(var, vae, job, request)


def build(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the public transformer and tokenizer, with the weights their constructors draw."""
    from models.var import VAR  # type: ignore[import-not-found]  # of the clone
    from models.vqvae import VQVAE  # type: ignore[import-not-found]

    vae_arguments, var_arguments = dict(job["vae"]), dict(job["var"])
    for arguments, key in ((vae_arguments, "v_patch_nums"), (var_arguments, "patch_nums")):
        arguments[key] = tuple(arguments[key])
    vae = VQVAE(**vae_arguments).eval()
    return VAR(vae_local=vae, **var_arguments).eval(), vae


def timed(
    var: Any, vae: Any, job: Mapping[str, Any], request: Mapping[str, Any]
) -> dict[str, float]:
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
    wall_ms = 1e3 * (time.perf_counter() - start)
    return {"wall_ms": wall_ms, "loop_ms": wall_ms - decoder_ms[0]}
