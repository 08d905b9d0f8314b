"""The program around the public LlamaGen code, run by `nsp bench` in a process of its own.

The first job (`nsp.families.next_patch.peers.job`) is answered with what was built; every further
one asks for a batch and is answered with its times.
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
    gpt, vq = build(job)
    parameters = sum(p.numel() for p in gpt.parameters())
    yield {
        "what": f"FoundationVision/LlamaGen eager, {parameters / 1e6:.1f} M random weights, "
        f"class-conditional, stock decoder of {job['decoder']}"
    }
    for request in jobs:
        yield timed(gpt, vq, job, request)


def build(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the public transformer and tokenizer, with the weights their constructors draw."""
    from autoregressive.models.gpt import (  # type: ignore[import-not-found]  # of the clone
        ModelArgs,
        Transformer,
    )
    from tokenizer.tokenizer_image.vq_model import (  # type: ignore[import-not-found]
        VQ_models,
    )

    return Transformer(ModelArgs(**job["gpt"])).eval(), VQ_models[job["decoder"]](
        **job["vq"]
    ).eval()


def timed(
    gpt: Any, vq: Any, job: Mapping[str, Any], request: Mapping[str, Any]
) -> dict[str, float]:
    """Return the times of one batch in ms, to uint8 pixels as everybody's."""
    import torch
    from autoregressive.models.generate import generate  # type: ignore[import-not-found]

    batch, side = request["batch"], job["side"]
    torch.manual_seed(request["seed"])
    start = time.perf_counter()
    with torch.inference_mode():
        codes = generate(gpt, torch.arange(batch) % 1000, side**2, **job["sampling"])
        loop_ms = 1e3 * (time.perf_counter() - start)
        shape = [batch, job["vq"]["codebook_embed_dim"], side, side]
        image = vq.decode_code(codes, shape)
        image.mul(127.5).add(128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return {"wall_ms": 1e3 * (time.perf_counter() - start), "loop_ms": loop_ms}
