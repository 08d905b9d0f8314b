"""Next-scale image generators from training to deployment.

Engines in, pictures out:

    pipe = nsp.load_pipeline("engines/")
    images = pipe.generate(prompts=["red apple"], seed=0).images
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsp.pipeline.pipeline import Pipeline, load_pipeline

__all__ = ["Pipeline", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """Return what is used, imported then: the command line says what does not load here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nsp.pipeline import pipeline

    return getattr(pipeline, name)
