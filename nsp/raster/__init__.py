"""What families share that draw a grid of codes in raster order, one code at a time.

Without torch: vq_config, sampling, grid, stages, loop, examples. With it: vq, drawing, patches,
codes, predictor_phase, tokenizer_phase.
"""
