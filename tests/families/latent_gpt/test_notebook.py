"""The notebook runs from its first cell to its last."""

import importlib.util
import json
import logging
import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[3] / "examples/latent_gpt.ipynb"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))


def test_the_notebook_runs_and_is_stored_without_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(each["source"]) for each in cells if each["cell_type"] == "code"]
    assert not any(each.get("outputs") for each in cells)
    known: dict[str, object] = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, str(NOTEBOOK), "exec"), known)
    assert "4 of 4 rows" in capsys.readouterr().out


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
    reason="needs nbclient and ipykernel",
)
def test_jupyter_runs_it() -> None:
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(found, timeout=300, resources={"metadata": {"path": os.getcwd()}}).execute()
