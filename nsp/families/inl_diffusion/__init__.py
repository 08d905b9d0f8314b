"""The family `inl_diffusion`: a denoising transformer with integrator neurons."""
