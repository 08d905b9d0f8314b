import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nsp.cli import main
from nsp.data.image_files import read_metadata
from nsp.pipeline.pipeline import load_pipeline
from tests.goldens.var_tiny.fixtures import GOLDEN_DIR

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "tensorrt")


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def nsp_process(*args: object, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A suite started in the background passes on that it ignores Ctrl-C.
    heeds_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, preexec_fn=heeds_ctrl_c, **{**pipes, **options})


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    def run(*args: object) -> Result:
        options = ("--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "out")
        return nsp("generate", *options, *args)

    return run


def test_help_of_everything_works_without_optional_packages():
    script = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
from click.testing import CliRunner
from nsp.cli import main
for args in ([], ["--help"], ["--version"], *([verb, "--help"] for verb in main.commands)):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and result.stdout.strip(), (args, result.output)
print(*main.commands)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"generate", "convert", "inspect", "doctor"} <= set(done.stdout.split())


def test_generate_leaves_named_pngs_and_a_sheet_and_prints_their_paths(generate, tmp_path):
    prompts = ("--prompt", "Red apple!", "--prompt", "green apple")
    result = generate(*prompts, "--num-images", 2, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    names = [f"{i}.png" for i in ("000_red-apple_seed0", "001_red-apple_seed1")]
    names += [f"{i}.png" for i in ("002_green-apple_seed0", "003_green-apple_seed1")]
    assert sorted(p.name for p in out.iterdir()) == [*names, "contact_sheet.png"]
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [str(out / name) for name in names]
    assert all(line.endswith(" ms (first batch, includes loading)") for line in lines[:2])
    assert all(line.endswith(" ms") for line in lines[2:4])
    assert lines[4:] == [f"contact sheet: {out / 'contact_sheet.png'}"]


def test_generate_is_what_the_library_makes_with_the_same_seed(generate, tiny_checkpoint, tmp_path):
    assert generate("--prompt", "red apple", "--seed", 7, "--top-k", 5).exit_code == 0
    made = load_pipeline(tiny_checkpoint).generate(prompts=["red apple"], seed=7, top_k=5)
    with Image.open(tmp_path / "out/000_red-apple_seed7.png") as image:
        assert np.array_equal(np.asarray(image), made.images[0])


def test_every_sampling_option_reaches_the_sampler(generate, tmp_path):
    given = {
        "guidance_scale": 3.0,
        "guidance_schedule": "interval",
        "guidance_interval": [0.25, 0.75],
        "guidance_until": 3,
        "top_k": 9,
        "top_p": 0.9,
        "temperature": 0.8,
        "more_smooth": True,
    }
    options: list[object] = ["--more-smooth", "--guidance-interval", 0.25, 0.75]
    for name in given.keys() - {"guidance_interval", "more_smooth"}:
        options += ["--" + name.replace("_", "-"), given[name]]
    result = generate("--prompt", "a", *options)
    assert result.exit_code == 0, result.output
    found = read_metadata(tmp_path / "out/000_a_seed0.png")
    assert json.loads(found["sampling"]) == given


def test_prompts_come_from_options_then_the_file(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("cat\n\ndog\n")
    result = generate("--prompts-file", tmp_path / "prompts.txt", "--prompt", "apple", "--json")
    made = json.loads(result.stdout)["images"]
    assert [image["prompt"] for image in made] == ["apple", "cat", "dog"]


def test_a_table_of_prompts_gives_every_image_its_seed(generate, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,seed\nred apple,40\ncat,\n")
    options = ("--prompt", "first", "--seed", 3, "--num-images", 2, "--json")
    result = generate("--prompts-file", tmp_path / "prompts.csv", *options)
    assert result.exit_code == 0, result.output
    made = [(image["prompt"], image["seed"]) for image in json.loads(result.stdout)["images"]]
    apples = [("red apple", 40), ("red apple", 41)]
    assert made == [("first", 3), ("first", 4), *apples, ("cat", 3), ("cat", 4)]


def test_a_repeated_seed_gives_each_image_its_own_or_is_refused(generate):
    options = ("--prompt", "cat", "--prompt", "dog", "--seed", 7, "--seed", 3, "--json")
    made = json.loads(generate(*options).stdout)["images"]
    assert [(image["prompt"], image["seed"]) for image in made] == [("cat", 7), ("dog", 3)]
    wrong = generate(*options, "--num-images", 2)
    assert "error: seed has 2 numbers for 4 images; give one for each" in wrong.stderr
    assert wrong.exit_code == 2


def test_class_ids_make_images_of_a_class_model(tiny_class_checkpoint, tmp_path):
    options = ("--checkpoint", tiny_class_checkpoint, "--output-dir", tmp_path / "out")
    result = nsp("generate", *options, "--class-id", 3, "--class-id", 9, "--batch-size", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/001_class-9_seed0.png").exists()


def test_json_output_is_all_there_is_on_stdout(generate):
    result = generate("--prompt", "red apple", "--seed", 4, "--json")
    found = json.loads(result.stdout)
    (image,) = found["images"]
    assert (image["prompt"], image["seed"], found["backend"]) == ("red apple", 4, "torch")
    assert image["ms"] > 0
    assert Path(image["path"]).exists()
    assert Path(found["contact_sheet"]).exists()


def test_a_truncated_prompt_is_said_once(generate):
    words = "woman firefighter with a very long description of everything"
    result = generate("--prompt", words, "--num-images", 3, "--batch-size", 1)
    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if "longer than" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert "longer than" not in result.stdout


def test_a_prompt_with_bad_bytes_makes_an_image(generate, tmp_path):
    result = generate("--prompt", b"caf\xe9 \xf0\x9f\x8d\x8e".decode(errors="surrogateescape"))
    assert result.exit_code == 0, result.output
    assert read_metadata(tmp_path / "out/000_caf_seed0.png")["prompt"] == "caf\ufffd 🍎"


def test_intermediates_are_saved_when_asked_for(generate, tmp_path):
    assert generate("--prompt", "cat", "--save-intermediates").exit_code == 0
    scales = sorted(path.name for path in (tmp_path / "out/scales").iterdir())
    assert scales == [f"000_cat_seed0_scale{n}.png" for n in (1, 2, 3, 4)]


def test_convert_writes_a_checkpoint_that_generates(tmp_path):
    files = ("--tokenizer", GOLDEN_DIR / "weights_vae.safetensors")
    files += ("--predictor", GOLDEN_DIR / "weights_var.safetensors")
    given = json.loads((GOLDEN_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: given[k] for k in ("vae", "var")}))
    files += ("--config", tmp_path / "config.json")
    folder = tmp_path / "checkpoint"
    result = nsp("convert", "--family", "var", *files, "--output-dir", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"next: nsp export --checkpoint {folder}"
    options = ("--checkpoint", folder, "--output-dir", tmp_path / "out")
    assert nsp("generate", *options, "--class-id", 1).exit_code == 0


def test_inspect_shows_a_checkpoint(tiny_checkpoint):
    shown = nsp("inspect", tiny_checkpoint)
    assert shown.exit_code == 0
    assert "predictor/model.safetensors" in shown.stdout
    found = json.loads(nsp("inspect", tiny_checkpoint, "--json").stdout)
    assert found["kind"] == "checkpoint"
    assert found["model_hash"] == load_pipeline(tiny_checkpoint).model_hash
    assert found["sizes"]["vae/model.safetensors"] > 1000


def test_ctrl_c_ends_in_one_line_and_leaves_whole_pictures(tiny_checkpoint, tmp_path):
    options = ("--checkpoint", tiny_checkpoint, "--output-dir", tmp_path, "--batch-size", 1)
    process = nsp_process("generate", *options, "--prompt", "cat", "--num-images", 100_000)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("interrupted")
    assert output == ""
    pictures = list(tmp_path.iterdir())
    assert len(pictures) >= 3
    for path in pictures:
        with Image.open(path) as image:
            image.load()


def test_a_reader_that_leaves_early_is_no_error(tiny_checkpoint):
    process = nsp_process("inspect", tiny_checkpoint)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert errors == ""


@pytest.mark.parametrize("verb", ["generate", "train", "export", "bench"])
def test_help_of_a_verb_with_many_options_shows_each_once_under_a_title(verb: str) -> None:
    shown = nsp(verb, "--help").stdout
    titles = [line for line in shown.splitlines() if line[:1].isalpha() and line.endswith(":")]
    assert len(titles) >= 4
    assert [title for title in titles if title != "Commands:"][-1] == "Other options:"
    first_words = [line.split()[0].rstrip(",") for line in shown.splitlines() if "  -" in line[:3]]
    own = [option.opts[0] for option in main.commands[verb].params]
    assert sorted(set(own) & set(first_words)) == sorted(own)
    assert len(first_words) == len(set(first_words))
