"""Stages as ONNX graphs."""
