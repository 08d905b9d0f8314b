"""Next-scale image generators from training to deployment.

Engines in, pictures out:

    pipe = nsp.load_pipeline("engines/")
    images = pipe.generate(prompts=["red apple"], seed=0).images
"""

from nsp.runtime.pipeline import Pipeline, load_pipeline

__all__ = ["Pipeline", "load_pipeline"]
