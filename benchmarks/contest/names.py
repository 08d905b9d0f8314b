"""The names of contenders that can be asked for; imports nothing, for help texts."""

OTHERS = (
    "torch eager",
    "torch graphs",
    "torch.compile",
    "plain-onnx",
    "onnxruntime graphs",
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")  # the same folder's engines in another one
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # the same folder's engines for another one
NAMES = (*OTHERS, *PRECISIONS, *BACKENDS)
