"""The public LlamaGen code as a peer: same shapes, random weights.

Source: github.com/FoundationVision/LlamaGen, autoregressive/models. It is class-conditional: beside
a model of captions it has no text encoder and no prefix, and its decoder is always the stock one of
the same number of levels, so the loop is timed apart from the decoder.
"""

from typing import Any

from nsp.families.next_patch.config import NextPatchConfig
from nsp.family.peer import Peer
from nsp.raster.sampling import RasterSampling


def job(config: NextPatchConfig, sampling: RasterSampling) -> dict[str, Any]:
    """Return what the program builds: the constructor arguments of the public classes."""
    gpt, vq = config.gpt, config.vq
    return {
        "gpt": {
            "dim": gpt.width,
            "n_layer": gpt.depth,
            "n_head": gpt.num_heads,  # with fewer heads of keys its cache does not work
            "multiple_of": gpt.multiple_of,
            "ffn_dim_multiplier": gpt.ffn_dim_multiplier,
            "rope_base": gpt.rope_base,
            "norm_eps": gpt.norm_eps,
            "vocab_size": vq.codebook_size,
            "block_size": config.grid_side**2,
        },
        "vq": {
            "codebook_size": vq.codebook_size,
            "codebook_embed_dim": vq.codebook_width,
            "codebook_l2_norm": vq.is_normalised,
        },
        "decoder": "VQ-8" if len(vq.channel_multipliers) <= 4 else "VQ-16",
        "side": config.grid_side,
        "sampling": {
            "cfg_scale": sampling.guidance_scale,
            "cfg_interval": sampling.cfg_interval,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        },
    }


PUBLIC_LLAMAGEN = Peer(
    name="public LlamaGen",
    address="https://github.com/FoundationVision/LlamaGen",
    files=("autoregressive/models/gpt.py", "tokenizer/tokenizer_image/vq_model.py"),
    program="nsp.families.next_patch.peer_program:answers",
    job=job,
)
