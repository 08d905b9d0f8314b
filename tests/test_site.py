"""The pages build without a warning and load nothing; the package index gets no dead link."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_pages_build_without_a_warning_and_load_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text()
        )
        assert loaded == [], page
    assert "load_pipeline" in (tmp_path / "api.html").read_text()


def test_no_page_has_a_figure_that_was_to_be_filled_in() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert re.findall(r"\b(?:TODO|TBD|FIXME|MEASURED|TUNE\w*)\b", page.read_text()) == [], page


def test_the_page_of_a_package_index_links_only_to_what_is_there() -> None:
    text = (ROOT / "deploy/README.md").read_text()
    assert re.findall(r"\]\((?!https://)", text) == []
    extras = re.findall(r"`([\w-]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", text, re.M)))
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras
    assert all(re.search(rf"^{extra} = \[", declared, re.M) for extra in extras)
