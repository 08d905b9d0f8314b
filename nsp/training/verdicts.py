"""Is a phase's result good enough to build on? Measured on the run's own pictures, any family.

An image tokenizer (or autoencoder) must rebuild them clearly better than a plain colour does. A
generator is asked for captions or classes of the run, and a hit is a drawn picture whose nearest
one of the run is one of that caption or class.
"""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.config import Config
from nsp.data.dataset import ImageDataset
from nsp.data.preview import preview
from nsp.data.retrieval import PictureSet, Recall, psnr_db
from nsp.data.sheet import contact_sheet
from nsp.data.stream import ShardStream
from nsp.errors import TrainingError
from nsp.family.contract import AnyFamily, Learner
from nsp.files import write_file
from nsp.pipeline.pipeline import torch_pipeline

logger = logging.getLogger(__name__)

LEAST_GAIN_DB = 3.0  # of a tokenizer over a plain colour: half of the squared error is gone
VERDICT_NAME = "verdict.json"
SHEET_NAME = "reconstructions.png"
_PLAIN_DB = 40.0  # of pictures that a plain colour already shows to the eye
_MOST_ASKED, _LEAST_ASKED, _MOST_PIXELS = 64, 8, 64 * 256**2
_MOST_COMPARED = 2000  # pictures of the run among which the nearest one is searched,
_LEAST_COMPARED, _MOST_BYTES = 200, 2**29  # and fewer large ones
_SHOWN = 16  # pictures on the sheet
_BATCH = 16
_DOUBT = 0.025  # that hits are by chance


@dataclass(frozen=True, kw_only=True)
class Verdict(Config):
    """What was measured of a model, and whether a run should go on with it."""

    says: str  # in words, following the name of what was measured
    is_enough: bool = True
    advice: str = ""  # what to do if it is not
    numbers: dict[str, float]


def can_rebuild(owner: AnyFamily) -> bool:
    """Return whether models of the family have an image tokenizer or autoencoder."""
    return type(owner.learner).reconstruct is not Learner.reconstruct


def num_asked(size_px: int) -> int:
    """Return of how many pictures, captions or classes a verdict is made: fewer large ones."""
    return max(_LEAST_ASKED, min(_MOST_ASKED, _MOST_PIXELS // size_px**2))


@torch.no_grad()
def judge_tokenizer(
    owner: AnyFamily,
    system: Any,
    data: ImageDataset | ShardStream,
    *,
    seed: int,
    advice: str = "train it longer (--steps), or on more pictures",
    sheet: Path | None = None,
) -> Verdict:
    """Return how well the image tokenizer rebuilds pictures, beside each one's mean colour.

    `advice` is for one that is not good enough; `sheet` is the file that gets some of the pictures
    beside their reconstructions.
    """
    items = preview(data, num_asked(system.config.image_size_px), seed=seed)
    pictures = np.stack([_picture(item) for item in items])
    rebuilt = owner.learner.reconstruct(system, pictures)
    if sheet is not None:
        _write_sheet(sheet, pictures[:_SHOWN], rebuilt[:_SHOWN])
    plain = np.broadcast_to(pictures.mean((1, 2), keepdims=True).round(), pictures.shape)
    psnr, plain_psnr = (
        statistics.median(map(psnr_db, pictures, each))
        for each in (rebuilt, plain.astype(np.uint8))
    )
    gain = psnr - plain_psnr
    if plain_psnr > _PLAIN_DB:
        advice = "these pictures are hardly more than plain colours; give others"
    return Verdict(
        says=f"rebuilds the pictures at {psnr:.1f} dB, a plain colour at {plain_psnr:.1f} dB "
        f"(medians of {len(pictures)}): {abs(gain):.1f} dB {'better' if gain >= 0 else 'worse'}",
        is_enough=gain >= LEAST_GAIN_DB,
        advice=advice,
        numbers={"psnr_db": psnr, "plain_psnr_db": plain_psnr},
    )


def judge_generator(
    owner: AnyFamily,
    system: Any,
    data: ImageDataset | ShardStream,
    *,
    seed: int,
    sampling: Mapping[str, object],
) -> Verdict | None:
    """Return how often a drawn picture is nearest to one of its own caption or class.

    None for a model without condition, and for pictures without any.
    """
    kind = owner.condition(system.config)
    fitting = _MOST_BYTES // (3 * system.config.image_size_px**2)
    count = max(_LEAST_COMPARED, min(_MOST_COMPARED, fitting))
    items = preview(data, count, seed=seed)
    names: dict[str | int, list[str]] = {}
    for number, item in enumerate(items):
        condition = item["caption"] if kind == "prompt" else item["class_id"]
        if condition not in ("", -1):
            names.setdefault(condition, []).append(str(number))
    pictures = PictureSet.of_pictures((str(n), _picture(item)) for n, item in enumerate(items))
    if kind == "none" or not names:
        return None
    if len(pictures.pixels) < 2:
        return Verdict(says="cannot be judged by pictures that all look the same", numbers={})
    asked = list(names)[: num_asked(system.config.image_size_px)]
    drawn = _drawn(owner, system, kind, asked, seed=seed, sampling=sampling)
    recall = Recall.at(pictures.ranks_of_any(drawn, [names[each] for each in asked]), 1)
    own = [len({pictures.number_of[name] for name in names[each]}) for each in asked]
    chance = statistics.mean(own) / len(pictures.pixels)
    says = (
        f"draws {len(asked)} {'captions' if kind == 'prompt' else 'classes'} of the pictures: for "
        f"{recall} the nearest of {len(pictures.pixels)} pictures is its own, "
        f"{recall.share / chance:.1f} times chance"
    )
    is_better = by_chance(round(recall.share * recall.count), recall.count, chance) < _DOUBT
    return Verdict(
        says=says if is_better else f"{says}; chance may do as well: train longer (--steps)",
        numbers={"recall_at_1": recall.share, "chance": chance},
    )


def by_chance(hits: int, count: int, chance: float) -> float:
    """Return the probability of at least `hits` among `count` at a probability of `chance` each.

    Below 2.5 % the lower end of the exact 95 % interval (Clopper & Pearson 1934) is above chance.
    Wilson's interval, which `Recall` shows, is too narrow for this where one hit is already more
    than chance gives.
    """
    fewer = (math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits))
    return 1 - math.fsum(fewer)


def _drawn(
    owner: AnyFamily,
    system: Any,
    kind: str,
    asked: Sequence[str | int],
    *,
    seed: int,
    sampling: Mapping[str, object],
) -> list[NDArray[np.uint8]]:
    """Return a picture (H, W, 3) for every caption or class."""
    device = str(next(system.parameters()).device)
    pipeline = torch_pipeline(owner, system.eval(), device=device, sampling=sampling)
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        if kind == "prompt":
            made = pipeline.generate(prompts=[str(each) for each in part], seed=seed)
        else:
            made = pipeline.generate(class_ids=[int(each) for each in part], seed=seed)
        images += list(made.images)
    return images


def settle(verdict: Verdict, name: str, *, anyway: bool, file: Path | None = None) -> None:
    """Log a verdict and keep it in `file`; raise TrainingError where it ends the run."""
    if file is not None:
        with write_file(file) as partial:
            partial.write_text(json.dumps(verdict.to_dict(), indent=1) + "\n")
    if verdict.is_enough:
        logger.info("%s %s", name, verdict.says)
        return
    needed = f"{LEAST_GAIN_DB:g} dB better is the least that shows what is in them"
    if not anyway:
        raise TrainingError(
            f"{name} {verdict.says}, but {needed}; {verdict.advice}, or go on with --anyway"
        )
    logger.warning("%s %s, but %s; %s", name, verdict.says, needed, verdict.advice)


def _picture(item: Any) -> NDArray[np.uint8]:
    """Return an item's picture as (H, W, 3)."""
    picture: NDArray[np.uint8] = item["image"].movedim(0, -1).numpy()
    return picture


def _write_sheet(file: Path, pictures: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> None:
    """Write pictures beside their reconstructions."""
    pairs = np.stack([pictures, rebuilt], 1).reshape(-1, *pictures.shape[1:])
    titles = [title for _ in pictures for title in ("picture", "reconstruction")]
    with write_file(file) as partial:
        contact_sheet(pairs, titles, columns=8, lines=1).save(partial, "PNG")
