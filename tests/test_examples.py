"""Every example does what its first lines say, with the engines of a tiny model."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nsp.child import environment
from nsp.pipeline.pipeline import load_pipeline
from tests.models import new_tiny_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROMPT = "red apple"
WEB = ("index.html", "main.js", "package.json")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def run(*words: object, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def nsp(*words: object, **variables: str) -> str:
    return run("-P", "-m", "nsp", *words, **variables)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the settings of the bundled one, in fp32 and in int8, in one folder."""
    folder = tmp_path_factory.mktemp("examples")
    checkpoint = new_tiny_checkpoint(folder / "checkpoint", greedy=True)
    words = ("--checkpoint", checkpoint, "--target", "onnxruntime", "--engine-dir")
    for precision in ("--int8", "--fp32"):
        nsp("export", *words, folder / "engines", precision)
    return folder / "engines"


@pytest.fixture(scope="module")
def expected(engines: Path) -> NDArray[np.uint8]:
    """What nsp makes of the prompt."""
    return load_pipeline(engines, precision="fp32").generate(prompts=[PROMPT], seed=0).images[0]


def test_previews_saves_every_step_and_three_seeds(engines: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "previews.py", engines, tmp_path / "out", PROMPT, "grinning face")
    steps = len(load_pipeline(engines).config.patch_nums)
    assert len(list((tmp_path / "out").glob("?_step?.png"))) == 2 * steps
    assert len(list((tmp_path / "out").glob("seed?.png"))) == 3
    assert f"step {steps} of {steps}" in printed


def test_engines_run_without_nsp_to_the_last_bit(
    engines: Path, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    script = (EXAMPLES / "plain_onnxruntime.py").read_text()
    assert "import nsp" not in script
    assert "from nsp" not in script
    run(EXAMPLES / "plain_onnxruntime.py", engines, PROMPT, tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as image:
        assert np.array_equal(np.asarray(image), expected)


def test_tradeoffs_compares_precisions_and_guidance(engines: Path) -> None:
    rows = run(EXAMPLES / "tradeoffs.py", engines, PROMPT).splitlines()
    assert [row.split()[0] for row in rows] == ["fp32"] * 3 + ["int8"] * 3
    assert rows[0].endswith("inf dB")
    assert all(float(row.split()[-2]) > 5 for row in rows[1:])


def test_a_backend_of_another_package_runs_the_engines(engines: Path, tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLES / "new_backend", tmp_path / "new_backend")
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run("-m", "pip", "install", *flags, "--target", tmp_path / "site", source)
    place = {"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"}
    words = ["--engine-dir", engines, "--prompt", PROMPT, "--fp32"]
    for backend in ("onnx-reference", "onnxruntime"):
        nsp("generate", *words, "--backend", backend, "--output-dir", tmp_path / backend, **place)
    pictures = []
    for folder in ("onnx-reference", "onnxruntime"):
        with Image.open(next((tmp_path / folder).glob("000_*.png"))) as image:
            pictures.append(np.asarray(image).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_own_pictures_become_engines_and_new_pictures(tmp_path: Path) -> None:
    run(EXAMPLES / "draw_pictures.py", tmp_path / "pictures", "--count", 12)
    assert (tmp_path / "pictures/000.txt").read_text() == "green flower on a brown circle\n"
    words = ("sh", EXAMPLES / "own_pictures.sh", tmp_path / "pictures", tmp_path / "own")
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*map(str, words), "--preset", "smoke"],
        env=environment() | {"PATH": scripts},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "own/pictures").glob("0*.png"))) == 12


@pytest.fixture
def served(engines: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the page, with its packages and the engines; skipped where npm has none."""
    npm = shutil.which("npm")
    if npm is None or CHROMIUM is None:
        pytest.skip("needs npm and Chromium; Debian, Ubuntu: apt-get install npm chromium")
    page = tmp_path / "web"
    page.mkdir()
    for name in WEB:
        shutil.copy(EXAMPLES / "web" / name, page)
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0")
    installed = subprocess.run(
        [npm, "install", *quiet], cwd=page, capture_output=True, text=True, timeout=300, check=False
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install onnxruntime-web: {installed.stderr.strip()[-200:]}")
    (tmp_path / "engines").symlink_to(engines)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/web/?engines=/engines"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


_READ = """() => {
  const canvas = document.getElementById("picture");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.width, Array.from(data)];
}"""


@pytest.mark.web
def test_engines_run_in_a_browser(served: str, expected: NDArray[np.uint8]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = ["--no-sandbox"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(served)
        page.wait_for_function("document.getElementById('state').textContent == 'ready'")
        page.fill("#prompt", PROMPT)
        page.click("button")
        page.wait_for_function("document.getElementById('state').textContent.startsWith('done')")
        side, data = page.evaluate(_READ)
        browser.close()
    assert problems == []
    picture = np.array(data, np.uint8).reshape(side, side, 4)[:, :, :3]
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
