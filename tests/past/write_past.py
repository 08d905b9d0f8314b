"""Writes the frozen files of this folder, by old code: see README.md. No test runs it.

PYTHONPATH=WORKTREE_OF_THE_OLD_COMMIT python write_past.py NEW_FOLDER
"""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

OLD = Path(os.environ["PYTHONPATH"])
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
ORDERS = (
    {"prompt": "red square", "seed": 3, "guidance_scale": 1.5, "top_k": 0},
    {"prompt": "blue square", "seed": 8},
)


def write_pictures(folder: Path) -> None:
    """Write a square of each colour with its caption beside it."""
    folder.mkdir()
    for name, colour in COLOURS.items():
        pixels = np.full((8, 8, 3), 255, np.uint8)
        pixels[2:6, 2:6] = colour
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} square")


def write_config(file: Path) -> None:
    """Write the preset smoke with the smallest model that has all parts: 12,000 weights."""
    from nsp.families.var.config import PredictorConfig, TextCondition, VaeConfig, VarConfig
    from nsp.family.recipes import preset

    vae = VaeConfig(
        vocab_size=16,
        latent_channels=4,
        base_channels=2,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        norm_groups=1,
        share_quant_resi=1,
    )
    model = VarConfig(
        patch_nums=(1, 2),
        vae=vae,
        predictor=PredictorConfig(depth=1, width=8, num_heads=1),
        condition=TextCondition(text_width=4, max_tokens=16),
    )
    run = preset("smoke")
    phases = tuple(
        dataclasses.replace(
            phase,
            batch_size=len(COLOURS),
            keep_last=1,
            sample_every=4,
            optimizer=dataclasses.replace(phase.optimizer, lr=2e-2),
        )
        for phase in run.phases
    )
    run = dataclasses.replace(
        run,
        model=model.to_dict(),
        text_encoder={"vocab_size": 516, "depth": 1, "num_heads": 1},
        phases=phases,
        data=dataclasses.replace(run.data, source="pictures"),
    )
    file.write_text(json.dumps(run.to_dict(), indent=1) + "\n")


def command(program: str, *arguments: str) -> None:
    """Run a program of the old code in this process."""
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(str(OLD / program), run_name="__main__")
    except SystemExit as end:
        print(*sys.argv, "ended with", end.code, file=sys.stderr)


def stop_in_second_step_of_predictor() -> None:
    """Send this process SIGTERM there, once."""
    from nsp.training.trainer import Phase

    train_step = Phase._train_step

    def stopping(self, loader):
        if self.config.name == "predictor" and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, loader)

    Phase._train_step = stopping


def write_drawn(checkpoint: Path, file: Path) -> None:
    """Write the tokens of each scale step, and the pixels, of each of ORDERS on PyTorch."""
    from nsp.runtime.pipeline import load_pipeline

    pipe = load_pipeline(checkpoint, backend="torch")
    drawn = []
    for order in ORDERS:
        settings = {name: value for name, value in order.items() if name != "prompt"}
        made = pipe.generate(prompts=[order["prompt"]], trace=True, **settings)
        tokens = [step[0].tolist() for step in made.trace.tokens]
        drawn.append({"order": order, "tokens": tokens, "pixels": made.images[0].tolist()})
    file.write_text(json.dumps(drawn) + "\n")


def main() -> None:
    """Write all in a new folder."""
    os.mkdir(sys.argv[1])
    os.chdir(sys.argv[1])
    write_pictures(Path("pictures"))
    write_config(Path("config.json"))
    stop_in_second_step_of_predictor()
    command("train.py", "--config", "config.json", "--output-dir", "run")
    shutil.copytree("run", "stopped")
    command("train.py", "--resume", "--output-dir", "run")
    write_drawn(Path("run/checkpoint"), Path("drawn.json"))
    engines = ("--engine-dir", "engines", "--target", "onnxruntime")
    command("cli.py", "export", "--checkpoint", "run/checkpoint", *engines)


if __name__ == "__main__":
    main()
