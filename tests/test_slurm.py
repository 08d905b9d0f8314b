"""The cluster scripts, run with stand-ins for Slurm's commands that note what they were asked."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[1] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sh"))
JOBS = {  # nodes, GPUs of each
    "one_gpu.sh": (1, 1),
    "eight_gpus.sh": (1, 8),
    "train_8gpu.sh": (1, 8),
    "nodes.sh": (4, 8),
}

NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" >> "$NOTES"
"""
SRUN = f"""{NOTE}
while [[ $1 == -* ]]; do shift; done
export SLURM_NODEID=2
echo $$ > step.pid
exec "$@"
"""
SCONTROL = f"""{NOTE}
if [[ $1 == show ]]; then printf 'node-a7\\nnode-b1\\nnode-b2\\nnode-c9\\n'; fi
if [[ $1 == requeue ]]; then mkdir at_requeue && cp saved.? at_requeue; fi
"""
# Slurm's own: a signal goes to every process of the step, also to those in sessions of their own.
SCANCEL = f"""#!{sys.executable}
import os, pathlib, psutil, signal, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write("\\n".join(["scancel", *sys.argv[1:]]) + "\\n")
step = psutil.Process(int(pathlib.Path("step.pid").read_text()))
for process in [step, *step.children(recursive=True)]:
    process.send_signal(signal.SIGTERM)
"""
# A train.py that counts the signals, takes its time to save, and leaves when all have saved.
TRAIN = """
import os, pathlib, signal, sys, time
rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
pathlib.Path(f"up.{rank}").touch()
deadline = time.monotonic() + 60
while not signals and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(1)
pathlib.Path(f"saved.{rank}.part").write_text(str(len(signals)))
os.rename(f"saved.{rank}.part", f"saved.{rank}")
while len(list(pathlib.Path().glob("saved.?"))) < world and time.monotonic() < deadline:
    time.sleep(0.01)
os._exit(130)
"""


class Cluster:
    """A folder with a checkout's scripts in it, and commands that come first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.notes = folder, folder / "bin", folder / "notes"
        (folder / "slurm").symlink_to(SLURM)
        self.commands.mkdir()
        for name in ("accelerate", "mlflow"):
            self.command(name, NOTE)
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)
        self.command("scancel", SCANCEL)

    def command(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text)
        (self.commands / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.commands}:/usr/bin:/bin",
            "NOTES": str(self.notes),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.Popen(
            ["bash", f"slurm/{script}", *arguments],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def job(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        nodes, gpus = JOBS[script]
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "30007",
            "SLURM_JOB_NODELIST": "node-[a7-c9]",
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_CPUS_PER_TASK": str(4 * gpus),
        }
        return self.start(script, *arguments, **{**slurm, **variables})

    def noted(self, command: str) -> list[str]:
        """Return the words of the only call of a command."""
        words = self.notes.read_text().splitlines() if self.notes.exists() else []
        if words.count(command) != 1:
            return []
        rest = words[words.index(command) + 1 :]
        others = {"srun", "accelerate", "scontrol", "scancel", "mlflow"}
        end = next((index for index, word in enumerate(rest) if word in others), len(rest))
        return rest[:end] if command != "srun" else rest


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def finish(process: subprocess.Popen[str], *, timeout: float = 60) -> tuple[int, str]:
    """Return the exit code and stderr."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_stops_at_the_first_failure(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "-x", *SCRIPTS], check=True, cwd=SLURM.parent)


@pytest.mark.parametrize("script", JOBS)
def test_a_job_starts_a_process_on_each_gpu_of_each_node(cluster: Cluster, script: str) -> None:
    status, errors = finish(cluster.job(script, "--seed", "3", RUN_DIR="runs/a b"))
    assert (status, errors) == (0, "")

    nodes, gpus = JOBS[script]
    words = cluster.noted("accelerate")
    assert words[0] == "launch"
    assert value(words, "--num_processes") == str(nodes * gpus)
    assert value(words, "--num_machines") == str(nodes)
    assert value(words, "--machine_rank") == "2"  # of the node, not of the batch script
    assert value(words, "--num_cpu_threads_per_process") == "4"
    assert value(words, "--main_process_port") == "15007"
    assert ("--multi_gpu" in words) == (nodes * gpus > 1)
    assert ("--main_process_ip" in words) == (nodes > 1)
    if nodes > 1:
        assert value(words, "--main_process_ip") == "node-a7"
    options = words[words.index("train.py") + 1 :]
    assert value(options, "--output-dir") == "runs/a b"
    assert value(options, "--seed") == "3"
    assert "--resume" not in options


@pytest.mark.parametrize(
    ("words", "config", "folder"),
    [
        ((), "configs/base.yaml", "runs/base"),
        (("configs/small one.yaml", "--seed", "3"), "configs/small one.yaml", "runs/small one"),
    ],
)
def test_a_job_trains_what_a_file_describes(
    words: tuple[str, ...], config: str, folder: str, cluster: Cluster
) -> None:
    assert finish(cluster.job("train_8gpu.sh", *words)) == (0, "")
    options = cluster.noted("accelerate")
    assert (value(options, "--config"), value(options, "--output-dir")) == (config, folder)
    assert options[-len(words[1:]) :] == [*words[1:]] or not words


@pytest.mark.parametrize("script", JOBS)
def test_the_resources_asked_for_are_those_the_launcher_uses(script: str) -> None:
    text = (SLURM / script).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    nodes, gpus = JOBS[script]
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(nodes), str(gpus))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:USR1@300"
    assert "\n#SBATCH --requeue\n" in text
    assert text.index("#SBATCH --output") < text.index("set -euo")  # Slurm stops reading at code


def test_launch_options_are_those_that_accelerate_and_train_know(cluster: Cluster) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    finish(cluster.job("nodes.sh"))
    words = cluster.noted("accelerate")
    parsed = launch.launch_command_parser().parse_args(words[1:])
    assert parsed.training_script == "train.py"
    assert parsed.num_processes == 32

    from nsp.train import main

    known = {option for parameter in main.params for option in parameter.opts}
    options = {word for word in parsed.training_script_args if word.startswith("--")}
    assert options <= known


def test_a_folder_that_holds_a_run_is_continued(cluster: Cluster) -> None:
    run = cluster.folder / "runs/emoji"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert finish(cluster.job("one_gpu.sh"))[0] == 0
    assert "--resume" in cluster.noted("accelerate")


def test_a_failed_step_fails_the_job_and_is_not_requeued(cluster: Cluster) -> None:
    cluster.command("accelerate", "#!/bin/sh\nexit 3\n")
    assert finish(cluster.job("one_gpu.sh"))[0] == 3
    assert cluster.noted("scontrol") == []


def test_a_run_that_finishes_after_the_warning_is_not_requeued(cluster: Cluster) -> None:
    cluster.command(
        "accelerate",
        f"#!{sys.executable}\nimport pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "pathlib.Path('up.0').touch()\ntime.sleep(2)\n",
    )
    process = cluster.job("one_gpu.sh")
    wait_for(cluster.folder / "up.0")
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0
    assert cluster.noted("scancel") == ["--signal=TERM", "30007"]
    assert cluster.noted("scontrol") == []


def test_outside_a_job_the_script_says_how_to_submit_it(cluster: Cluster) -> None:
    status, errors = finish(cluster.start("one_gpu.sh"))
    assert status != 0
    assert "sbatch" in errors


@pytest.mark.parametrize("processes", [1, 2])
def test_before_the_time_limit_every_process_is_told_once_and_the_job_is_requeued(
    cluster: Cluster, processes: int
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra train")
    accelerate = f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
    cluster.command("accelerate", accelerate)
    cluster.command("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (cluster.folder / "train.py").write_text(TRAIN)
    process = cluster.job(
        "one_gpu.sh", SLURM_GPUS_ON_NODE=str(processes), SLURM_JOB_ID=str(os.getpid())
    )
    try:
        for rank in range(processes):
            wait_for(cluster.folder / f"up.{rank}")
        process.send_signal(signal.SIGUSR1)
        status, errors = finish(process)
    finally:
        process.kill()

    saved = sorted((cluster.folder / "at_requeue").iterdir())  # Slurm ends what has not saved yet
    told = [path.read_text() for path in saved]
    assert told == ["1"] * processes, errors
    assert status != 0
    assert cluster.noted("scontrol") == ["requeue", str(os.getpid())]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_the_mlflow_server_listens_to_this_machine_alone(cluster: Cluster) -> None:
    status, errors = finish(cluster.start("mlflow_server.sh", "--", "--workers", "1"))
    assert status == 0
    words = cluster.noted("mlflow")
    assert words[0] == "server"
    assert value(words, "--host") == "127.0.0.1"
    assert value(words, "--port") == "5000"
    assert value(words, "--backend-store-uri") == f"sqlite:///{cluster.folder}/mlflow/mlflow.db"
    assert words[-2:] == ["--workers", "1"]
    assert "ssh -N -L 5000:127.0.0.1:5000" in errors


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.7", "login.example.org", "127.0.0.1.nip"]
)
def test_other_machines_are_let_in_only_when_said(cluster: Cluster, host: str) -> None:
    status, errors = finish(cluster.start("mlflow_server.sh", "--host", host))
    assert status == 2
    assert "--allow-remote" in errors
    assert cluster.noted("mlflow") == []

    assert finish(cluster.start("mlflow_server.sh", "--host", host, "--allow-remote"))[0] == 0
    assert value(cluster.noted("mlflow"), "--host") == host


@pytest.mark.parametrize(
    "arguments",
    [
        ("--", "--host", "0.0.0.0"),
        ("--", "--host=0.0.0.0"),
        ("--", "-h", "0.0.0.0"),
        ("--port", "0"),
        ("--port", "1e3"),
        ("--port", "65536"),
        ("--port",),
        ("--store", ""),
        ("--bind", "0.0.0.0"),
    ],
)
def test_wrong_arguments_of_the_server_are_refused(
    cluster: Cluster, arguments: tuple[str, ...]
) -> None:
    status, errors = finish(cluster.start("mlflow_server.sh", *arguments))
    assert status == 2
    assert errors.startswith("error: ")
    assert cluster.noted("mlflow") == []


def test_a_folder_that_a_run_recorded_into_is_served_as_it_is(cluster: Cluster) -> None:
    experiment = cluster.folder / "runs/a b/mlflow/0"
    experiment.mkdir(parents=True)
    (experiment / "meta.yaml").touch()
    cluster.command("mlflow", f'{NOTE}\necho "allowed=$MLFLOW_ALLOW_FILE_STORE" >> "$NOTES"\n')
    assert finish(cluster.start("mlflow_server.sh", "--store", "runs/a b/mlflow"))[0] == 0
    words = cluster.noted("mlflow")
    assert value(words, "--backend-store-uri") == str(experiment.parent)
    assert words[-1] == "allowed=true"
