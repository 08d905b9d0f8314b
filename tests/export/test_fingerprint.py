"""What makes a built stage out of date: an edit of the code that its graph comes from."""

import importlib
import sys

import pytest

from nsp.export.fingerprint import code_digest


@pytest.mark.parametrize("edited", ["own_family/__init__.py", "own_family/parts/block.py"])
def test_an_edit_of_a_familys_package_changes_the_digest(edited, tmp_path, monkeypatch):
    (tmp_path / "own_family/parts").mkdir(parents=True)
    (tmp_path / "own_family/__init__.py").write_text("class Own: ...\n")
    (tmp_path / "own_family/parts/block.py").write_text("SLOPE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_family", raising=False)
    own = importlib.import_module("own_family").Own
    before = code_digest(own)
    (tmp_path / "own_family/notes.txt").write_text("no code")
    assert code_digest(own) == before
    with (tmp_path / edited).open("a") as file:
        file.write("# changed\n")
    assert code_digest(own) != before


def test_of_a_family_without_a_package_its_own_file_counts(tmp_path, monkeypatch):
    (tmp_path / "one_file_family.py").write_text("class Own: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("one_file_family").Own
    before = code_digest(own)
    (tmp_path / "neighbour.py").write_text("another program")
    assert code_digest(own) == before
    (tmp_path / "one_file_family.py").write_text("class Own: x = 1\n")
    assert code_digest(own) != before
