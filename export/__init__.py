"""Export: a checkpoint's stages -> ONNX -> engines, each compared with PyTorch first."""
