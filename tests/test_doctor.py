import json
import sys

from click.testing import CliRunner

from cli import main
from nsp.runtime.backends.registry import BACKENDS


def test_doctor_names_every_backend_and_succeeds():
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in BACKENDS:
        assert name in result.stdout


def test_doctor_says_why_a_backend_does_not_work_and_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    backend = next(each for each in found["backends"] if each["name"] == "onnxruntime")
    assert not backend["works"]
    assert "onnxruntime" in backend["reason"]
    assert backend["install"].startswith("pip install")


def test_doctor_gives_the_command_for_every_extra_with_missing_packages(monkeypatch):
    import nsp.doctor

    monkeypatch.setattr(nsp.doctor, "_version", lambda package: None)
    extras = {each["name"]: each for each in nsp.doctor.examine()["extras"]}
    assert {"export", "train", "tensorrt-rtx"} <= set(extras)
    assert extras["export"]["install"] == "pip install 'nsp[export]'"
    assert any(line.startswith("torch") for line in extras["export"]["missing"])
