"""What families that denoise step by step share: noise levels, and samplers as tables."""
