"""Next-scale image generators from training to deployment."""
