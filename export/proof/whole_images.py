"""Compares whole images from exported stages with PyTorch; only fp32 must agree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend
from nsp.errors import ParityError
from nsp.export.plan import ExportPlan
from nsp.export.proof.gates import LIMITS, psnr_db
from nsp.export.proof.reference import Reference
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace
from nsp.stage.io import StageIO


def check_images(
    plan: ExportPlan,
    reference: Reference,
    files: Mapping[str, Path],
    stages_io: Mapping[str, StageIO],
    *,
    kv_layout: str,
    precision: str,
) -> dict[str, Any]:
    """Compare images from exported stages with PyTorch's: fraction of equal tokens, and PSNR.

    In half precision one early flip may change the image. In fp32 all tokens must agree, or images
    if a family draws no tokens; otherwise ParityError is raised. Images made with `more_smooth` are
    only reported, because rounding errors grow through their mixed codes.
    """
    backend = OnnxRuntimeBackend(
        files,
        stages_io,
        kv_layout=kv_layout,
        providers=[CPU],
        num_threads=plan.options.num_threads,
    )
    pipeline = Pipeline(
        plan.record.family,
        plan.config,
        backend,
        tokenizer=reference.pipeline.tokenizer,
        sampling=plan.sampling,
    )
    agreements, psnrs = [], []
    for batch in reference.batches:
        found = pipeline.trace(batch.orders)
        agreement = _agreement(batch.trace, found)
        psnrs.append(psnr_db(batch.trace.image, found.image))
        if agreement is None:
            _check_image(precision, psnrs[-1])
            continue
        smooth = any(getattr(order.sampling, "more_smooth", False) for order in batch.orders)
        if precision == "fp32" and agreement < 1 and not smooth:
            raise ParityError(
                f"onnxruntime fp32: {agreement:.2%} of the tokens of whole images agree with "
                "PyTorch; limit 100 %"
            )
        agreements.append((agreement, len(batch.orders)))
    figures: dict[str, Any] = {"images": reference.num_images}
    if agreements:
        total = sum(agreement * count for agreement, count in agreements)
        figures["token_agreement"] = round(total / sum(count for _, count in agreements), 6)
    return {**figures, "lowest_psnr_db": round(min(psnrs), 2)}


def _agreement(expected: Trace, found: Trace) -> float | None:
    """Return the fraction of sampled tokens that agree; None if no tokens are drawn."""
    if not found.tokens:
        return None
    before, now = (np.concatenate(each.tokens, 1) for each in (expected, found))
    return float(np.mean(before == now))


def _check_image(precision: str, psnr: float) -> None:
    """Raise ParityError for a whole fp32 image that differs too much."""
    limit = LIMITS["fp32"].psnr_db
    if precision == "fp32" and psnr < limit:
        raise ParityError(
            f"onnxruntime fp32: whole images reach {psnr:.1f} dB against PyTorch; limit {limit} dB"
        )
