"""Which weights of the family `next_scale` an fp16 or bf16 export narrows, stage by stage.

Convolutions and matrix products become half precision, and with them features, keys, values and the
attention between. What sums or steers stays float32: norms, the latent from scale to scale, the
Euler steps and guidance, the prompt's encoder and projection. The modules follow the dtype of their
weights (model.py, vae.py), so this list is the whole precision map. The decoder's activations fit
float16 because its weights are divided beforehand (`vae.rescale_decoder`).
"""

from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.io import predictor_stage
from nsp.family.stage_weights import StageWeights

_DECODER = "vae.autoencoder.decoder"
_DECODER_HALF = (
    "*.conv1.*",
    "*.conv2.*",
    "*.conv_shortcut.*",
    "*.upsamplers.*.conv.*",
    "*.attentions.*.to_*",
    ".conv_in.*",
    ".conv_out.*",
)


def stage_weights(config: NextScaleConfig) -> dict[str, StageWeights]:
    """Return the weights of every stage, as parameter names of the family's system."""
    predictors = {
        predictor_stage(k): StageWeights(half=(f"generator.predictors.{k}.*",))
        for k in range(config.num_predictors)
    }
    return {
        "text_encoder": StageWeights(full=("text_encoder.*",)),
        "condition": StageWeights(full=("generator.condition.*",)),
        "base": StageWeights(half=("generator.base.*",)),
        **predictors,
        "refine": StageWeights(half=("generator.refine.*",)),
        "decoder": StageWeights(
            half=("vae.autoencoder.post_quant_conv.*", *(f"{_DECODER}{p}" for p in _DECODER_HALF)),
            full=(f"{_DECODER}.*norm*",),
        ),
    }
