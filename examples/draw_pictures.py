"""Draw pictures with captions, as a folder to train on: python examples/draw_pictures.py pictures

Every picture is NAME.png, and its caption NAME.txt beside it: "red star on a blue square".
"""

import argparse
import itertools
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": "#d33636", "brown": "#9a5b2b", "yellow": "#f6d743", "green": "#3f9b4b",
    "blue": "#2f6fd0", "purple": "#8349b8", "pink": "#f19ac0", "black": "#222222",
}  # fmt: skip
SHAPES = {"circle": 0, "triangle": 3, "square": 4, "pentagon": 5, "star": -5, "flower": -8}
BOARDS = {"square": 4, "circle": 0}
SIDE = 256  # pixels


def corners(points: int, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around the middle; a negative number is that of a star."""
    turn = math.pi / 4 if points == 4 else 0.0
    count = abs(points) * (2 if points < 0 else 1) or 60
    sizes = [radius * (0.5 if points < 0 and k % 2 else 1) for k in range(count)]
    angles = [2 * math.pi * k / count - math.pi / 2 + turn for k in range(count)]
    return [
        (SIDE / 2 + size * math.cos(angle), SIDE / 2 + size * math.sin(angle))
        for size, angle in zip(sizes, angles, strict=True)
    ]


def main() -> None:
    """Draw that many different pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    every = itertools.product(COLOURS, SHAPES, COLOURS, BOARDS)
    kinds = [kind for kind in every if kind[0] != kind[2]]
    random.Random(chosen.seed).shuffle(kinds)
    for number, (colour, shape, ground, board) in enumerate(kinds[: chosen.count]):
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        draw.polygon(
            corners(BOARDS[board], 0.62 * SIDE if board == "square" else 0.46 * SIDE),
            COLOURS[ground],
        )
        draw.polygon(corners(SHAPES[shape], 0.3 * SIDE), COLOURS[colour])
        image.save(chosen.folder / f"{number:03}.png")
        caption = f"{colour} {shape} on a {ground} {board}\n"
        (chosen.folder / f"{number:03}.txt").write_text(caption)


if __name__ == "__main__":
    main()
