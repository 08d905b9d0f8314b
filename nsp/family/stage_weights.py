"""What a family declares about the dtypes of its weights."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageWeights:
    """The weights one stage holds, as patterns of parameter names ("predictor.blocks.*.ffn.fc1.*").

    A stage without `half` weights is the same in fp32, fp16 and bf16.
    """

    half: tuple[str, ...] = ()  # take the precision of the export
    int8: tuple[str, ...] = ()  # of `half`: matrices that an int8 export quantizes
    full: tuple[str, ...] = ()  # stay float32
