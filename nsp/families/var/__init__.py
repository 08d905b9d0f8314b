"""Visual autoregressive next-scale prediction (VAR), class- or text-conditional."""
