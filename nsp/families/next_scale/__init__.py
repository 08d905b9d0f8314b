"""The family `next_scale`: latents that grow scale by scale, each a residual over the last one."""
