import io
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nsp.errors import ConfigError, MissingExtraError
from nsp.family.recipe import TrackingConfig
from nsp.training import tracking
from nsp.training.tracking import Tracker
from tests.disk import largest_file

RUN = {"seed": 3, "phases": [{"name": "tokenizer", "optimizer": {"lr": 0.5, "betas": [0.9, 0.95]}}]}
ONLY_TENSORBOARD = TrackingConfig(tensorboard=True)


def only_mlflow(address: str) -> TrackingConfig:
    return TrackingConfig(tensorboard=False, mlflow=address)


def record(config: TrackingConfig, folder: Path, steps: range, *, factor: float = 1.0) -> None:
    """Record one value and, at the last step, one picture; `steps.start` steps were done before."""
    with Tracker(config) as tracker:
        tracker.start(RUN, folder)
        tracker.phase("tokenizer", steps.start - 1)
        for step in steps:
            tracker.scalars(step, {"loss": factor * step})
        tracker.images(steps[-1], "samples", picture(steps[-1]))


def picture(value: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((4, 6, 3), value, np.uint8)


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in events(folder).Scalars("loss")]


def configurations(folder: Path) -> list[bytes]:
    """Return the configurations as TensorBoard itself reads them; `events` keeps replaced ones."""
    from tensorboard.backend.event_processing import plugin_event_accumulator

    accumulator = plugin_event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    return [each.tensor_proto.string_val[0] for each in accumulator.Tensors("config/text_summary")]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client library, allowed to read the folders that a tracker wrote."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return pytest.importorskip("mlflow", reason="needs the extra mlflow")


def the_run(mlflow: Any, store: Path) -> tuple[Any, Any]:
    """Return a client and the only run of a store."""
    client = mlflow.MlflowClient(store.resolve().as_uri())
    experiment = client.get_experiment_by_name("nsp")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_a_run_has_the_tags_and_the_experiment_of_its_configuration(
    tmp_path: Path, mlflow: Any
) -> None:
    tags = {"phase": "1", "model_size": "500M"}
    config = TrackingConfig(tensorboard=False, mlflow="local", experiment="first", tags=tags)
    record(config, tmp_path, range(1, 2))
    client = mlflow.MlflowClient((tmp_path / "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("first").experiment_id])
    assert tags.items() <= run.data.tags.items()


def test_tensorboard_holds_scalars_pictures_and_the_configuration(tmp_path: Path) -> None:
    record(ONLY_TENSORBOARD, tmp_path, range(1, 4))

    assert losses(tmp_path / "tensorboard/tokenizer") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    (sample,) = events(tmp_path / "tensorboard/tokenizer").Images("samples")
    shown = np.asarray(Image.open(io.BytesIO(sample.encoded_image_string)))
    assert sample.step == 3
    assert np.array_equal(shown, picture(3))
    (text,) = configurations(tmp_path / "tensorboard")
    assert b'"lr": 0.5' in text


def test_several_pictures_become_one_sheet(tmp_path: Path) -> None:
    with Tracker(ONLY_TENSORBOARD) as tracker:
        tracker.start(RUN, tmp_path)
        tracker.phase("tokenizer", 0)
        tracker.images(1, "many", np.stack([picture(0), picture(9)]))
        tracker.images(1, "sheet", Image.fromarray(picture(7)))

    recorded = events(tmp_path / "tensorboard/tokenizer")
    (many,), (sheet,) = recorded.Images("many"), recorded.Images("sheet")
    assert (many.width, many.height) == (2 * 104 + 8, 104 + 8)  # two enlarged, with margins
    assert (sheet.width, sheet.height) == (6, 4)


def test_resumed_steps_replace_those_of_the_run_that_died(tmp_path: Path) -> None:
    record(ONLY_TENSORBOARD, tmp_path, range(1, 8))
    record(ONLY_TENSORBOARD, tmp_path, range(5, 7), factor=10.0)  # at step 4 lay the checkpoint

    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]
    assert losses(tmp_path / "tensorboard/tokenizer") == expected
    assert len(configurations(tmp_path / "tensorboard")) == 1


def test_resuming_one_phase_leaves_the_others_alone(tmp_path: Path) -> None:
    for _ in range(2):
        record(ONLY_TENSORBOARD, tmp_path, range(1, 4))
    with Tracker(ONLY_TENSORBOARD) as tracker:
        tracker.start(RUN, tmp_path)
        tracker.phase("predictor", 0)
        tracker.scalars(1, {"loss": 0.5})

    assert len(losses(tmp_path / "tensorboard/tokenizer")) == 3
    assert losses(tmp_path / "tensorboard/predictor") == [(1, 0.5)]


def test_steps_after_a_rollback_replace_those_before_it(tmp_path: Path) -> None:
    with Tracker(ONLY_TENSORBOARD) as tracker:
        tracker.start(RUN, tmp_path)
        for value in (1.0, 2.0):
            tracker.phase("tokenizer", 4)
            for step in (5, 6):
                tracker.scalars(step, {"loss": value})
                tracker.scalars(step, {"held_out": value})  # two reports of one step are both kept

    assert losses(tmp_path / "tensorboard/tokenizer") == [(5, 2.0), (6, 2.0)]
    held_out = events(tmp_path / "tensorboard/tokenizer").Scalars("held_out")
    assert [each.step for each in held_out] == [5, 6]


def test_mlflow_holds_parameters_metrics_and_pictures(tmp_path: Path, mlflow: Any) -> None:
    record(only_mlflow("local"), tmp_path / "mine", range(1, 4))

    client, run = the_run(mlflow, tmp_path / "mine/mlflow")
    assert run.info.run_name == "mine"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "seed": "3",
        "phases.0.name": "tokenizer",
        "phases.0.optimizer.lr": "0.5",
        "phases.0.optimizer.betas": "[0.9, 0.95]",
    }
    history = client.get_metric_history(run.info.run_id, "tokenizer/loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    local = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id,
        artifact_path="tokenizer/samples/step000003.png",
        tracking_uri=(tmp_path / "mine/mlflow").as_uri(),
    )
    assert np.array_equal(np.asarray(Image.open(local)), picture(3))
    assert [each.path for each in client.list_artifacts(run.info.run_id) if not each.is_dir] == [
        "config.json"
    ]


def test_a_resumed_run_continues_its_mlflow_run_and_repeats_no_step(
    tmp_path: Path, mlflow: Any
) -> None:
    config = only_mlflow(str(tmp_path / "shared"))  # a folder that several runs record into
    with Tracker(config) as tracker:
        tracker.start(RUN, tmp_path / "run")
        tracker.phase("tokenizer", 0)
        for step in range(1, 6):
            tracker.scalars(step, {"loss": step})
        tracker.close("failed")
    client, run = the_run(mlflow, tmp_path / "shared")
    assert run.info.status == "FAILED"

    longer = {**RUN, "seed": 4}  # a parameter that MLflow will not change
    with Tracker(config) as tracker:
        tracker.start(longer, tmp_path / "run")
        tracker.phase("tokenizer", 3)
        for step in range(4, 8):
            tracker.scalars(step, {"loss": 10 * step})
            tracker.scalars(step, {"held_out": step})
        tracker.phase("predictor", 0)
        tracker.scalars(1, {"loss": 1.0})
        tracker.close("stopped")

    client, run = the_run(mlflow, tmp_path / "shared")
    assert run.info.status == "KILLED"
    history = client.get_metric_history(run.info.run_id, "tokenizer/loss")
    assert [each.step for each in history] == [1, 2, 3, 4, 5, 6, 7]
    assert len(client.get_metric_history(run.info.run_id, "tokenizer/held_out")) == 2
    assert len(client.get_metric_history(run.info.run_id, "predictor/loss")) == 1


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_an_error_ends_the_mlflow_run_too(
    tmp_path: Path, mlflow: Any, error: type[BaseException], status: str
) -> None:
    with suppress(error), Tracker(only_mlflow("local")) as tracker:
        tracker.start(RUN, tmp_path)
        raise error
    assert the_run(mlflow, tmp_path / "mlflow")[1].info.status == status


def test_a_run_whose_mlflow_run_is_gone_begins_another(tmp_path: Path, mlflow: Any) -> None:
    config = only_mlflow("local")
    record(config, tmp_path, range(1, 2))
    client, first = the_run(mlflow, tmp_path / "mlflow")
    client.delete_run(first.info.run_id)
    record(config, tmp_path, range(1, 2))
    (tmp_path / "mlflow.json").write_text("{")
    client, second = the_run(mlflow, tmp_path / "mlflow")
    assert second.info.run_id != first.info.run_id

    record(config, tmp_path, range(1, 2))
    experiment = client.get_experiment_by_name("nsp").experiment_id
    assert len(client.search_runs([experiment])) == 2


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_an_unreachable_server_costs_no_time_and_is_named_once(
    tmp_path: Path, mlflow: Any, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    record(only_mlflow(f"http://127.0.0.1:{closed_port}"), tmp_path, range(1, 200))
    assert time.monotonic() - began < 1

    (warning,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert f"MLflow (http://127.0.0.1:{closed_port}) cannot record" in warning.getMessage()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


def test_a_hanging_server_costs_no_time_and_its_backlog_is_bounded(
    tmp_path: Path,
    mlflow: Any,
    silent_port: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "_CLOSE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(only_mlflow(f"http://127.0.0.1:{silent_port}"))
    tracker.start(RUN, tmp_path)
    tracker.phase("tokenizer", 0)
    began = time.monotonic()
    for step in range(5000):
        tracker.scalars(step, {"loss": 1.0})
        tracker.images(step, "samples", picture(0))
    (feed,) = tracker._feeds
    waiting = feed._waiting.qsize()
    recording = time.monotonic() - began
    tracker.close("finished")

    assert waiting <= tracking._MAX_WAITING + tracking._MAX_PICTURES_WAITING
    assert recording < 1
    assert time.monotonic() - began < recording + 1
    assert f"{2 * 5000 + 2} or more records" in caplog.text  # with configuration and status


def test_recording_goes_on_when_the_store_comes_back(
    tmp_path: Path, mlflow: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.02)
    store = tmp_path / "store"
    store.write_text("in the way")
    with Tracker(only_mlflow(str(store))) as tracker:
        tracker.start(RUN, tmp_path / "run")
        tracker.phase("tokenizer", 0)
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        store.unlink()
        while not (tmp_path / "run/mlflow.json").exists() and time.monotonic() < deadline:
            tracker.scalars(1, {"loss": 1.0})
            time.sleep(0.05)
        tracker.scalars(2, {"loss": 2.0})

    client, run = the_run(mlflow, store)
    assert client.get_metric_history(run.info.run_id, "tokenizer/loss")[-1].step == 2
    assert run.info.status == "FINISHED"


def test_metrics_that_a_request_lost_are_sent_with_the_next(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracking, "_RETRY_S", 0.0)
    real, requests = mlflow.MlflowClient.log_batch, 0

    def fails_twice(self: Any, *arguments: Any, metrics: Any = (), **others: Any) -> None:
        nonlocal requests
        requests += bool(metrics)
        if metrics and requests <= 2:
            raise mlflow.MlflowException("gone")
        real(self, *arguments, metrics=metrics, **others)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fails_twice)
    with Tracker(only_mlflow("local")) as tracker:
        tracker.start(RUN, tmp_path)
        tracker.phase("tokenizer", 0)
        for step in (1, 2, 3):
            tracker.scalars(step, {"loss": 1.0})
            wait_until_written(tracker._feeds[0])

    client, run = the_run(mlflow, tmp_path / "mlflow")
    history = client.get_metric_history(run.info.run_id, "tokenizer/loss")
    assert [each.step for each in history] == [1, 2, 3]
    assert requests == 3
    assert "missing" not in caplog.text


def test_a_full_disk_stops_neither_the_run_nor_what_was_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.0)
    with Tracker(ONLY_TENSORBOARD) as tracker:
        tracker.start(RUN, tmp_path)
        tracker.phase("tokenizer", 0)
        tracker.scalars(1, {"loss": 1.0})
        (feed,) = tracker._feeds
        wait_until_written(feed)
        with largest_file(64):
            for step in range(2, 30):
                tracker.scalars(step, {"loss": 1.0})
            wait_until_written(feed)
        tracker.scalars(30, {"loss": 1.0})

    (warning,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "TensorBoard cannot record" in warning.getMessage()
    steps = [step for step, _ in losses(tmp_path / "tensorboard/tokenizer")]
    assert steps[0] == 1
    assert steps[-1] == 30
    assert len(steps) < 30


def wait_until_written(feed: Any) -> None:
    deadline = time.monotonic() + 10
    while feed._waiting.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # for the record that has left the queue


def test_only_the_main_process_records(tmp_path: Path) -> None:
    config = TrackingConfig(tensorboard=True, mlflow="local")
    with Tracker(config, is_main_process=False) as tracker:
        tracker.start(RUN, tmp_path)
        tracker.phase("tokenizer", 0)
        tracker.scalars(1, {"loss": 1.0})
        tracker.images(1, "samples", picture(0))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "config", "extra"),
    [
        ("tensorboard.compat.proto.event_pb2", ONLY_TENSORBOARD, "train"),
        ("mlflow", only_mlflow("local"), "mlflow"),
    ],
)
def test_a_package_that_was_asked_for_and_is_missing_is_named_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    config: TrackingConfig,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    before = dict(os.environ)
    with pytest.raises(MissingExtraError, match=rf"run: pip install .*\[{extra}\]"):
        Tracker(config).start(RUN, tmp_path)
    assert dict(os.environ) == before


def test_without_tensorboard_a_run_that_did_not_ask_for_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    record(TrackingConfig(), tmp_path, range(1, 3))
    assert "tensorboard is not installed" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_the_client_alone_cannot_open_is_refused_at_the_start(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        Tracker(only_mlflow("sqlite:///runs.db")).start(RUN, tmp_path)


def test_the_environment_is_left_as_it_was_and_the_users_settings_hold(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    before = dict(os.environ)
    with Tracker(only_mlflow("local")) as tracker:
        tracker.start(RUN, tmp_path)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert dict(os.environ) == before


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        TrackingConfig(mlflow="https://me:secret@example.org")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["ftp://example.org", "http://[", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="mlflow"):
        TrackingConfig(mlflow=address)


def test_the_configuration_survives_a_round_trip() -> None:
    config = TrackingConfig(tensorboard=True, mlflow="http://127.0.0.1:5000", run_name="mine")
    assert TrackingConfig.from_dict(config.to_dict()) == config
    assert TrackingConfig.from_dict({}) == TrackingConfig()
