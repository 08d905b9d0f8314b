"""Captioned pictures: the embedded emoji set, tars, folders, and training's view of them."""
