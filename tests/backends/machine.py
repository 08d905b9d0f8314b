"""A machine with the stand-ins for CUDA and TensorRT, and engines of one model on it."""

from pathlib import Path
from typing import Any

import pytest

from nsp.backends.tensorrt import trt_backend as backend_module
from nsp.backends.tensorrt import trt_engine as tensorrt_engine
from nsp.backends.tensorrt.trt_backend import load_tensorrt, load_tensorrt_rtx
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from tests.backends.nvidia import CudaStandIn, TensorRTStandIn, write_plan


class Machine:
    """A machine with the stand-ins, and plans of one model's stages."""

    def __init__(
        self,
        system: Any,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        name: str = "var",
        kv_layout: str = "delta",
    ) -> None:
        self.kv_layout = kv_layout
        self.family, self.folder, self.system = family(name), folder / "engines", system
        self.user_cache = folder / "cache"
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.user_cache))
        self.config = self.system.config
        self.stages_io = self.family.stages_io(self.config, kv_layout=kv_layout, dtype="float32")
        self.modules = self.family.learner.modules(self.system, kv_layout)
        self.cuda = CudaStandIn()
        self.trt = {
            name: TensorRTStandIn(name, self.cuda, self.modules, self.stages_io)
            for name in ("tensorrt", "tensorrt_rtx")
        }
        monkeypatch.setattr(backend_module, "import_cuda", lambda: self.cuda)
        monkeypatch.setattr(tensorrt_engine, "import_tensorrt", self.trt.get)
        self.write_plans(max_batch=3)

    def write_plans(
        self, *, max_batch: int, scratch: int = 1000, static_batch: bool = False
    ) -> None:
        declared = self.family.stages(self.config, kv_layout=self.kv_layout, dtype="float32")
        self.files = {}
        for number, (stage, each) in enumerate(declared.items()):
            spans = each.profiles(
                max_batch=max_batch, static_batch=static_batch, best_ranks=1, max_ranks=3839
            )
            profiles = [each.io.profile(sizes) for sizes in spans]
            path = self.folder / stage / "tensorrt-fp32" / "engine.plan"
            self.files[stage] = write_plan(path, stage, profiles, scratch=scratch + number)

    def load(self, flavour: str = "tensorrt") -> Pipeline:
        loader = {"tensorrt": load_tensorrt, "tensorrt_rtx": load_tensorrt_rtx}[flavour]
        backend = loader(self.files, self.stages_io, kv_layout=self.kv_layout, device="cuda")
        return Pipeline(self.family, self.config, backend, tokenizer=self.system.prompt_tokenizer)

    def reference(self) -> Pipeline:
        return torch_pipeline(self.family, self.system, device="cpu")

    def clear(self) -> None:
        self.cuda.calls.clear()
        for trt in self.trt.values():
            trt._calls.clear()

    def noted(self, kind: str, flavour: str = "tensorrt") -> list[tuple[Any, ...]]:
        return [call for call in self.trt[flavour]._calls if call[0] == kind]
