"""What deployment promises: engines run without the packages that made them."""

import subprocess
import sys
from pathlib import Path

import pytest

import nsp
from nsp.distribution import version
from nsp.text.tokenizer import PromptTokenizer
from tests.artifacts.engine_folders import TEXT, write_engines
from tests.text.prompt_tokenizers import T5_TOKENS, save, t5_like

FORBIDDEN = ("torch", "transformers", "diffusers", "onnx", "accelerate", "PIL", "click", "rich")


def imported(code: str, *arguments: str) -> set[str]:
    """Return the top-level modules a fresh process holds after running `code`."""
    code = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_nsp_imports_no_framework_and_no_engine_runtime() -> None:
    found = imported("import nsp; nsp.load_pipeline")
    assert found.isdisjoint((*FORBIDDEN, "onnxruntime", "tensorrt", "tensorrt_rtx"))
    assert "numpy" in found
    # What cannot be loaded here is said by the command line, which must be there for it.
    assert "numpy" not in imported("import nsp, nsp.console.command_line")


def test_sets_of_pictures_need_no_framework() -> None:
    found = imported("import nsp.pipeline.sample_set, nsp.pipeline.bicubic")
    assert found.isdisjoint(FORBIDDEN)


def test_the_version_and_the_errors_are_at_the_front_door() -> None:
    code = "import nsp\nassert issubclass(nsp.NspError, Exception) and nsp.__version__[0].isdigit()"
    found = imported(code)
    assert found.isdisjoint((*FORBIDDEN, "numpy", "onnxruntime"))
    assert nsp.__version__ == version()
    assert {"NspError", "__version__", "load_pipeline"} <= set(dir(nsp))
    misspelt = "load_piepline"
    with pytest.raises(AttributeError, match=f"no attribute '{misspelt}'"):
        getattr(nsp, misspelt)


def test_loading_engines_imports_numpy_tokenizers_and_one_runtime(tmp_path: Path) -> None:
    write_engines(tmp_path, TEXT)
    code = "import nsp\npipe = nsp.load_pipeline(sys.argv[1])\npipe.backend.wait()"
    found = imported(code, str(tmp_path))
    assert found.isdisjoint((*FORBIDDEN, "tensorrt", "tensorrt_rtx"))
    assert {"onnxruntime", "tokenizers"} <= found


def test_engines_read_prompts_with_any_tokenizer_and_import_no_more(tmp_path: Path) -> None:
    assert TEXT.text is not None
    save(t5_like(), tmp_path / "t5", T5_TOKENS, max_tokens=TEXT.text.max_tokens)
    tokenizer = PromptTokenizer.load(tmp_path / "t5")
    write_engines(tmp_path / "engines", TEXT, tokenizer=tokenizer)
    expected = tokenizer.tokenize(["red apple"])
    code = (
        "import nsp\npipe = nsp.load_pipeline(sys.argv[1])\npipe.backend.wait()\n"
        "found = pipe.tokenizer.tokenize(['red apple'])\n"
        f"assert found.token_ids.tolist() == {expected.token_ids.tolist()}\n"
        f"assert found.mask.tolist() == {expected.mask.tolist()}"
    )
    found = imported(code, str(tmp_path / "engines"))
    assert found.isdisjoint((*FORBIDDEN, "tensorrt", "tensorrt_rtx"))


def test_a_path_without_a_model_is_refused_without_torch() -> None:
    code = "from nsp import load_pipeline\nfrom nsp.errors import NspError\n"
    code += "try: load_pipeline('nowhere')\nexcept NspError: pass"
    assert "torch" not in imported(code)
