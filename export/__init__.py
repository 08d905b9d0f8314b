"""Export: a checkpoint's stages -> ONNX -> engines, each proven against PyTorch first."""
