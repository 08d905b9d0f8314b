"""The public VAR code as a peer: same shapes, random weights.

Source: github.com/FoundationVision/VAR, models/__init__.py. It is class-conditional: beside a
text-conditional model it has no text encoder and no cross-attention to compute, and its decoder is
always the stock one, so the scale loop is timed apart from the decoder.
"""

from typing import Any

from nsp.families.var.config import VarConfig
from nsp.families.var.sampling import VarSampling
from nsp.family.peer import Peer

_STOCK_GROUPS = 32  # of the stock decoder's norms


def job(config: VarConfig, sampling: VarSampling) -> dict[str, Any]:
    """Return what the program builds: the constructor arguments of the public classes."""
    predictor, vae = config.predictor, config.vae
    channels = vae.base_channels
    if channels % _STOCK_GROUPS:
        channels = _STOCK_GROUPS
    return {
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


PUBLIC_VAR = Peer(
    name="public VAR",
    address="https://github.com/FoundationVision/VAR",
    files=("models/var.py", "models/vqvae.py"),
    program="nsp.families.var.peer_program:answers",
    job=job,
)
