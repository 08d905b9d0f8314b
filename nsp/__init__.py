"""Next-scale image generators from training to deployment.

Engines in, pictures out:

    pipe = nsp.load_pipeline("engines/")
    images = pipe.generate(prompts=["red apple"], seed=0).images
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsp.errors import NspError
    from nsp.pipeline.pipeline import Pipeline, load_pipeline

    __version__: str

__all__ = ["NspError", "Pipeline", "__version__", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """Import and return a public name on its first use, so that `import nsp` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from nsp.distribution import version

        return version() or "unknown"
    if name == "NspError":
        from nsp import errors

        return errors.NspError
    from nsp.pipeline import pipeline

    return getattr(pipeline, name)


def __dir__() -> list[str]:
    """Return all names, also those that are imported on their first use."""
    return sorted({*globals(), *__all__})
