"""No configuration of a model that cannot be built."""

from typing import Any

import pytest

from nsp.errors import ConfigError
from nsp.families.var.config import SIZES, VarConfig

NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("vae", "vocab_size", v) for v in (0, -1, 10**30)),
        *(("vae", "channel_multipliers", v) for v in ([], [0], [1, -2])),
        *(("vae", "quant_conv_kernel", v) for v in (0, -3, 2)),
        *(("vae", "dropout", v) for v in (-0.1, 1.0, NAN)),
        *(("vae", "quant_resi", v) for v in (-0.5, 2.0, NAN)),
        *(("vae", "commitment_weight", v) for v in (-1.0, NAN)),
        *(("vae", name, -1) for name in ("share_quant_resi", "default_qresi_counts")),
        *(("predictor", "mlp_ratio", v) for v in (-1.0, 0.0, 1e-6, NAN, float("inf"))),
        *(("predictor", "norm_eps", v) for v in (-1e-6, 0.0, 1.0, NAN)),
        *(("predictor", "drop_path_rate", v) for v in (-0.1, 1.0, NAN)),
        *(("predictor", "cond_drop_rate", v) for v in (-0.1, 1.0, NAN)),
        *(("predictor", "dropout", v) for v in (-0.1, 1.0, NAN)),
        *(("condition", name, v) for name in ("text_width", "max_tokens") for v in (0, -4)),
    ],
)
def test_a_value_no_model_can_have_is_named(part: str, name: str, value: Any) -> None:
    values = SIZES["tiny"].to_dict()
    values[part][name] = value
    with pytest.raises(ConfigError, match=name):
        VarConfig.from_dict(values)


@pytest.mark.parametrize("sides", [[], [0, 1], [2, 1], [1, 1], [1, 10**30]])
def test_a_schedule_no_model_can_have_is_named(sides: list[int]) -> None:
    with pytest.raises(ConfigError, match="patch_nums"):
        VarConfig.from_dict({**SIZES["tiny"].to_dict(), "patch_nums": sides})


def test_a_model_has_at_least_one_class() -> None:
    values = {**SIZES["tiny"].to_dict(), "condition": {"kind": "class", "num_classes": 0}}
    with pytest.raises(ConfigError, match="num_classes must be an integer of at least 1"):
        VarConfig.from_dict(values)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_survives_a_file(name: str) -> None:
    assert VarConfig.from_dict(SIZES[name].to_dict()) == SIZES[name]
