"""Next-scale image generators from training to deployment.

Engines in, pictures out:

    pipe = nsp.Pipeline.from_pretrained("engines/")
    pipe("red apple", seed=0).images[0].save("apple.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsp.errors import NspError
    from nsp.family.order import Order
    from nsp.pipeline.pipeline import Pipeline, load_pipeline

    __version__: str

__all__ = ["NspError", "Order", "Pipeline", "__version__", "load_pipeline"]


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
    if name == "Order":
        from nsp.family import order

        return order.Order
    from nsp.pipeline import pipeline

    return getattr(pipeline, name)


def __dir__() -> list[str]:
    """Return all names, also those that are imported on their first use."""
    return sorted({*globals(), *__all__})
