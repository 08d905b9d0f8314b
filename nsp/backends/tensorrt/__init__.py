"""Stages as TensorRT and TensorRT-RTX engines, with CUDA and its graphs."""
