"""The public VAR code as a contestant: same shapes, random weights, its own process, same rounds.

Source: github.com/FoundationVision/VAR, models/__init__.py. It is class-conditional: beside a
text-conditional model it has no text encoder and no cross-attention to compute, and its decoder is
always the stock one, so the scale loop is timed apart from the decoder.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsp.benchmarks.contest.processes import environment
from nsp.benchmarks.contest.rounds import Observation
from nsp.errors import BackendError, ConfigError

PEER = "public VAR"
_STOCK_GROUPS = 32  # of the stock decoder's norms


def check_clone(path: Path) -> None:
    """Raise ConfigError when `path` is not a clone of the public code."""
    missing = [n for n in ("models/var.py", "models/vqvae.py") if not (path / n).is_file()]
    if missing:
        raise ConfigError(
            f"--peer-var {path} has no {missing[0]}; "
            "clone https://github.com/FoundationVision/VAR and give that folder"
        )


def peer_job(path: Path, config: Any, sampling: Any, *, threads: int) -> dict[str, Any]:
    """Return what the child builds: the constructor arguments of the public classes."""
    predictor, vae = config.predictor, config.vae
    channels = vae.base_channels
    if channels % _STOCK_GROUPS:
        channels = _STOCK_GROUPS
    return {
        "path": str(path),
        "threads": threads,
        "vae": {
            "vocab_size": vae.vocab_size,
            "z_channels": vae.latent_channels,
            "ch": channels,
            "test_mode": True,
            "share_quant_resi": vae.share_quant_resi,
            "v_patch_nums": list(config.patch_nums),
        },
        "var": {
            "num_classes": 1000,
            "depth": predictor.depth,
            "embed_dim": predictor.width,
            "num_heads": predictor.num_heads,
            "mlp_ratio": predictor.mlp_ratio,
            "shared_aln": predictor.shared_aln,
            "attn_l2_norm": predictor.attn_l2_norm,
            "patch_nums": list(config.patch_nums),
        },
        # Ours is 1 + theirs; theirs 0 still computes both halves of the batch.
        "cfg": sampling.guidance_scale - 1,
        "top_k": sampling.top_k,
        "top_p": 0.0 if sampling.top_p == 1 else sampling.top_p,
    }


class PeerProcess:
    """A running child: one line of JSON in, one out."""

    def __init__(self, process: "subprocess.Popen[str]", job: Mapping[str, Any]) -> None:
        self.name, self._process = PEER, process
        self.what = self._ask(job)["what"]

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the times of one batch of as many images as `request` asks for."""
        conditions = request.get("prompts") or request["class_ids"]
        found = self._ask({"batch": len(conditions), "seed": request["seed"]})
        return Observation(
            contestant=self.name,
            round=number,
            place=place,
            wall_ms=round(found["wall_ms"], 4),
            stage_ms={"decoder": (round(found["decoder_ms"], 4),)},
        )

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer; raise BackendError with the child's last words when it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        assert self._process.stderr is not None
        said = self._process.stderr.read().strip().splitlines() or ["nothing"]
        raise BackendError(f"the public VAR code failed in its own process: {said[-1]}")


@contextmanager
def peer_process(path: Path, config: Any, sampling: Any, *, threads: int) -> Iterator[PeerProcess]:
    """Yield the peer, ready to be timed; its process ends with the block.

    Raises ConfigError for another folder, BackendError when its code does not run here.
    """
    check_clone(path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "nsp.benchmarks.peers.program"],
        env=environment(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield PeerProcess(process, peer_job(path.resolve(), config, sampling, threads=threads))
    finally:
        process.kill()
        process.communicate()
