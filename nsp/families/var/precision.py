"""Which weights of the family `var` an fp16 or bf16 export narrows, stage by stage.

Matrix products and convolutions become half precision, and with them keys, values and the attention
between. What sums many numbers or decides tokens stays float32: norms, q/k normalisation, the
residual stream, AdaLN results, logits, guidance and sampling, codebook, phi convolutions and f_hat,
embeddings and positions, the prompt's encoder and pooling. The modules follow the dtype of their
weights (model.py), so this list is the whole precision map.
"""

from nsp.families.var.config import VarConfig
from nsp.families.var.io import needs_nucleus_stages
from nsp.family.stage_weights import StageWeights

_BLOCK = "predictor.blocks.*"
_CODEBOOK = "vae.quantize.embedding.*"


def stage_weights(config: VarConfig) -> dict[str, StageWeights]:
    """Return the weights of every stage, as parameter names of the family's system."""
    stages = {
        "condition": _condition(config),
        "step": _step(config),
        "select": StageWeights(full=(_CODEBOOK,)),
        "select_smooth": StageWeights(full=(_CODEBOOK,)),
        "accumulate": StageWeights(full=("predictor.word_embed.*", "vae.quantize.quant_resi.*")),
        "decoder": _decoder(),
    }
    if needs_nucleus_stages(config, "delta"):
        stages |= {f"{name}_nucleus": stages[name] for name in ("select", "select_smooth")}
    if config.text is not None:
        stages["text_encoder"] = StageWeights(full=("text_encoder.*",))
    return stages


def _condition(config: VarConfig) -> StageWeights:
    half = ["predictor.head_nm.ada_lin.*"]
    full = ["predictor.pos_start"]
    if config.predictor.shared_aln:
        half.append("predictor.shared_ada_lin.*")
        full.append(f"{_BLOCK}.ada_gss")
    else:
        half.append(f"{_BLOCK}.ada_lin.*")
    if config.text is None:
        full.append("predictor.class_emb.*")
    else:
        half.append(f"{_BLOCK}.cross.kv.*")
        full += ["predictor.text_pool.*", "predictor.text_null_*"]
    return StageWeights(half=tuple(half), full=tuple(full))


def _step(config: VarConfig) -> StageWeights:
    half = [f"{_BLOCK}.attn.mat_qkv.*", f"{_BLOCK}.attn.proj.*", f"{_BLOCK}.ffn.*"]
    half.append("predictor.head.*")
    full = [f"{_BLOCK}.attn.[qv]_bias", f"{_BLOCK}.attn.scale_mul_1H11"]
    full += ["predictor.pos_1LC", "predictor.lvl_embed.*"]
    if config.text is not None:
        half += [f"{_BLOCK}.cross.q.*", f"{_BLOCK}.cross.proj.*"]
        full.append(f"{_BLOCK}.cross.scale_mul_1H11")
    # Nearly all of an image's products are in this stage; the others stay as they are in int8.
    return StageWeights(half=tuple(half), int8=tuple(half), full=tuple(full))


def _decoder() -> StageWeights:
    convolutions = ("conv*", "nin_shortcut.*", "qkv.*", "proj_out.*")
    half = tuple(f"vae.decoder.*{name}" for name in convolutions)
    return StageWeights(half=("vae.post_quant_conv.*", *half), full=("vae.decoder.*norm*",))
