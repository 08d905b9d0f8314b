"""A setting has one name, and may have the spelling of a first implementation beside it."""

from nsp.console.settings import sampling_options


def test_guidance_has_the_spelling_of_the_public_raster_code() -> None:
    groups = sampling_options(["var", "next_patch"])
    (option,) = [o for group in groups.values() for o in group if o.name == "guidance_scale"]
    assert option.opts == ["--guidance-scale", "--cfg-scale"]
