"""Bad input gets one clear line and exit code 1 or 2, and leaves nothing half-written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nsp.artifacts.checkpoint import write_digests
from nsp.artifacts.manifest import read_manifest
from nsp.cli import main
from nsp.distribution import pip_install
from tests.artifacts.engine_folders import change_manifest, engine_file, write_engines
from tests.disk import largest_file

ROOT = Path(__file__).parent.parent
PROMPT = ("--prompt", "red apple")


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def assert_one_line(result: Result, code: int, *words: str) -> None:
    """Check the exit code, and that the last line on stderr is the error, once, with its words."""
    assert result.exit_code == code, result.output
    *logs, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any(log.startswith(("error", "Traceback", "Usage")) for log in logs)
    for word in words:
        assert word in line
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("frobnicate",), ("frobnicate", "nsp --help")),
        (("--frobnicate",), ("--frobnicate",)),
        (("generate", "--frobnicate"), ("--frobnicate", "generate --help")),
        (("generate", *PROMPT, "--seed", "x"), ("--seed", "x")),
        (("generate", *PROMPT, "--seed", "1.5"), ("--seed", "1.5")),
        (("generate", *PROMPT, "--seed", "-1"), ("--seed", "-1")),
        (("generate", *PROMPT, "--batch-size", "0"), ("--batch-size", "0")),
        (("generate", *PROMPT, "--num-images", "0"), ("--num-images", "0")),
        (("generate", *PROMPT, "--guidance-schedule", "up"), ("up", "ramp", "interval")),
        (("generate", *PROMPT, "--class-id", "1"), ("both given",)),
        (("generate", "--prompt", " "), ("prompt 1 is empty",)),
        (("generate", "--prompts-file", "no-such.txt"), ("no-such.txt", "does not exist")),
        (("generate", "--prompts-file", str(ROOT)), (str(ROOT), "is a directory")),
        (("generate", *PROMPT, "--engine-dir", "a", "--checkpoint", "b"), ("choose one",)),
        (("bench", "--guidance-until", "1"), ("is for nsp bench fidelity",)),
        (("bench", "--threshold", "3%"), ("is for nsp bench compare",)),
        (("bench", "--fidelity", "--sweep"), ("--sweep", "omit it with nsp bench fidelity")),
        (("bench", "--fidelity", "--rounds", "3"), ("--rounds", "omit it with nsp bench fidelity")),
        (
            ("bench", "--compare", __file__, __file__, "--fp16"),
            ("--fp16", "nsp bench compare"),
        ),
        (("inspect",), ("FOLDER",)),
        (("convert", "--family", "var", "--output-dir", "new"), ("--tokenizer",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage_is_one_line_and_exit_2(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without the folder `engines` an export may have left here
    assert_one_line(nsp(*args), 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--guidance-scale", "-2"), ("guidance_scale=-2.0", "1.0 is off")),
        (("--guidance-scale", "nan"), ("guidance_scale=nan",)),
        (("--top-p", "0"), ("top_p=0.0",)),
        (("--guidance-interval", "0.2", "0.8"), ("guidance_interval", "no effect")),
        (("--top-k", "-1"), ("top_k=-1",)),
        (("--temperature", "0"), ("temperature=0.0", "greedy")),
        (("--backend", "onnxruntime"), ("checkpoint", "nsp export --checkpoint")),
        (("--fp16",), ("--fp16", "checkpoint")),
        (("--fp16", "--fp32"), ("--fp16", "--fp32", "choose one")),
        (("--backend", "frobnicate"), ("checkpoint", "torch")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_value_that_is_not_allowed_is_one_line_and_exit_2(
    tiny_checkpoint, tmp_path, options, words
):
    where = ("--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "out")
    assert_one_line(nsp("generate", *where, *PROMPT, *options), 2, *words)
    assert not (tmp_path / "out").exists()


def test_the_wrong_kind_of_condition_is_named(tiny_checkpoint, tiny_class_checkpoint, tmp_path):
    def generate(checkpoint: Path, *condition: object) -> Result:
        return nsp("generate", "--checkpoint", checkpoint, "--output-dir", tmp_path, *condition)

    assert_one_line(generate(tiny_checkpoint, "--class-id", 1), 2, "text-conditional")
    assert_one_line(generate(tiny_checkpoint, "--class", "cat"), 2, "no classes; give --prompt")
    assert_one_line(generate(tiny_class_checkpoint, *PROMPT), 2, "class-conditional")
    assert_one_line(generate(tiny_class_checkpoint, "--class-id", 99), 2, "class id 99", "0..9")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_the_wrong_kind_are_told_apart(tiny_checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    absent = tmp_path / "absent"
    for folder in (empty, absent):
        result = nsp("generate", "--engine-dir", folder, *PROMPT)
        why = "manifest.json" if folder == empty else "does not exist"
        assert_one_line(result, 1, str(folder), why, "nsp export --engine-dir")
        result = nsp("generate", "--checkpoint", folder, *PROMPT)
        assert_one_line(result, 1, str(folder), "config.json")
        assert_one_line(nsp("inspect", folder), 1, str(folder), "manifest.json")
    result = nsp("generate", "--engine-dir", tiny_checkpoint, *PROMPT)
    assert_one_line(result, 2, "is a checkpoint", "--checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "[" * 100_000, "\x00\xff"),
        *('{"family": "var"}', '{"family": 3, "config": {}}', '{"family": [], "config": {}}'),
    ],
    ids=range(8),
)
def test_a_damaged_checkpoint_record_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    for args in (("inspect", tmp_path), ("generate", "--checkpoint", tmp_path, *PROMPT)):
        result = nsp(*args)
        assert result.exit_code in (1, 2)
        assert_one_line(result, result.exit_code)


def test_damaged_weights_are_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "predictor/model.safetensors"
    whole = weights.read_bytes()
    options = ("--checkpoint", folder, "--output-dir", tmp_path / "out", *PROMPT)
    for damaged in (b"", whole[:7], whole[: len(whole) // 2]):
        weights.write_bytes(damaged)
        assert_one_line(nsp("generate", *options), 1, "predictor")
    weights.unlink()
    assert_one_line(nsp("generate", *options), 1, "predictor")
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "family": "frob"}))
    write_digests(folder)
    assert_one_line(nsp("inspect", folder), 2, "'frob'", "var")
    weights = folder / "vae/model.safetensors"
    options = ("--tokenizer", weights, "--predictor", weights, "--output-dir", tmp_path / "out")
    assert_one_line(nsp("convert", "--family", "frob", *options), 2, "'frob'", "var")


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', "\x00\xff", "[" * 100_000],
    ids=range(7),
)
def test_a_damaged_manifest_is_named_with_the_command_that_repairs_it(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    for args in (("inspect", tmp_path), ("generate", "--engine-dir", tmp_path, *PROMPT)):
        assert_one_line(nsp(*args), 1, str(tmp_path), f"nsp export --engine-dir {tmp_path}")


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A class-conditional engine folder for batches of 2, in fp32."""
    write_engines(tmp_path / "engines", max_batch=2)
    return tmp_path / "engines"


def assert_refused(engines: Path, code: int, *words: str, options: tuple[object, ...] = ()) -> None:
    """Check that generating from `engines` ends in one line and leaves no output folder."""
    output = engines.parent / "out"
    where = ("--engine-dir", engines, "--output-dir", output)
    assert_one_line(nsp("generate", *where, "--class-id", 1, *options), code, *words)
    assert not output.exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_engine_is_named_with_the_command_that_repairs_it(engines, damage):
    path = engine_file(engines, "step")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + b"?")
    assert_refused(engines, 1, str(path), f"nsp export --engine-dir {engines}")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--batch-size", 3), 2, ("batch size 3", "1..2", "--max-batch 3")),
        (("--fp16",), 1, ("fp16", "it has fp32", "--fp16")),
        (("--backend", "frob"), 2, ("'frob'", "onnxruntime")),
        (("--backend", "torch"), 2, ("has engines", "checkpoint")),
        (("--backend", "tensorrt-rtx"), 1, ("no engines for tensorrt_rtx", "onnxruntime")),
    ],
)
def test_a_request_the_engines_do_not_cover_is_named(engines, options, code, words):
    assert_refused(engines, code, *words, options=options)


def test_a_manifest_of_an_unknown_family_is_refused(engines):
    change_manifest(engines, family="frob")
    assert_refused(engines, 1, "'frob'", "nsp export")


def test_engines_of_another_machine_are_refused(tmp_path):
    device = {"os": "plan9"}
    write_engines(tmp_path / "engines", backend="tensorrt_rtx", device=device)
    assert read_manifest(tmp_path / "engines").backends() == ("tensorrt_rtx",)
    options = ("--backend", "tensorrt-rtx")
    assert_refused(tmp_path / "engines", 1, "plan9", "--target tensorrt-rtx", options=options)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vae.pth", b"no weights", ("vae.pth",)),
        ("vae.safetensors", b"no weights", ("vae.safetensors",)),
    ],
)
def test_convert_names_a_file_that_holds_no_weights(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    files = ("--tokenizer", tmp_path / name, "--predictor", tmp_path / name)
    result = nsp("convert", "--family", "var", *files, "--output-dir", tmp_path / "out")
    assert_one_line(result, 1, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000], ids=range(4))
def test_convert_names_a_configuration_that_is_no_json_object(tmp_path, content):
    config = tmp_path / "config.json"
    config.write_bytes(content)
    files = ("--tokenizer", config, "--predictor", config, "--config", config)
    result = nsp("convert", "--family", "var", *files, "--output-dir", tmp_path / "out")
    assert_one_line(result, 2, "config.json")


def test_an_output_folder_that_cannot_be_made_is_named(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/out", "/proc/out"):
        options = ("--checkpoint", tiny_checkpoint, "--output-dir", folder)
        assert_one_line(nsp("generate", *options, *PROMPT), 1, str(folder))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_half_written_picture(tiny_checkpoint, tmp_path):
    options = ("--checkpoint", tiny_checkpoint, "--output-dir", tmp_path / "out")
    with largest_file(100):
        result = nsp("generate", *options, *PROMPT)
    assert_one_line(result, 1, "File too large", str(tmp_path / "out/000_red-apple_seed0.png"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(tiny_checkpoint, package):
    """In a process of its own: what is imported already would be found."""
    script = "import sys; sys.modules[sys.argv.pop(1)] = None; import cli; cli.main()"
    where = ("--checkpoint", str(tiny_checkpoint), "--prompt", "cat")
    command = [sys.executable, "-c", script, package, "generate", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    advised = [pip_install(extra) for extra in ("export", "train")]
    assert line in [f"error: {package} is not installed; run: {advice}" for advice in advised]
    assert "Traceback" not in done.stderr


def test_verbose_adds_the_traceback_before_the_line(tmp_path):
    for args in (("--verbose", "inspect", tmp_path), ("inspect", tmp_path, "--verbose")):
        result = nsp(*args)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_the_time_a_build_may_take_is_an_option(tiny_checkpoint, tmp_path, monkeypatch):
    import nsp.export.run

    seen = []

    def noting(options):
        seen.append(options.build_timeout_s)
        return []

    monkeypatch.setattr(nsp.export.run, "plan", noting)
    arguments = [
        "export",
        "--checkpoint",
        str(tiny_checkpoint),
        "--engine-dir",
        str(tmp_path / "e"),
    ]
    for more in ([], ["--build-timeout", "7200"]):
        result = CliRunner().invoke(main, [*arguments, "--dry-run", "--json", *more])
        assert result.exit_code == 0, result.output
    assert seen == [3600.0, 7200.0]
    assert CliRunner().invoke(main, [*arguments, "--build-timeout", "0"]).exit_code == 2


def in_a_shell(command: str) -> tuple[int, str, str]:
    """Run one line of a shell in which `nsp` is this program; a process of its own, as in life."""
    nsp = f"{shlex.quote(sys.executable)} -c 'import cli; cli.main()'"
    script = f'set -o pipefail; nsp() {{ {nsp} "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("nsp inspect ENGINES >&-", "standard output is closed"),
        ("nsp --help >&-", "standard output is closed"),
        ("nsp inspect ENGINES >/dev/full", "No space left on device"),
        ("(ulimit -v 51200; nsp generate --engine-dir ENGINES --class-id 1)", "not enough memory"),
    ],
)
def test_a_process_that_cannot_write_or_has_no_memory_ends_with_one_line(engines, command, words):
    code, _, errors = in_a_shell(command.replace("ENGINES", str(engines)))
    assert code == 1, errors
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1
    assert words in errors


@pytest.mark.parametrize("command", ["inspect ENGINES", "inspect ENGINES --json"])
def test_a_reader_that_leaves_early_gets_no_complaint_and_no_success(engines, command):
    code, _, errors = in_a_shell(f"nsp {command.replace('ENGINES', str(engines))} | true")
    assert (code, errors) == (1, "")


def test_a_closed_stderr_does_not_lend_its_number_to_a_file(engines, tmp_path):
    code, out, _ = in_a_shell(f"nsp inspect {tmp_path}/none 2>&-; nsp inspect {engines} 2>&- <&-")
    assert code == 0
    assert out.startswith("engines ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libfoo.so.5: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_way_in_which_memory_ends_is_one_line(monkeypatch, tmp_path, error):
    def fail(folder):
        raise error

    monkeypatch.setattr("nsp.console.inspection.describe_folder", fail)
    assert_one_line(nsp("inspect", tmp_path), 1, "not enough memory")


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(folder):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nsp.console.inspection.describe_folder", fail)
    assert isinstance(nsp("inspect", tmp_path).exception, RuntimeError)


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "two", "10000"])
@pytest.mark.parametrize("verb", [("generate", *PROMPT), ("verify", "x"), ("bench",), ("export",)])
def test_a_number_of_threads_that_cannot_be_is_a_wrong_usage(verb, number):
    assert_one_line(nsp(*verb, "--threads", number), 2, "--threads")


def test_an_output_folder_of_another_encoding_is_printed_as_it_is(tiny_checkpoint, tmp_path):
    folder = tmp_path / "caf\udce9"
    result = nsp("generate", "--checkpoint", tiny_checkpoint, "--output-dir", folder, *PROMPT)
    assert result.exit_code == 0, result.output
    assert b"/caf\xe9/contact_sheet.png" in result.stdout_bytes
