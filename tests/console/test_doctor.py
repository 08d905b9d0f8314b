import json
import sys

from click.testing import CliRunner

from nsp.backends import available as registry
from nsp.backends.available import BACKENDS
from nsp.backends.nvidia import Gpu
from nsp.cli import main
from nsp.distribution import pip_install


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
    import nsp.console.doctor

    monkeypatch.setattr(nsp.console.doctor, "installed_version", lambda package: None)
    extras = {each["name"]: each for each in nsp.console.doctor.examine()["extras"]}
    assert {"export", "train", "tensorrt-rtx"} <= set(extras)
    assert extras["export"]["install"] == pip_install("export")
    assert any(line.startswith("torch") for line in extras["export"]["missing"])


def test_only_a_machine_with_an_nvidia_gpu_is_told_to_install_tensorrt(monkeypatch):
    import nsp.console.doctor

    monkeypatch.setattr(nsp.console.doctor, "installed_version", lambda package: None)
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    gpu = Gpu(name="NVIDIA L4", compute_capability="8.9", driver_cuda="13.0")
    for found in (None, gpu):
        for module in (nsp.console.doctor, registry):
            monkeypatch.setattr(module, "find_gpu", lambda found=found: found)
        findings = nsp.console.doctor.examine()
        rows = [*findings["extras"], *findings["backends"]]
        advised = {row["name"] for row in rows if "tensorrt" in (row["install"] or "")}
        both = {"tensorrt", "tensorrt-rtx", "tensorrt_rtx"}
        assert advised == (both if found else set())
