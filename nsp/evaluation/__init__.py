"""Figures of merit for sets of pictures: FID, sFID, inception score, precision, recall, CLIP score.

Arithmetic (`metrics.py`) knows nothing about pictures, features (`features.py`) nothing about the
figures, and `evaluate.py` puts them together. The definition is that of the ADM evaluator:
github.com/openai/guided-diffusion, evaluations/evaluator.py.

The CLIP score (`clip_score.py`) needs captions (`captioned_pictures.py`) and a CLIP (`clip.py`).
"""
