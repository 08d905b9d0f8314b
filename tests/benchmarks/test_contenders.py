import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.manifest import read_manifest
from nsp.benchmarks.contest import names
from nsp.benchmarks.contest.contenders import CONTENDERS, ENGINES, Contender, Source, gate_words
from nsp.benchmarks.contest.field import asked_for, default_names, make_ready, other_precisions
from nsp.benchmarks.contest.subject import Side, Subject
from nsp.benchmarks.contest.sweep import sweep, sweep_scenarios
from nsp.benchmarks.options import BenchOptions
from nsp.benchmarks.peers.plain_onnx import PlainOnnxBackend, export_plain
from nsp.benchmarks.peers.process import peer_runner
from nsp.cli import main
from nsp.errors import BackendError, ConfigError
from nsp.families.var.peers import PUBLIC_VAR
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.stage.backend import Backend
from tests.artifacts.engine_folders import change_manifest, write_engines
from tests.export.small import new_small_checkpoint


def made(wanted: list[str], subject: Subject) -> list[Any]:
    asked = [asked_for(name, subject, 1) for name in wanted]
    return list(make_ready(asked, subject, batches=(1,), seed=0, on_start=lambda name: None))


def with_contender(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    record = Contender(name="new", what="a contender", load=load)
    monkeypatch.setattr("nsp.benchmarks.contest.field.CONTENDERS", {**CONTENDERS, "new": record})
    monkeypatch.setattr(
        "nsp.benchmarks.contest.contenders.CONTENDERS", {**CONTENDERS, "new": record}
    )


class PlainStep(PlainOnnxBackend):
    """The plain export of the step alone, which takes seconds; PyTorch for the rest."""

    rest: Backend

    def run(self, stage: str, feeds: Any, outputs: Any = None) -> dict[str, Any]:
        if stage == "step":
            return super().run(stage, feeds, outputs)
        results = self.rest.run(stage, {n: self.rest.upload(a) for n, a in feeds.items()})
        return {name: self.rest.download(array) for name, array in results.items()}


def test_the_plain_export_is_the_same_model_with_its_cache_joined(tmp_path: Path) -> None:
    folder = new_small_checkpoint(tmp_path / "checkpoint", num_classes=4)
    reference = load_pipeline(folder, "torch", device="cpu")
    family, system = reference.family, read_checkpoint(folder).load()
    stages_io = family.stages_io(system.config, kv_layout="present", dtype="float32")
    files = export_plain(family, system, {"step": stages_io["step"]}, tmp_path)
    backend = PlainStep(files, stages_io, num_threads=1)
    backend.rest = reference.backend
    pipeline = Pipeline(family, reference.config, backend)
    request: dict[str, Any] = {"class_ids": [1, 3], "seed": 5, "trace": True}
    found, expected = (p.generate(**request).trace for p in (pipeline, reference))
    assert found is not None
    assert expected is not None
    for ours, theirs in zip(found.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(found.image, expected.image, atol=1e-4)


def test_a_contender_that_cannot_be_made_is_said_with_its_reason(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Source) -> Pipeline:
        raise KeyError("no compiler here")

    with_contender(monkeypatch, fail)
    (ready,) = made(["new"], subject)
    assert ready.runner is None
    assert ready.entry.missing == "'no compiler here'"
    alone = dataclasses.replace(subject, baseline=None, baseline_missing="torch is not installed")
    (ready,) = made(["new"], alone)
    assert ready.runner is None
    assert "torch is not installed" in (ready.entry.missing or "")


def test_a_contender_of_other_devices_says_so(subject: Subject, tmp_path: Path) -> None:
    (ready,) = made(["onnxruntime graphs"], subject)
    assert ready.entry.missing == "it is timed only on a GPU, but the engines run on cpu"
    alone = engines_subject(tmp_path, ("fp32", "int8"))
    assert default_names(alone) == ("int8",)
    found = default_names(dataclasses.replace(alone, baseline=subject.baseline))
    assert found == ("torch.compile", "plain-onnx", "int8")


def test_a_contender_that_works_takes_part_under_its_name(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_contender(monkeypatch, lambda source: subject.contender.pipeline)
    (ready,) = made(["new"], subject)
    assert ready.entry.missing is None
    assert (ready.entry.prepare_s or 0) > 0
    observed = ready.runner.observe({**subject.conditions(1), "seed": 0}, number=0, place=2)
    assert observed.contender == "new"
    assert "step" in observed.stage_ms


def test_a_contender_that_records_its_loop_is_timed_whole_and_by_its_steps(
    subject: Subject,
) -> None:
    (ready,) = made(["torch graphs"], subject)
    assert ready.entry.missing is None
    observed = ready.runner.observe(subject.request(1, 0), number=0, place=0)
    assert observed.stage_ms == {}
    assert (observed.loop_ms or 0) > 0
    assert Source.from_dict(ready.source.to_dict()) == ready.source  # a fresh process loads it


def test_unknown_contenders_and_clones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown; known: torch eager"):
        BenchOptions(engine_dir=tmp_path, output_dir=tmp_path, contenders=("numpy",))
    with pytest.raises(ConfigError, match="'int8' is given twice"):
        BenchOptions(engine_dir=tmp_path, output_dir=tmp_path, contenders=("int8", "int8"))
    with pytest.raises(ConfigError, match=r"has no models/var\.py; clone"):
        PUBLIC_VAR.check(tmp_path)


def test_the_command_line_offers_every_contender_by_both_spellings() -> None:
    (option,) = [each for each in main.commands["bench"].params if each.name == "contenders"]
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == set(names.NAMES)
    assert {*names.OTHERS, ENGINES} == {*CONTENDERS}
    assert {"--contender", "--rival"} <= {*option.opts}
    (peer,) = [each for each in main.commands["bench"].params if each.name == "peer"]
    assert {"--peer", "--peer-var"} <= {*peer.opts}


def clone(folder: Path, *, works: bool = True) -> Path:
    """Write a stand-in with the names and signatures of the public code."""
    models = folder / "models"
    models.mkdir(parents=True)
    (models / "vqvae.py").write_text(
        textwrap.dedent("""
        import torch
        class VQVAE(torch.nn.Module):
            def __init__(self, vocab_size, z_channels, ch, test_mode, share_quant_resi,
                         v_patch_nums):
                super().__init__()
                self.side = v_patch_nums[-1]
            def fhat_to_img(self, latent):
                return latent.new_zeros(len(latent), 3, 16 * self.side, 16 * self.side)
        """)
    )
    failure = "" if works else "raise ImportError('no module named flash')"
    (models / "var.py").write_text(
        textwrap.dedent(f"""
        import torch
        {failure}
        class VAR(torch.nn.Module):
            def __init__(self, vae_local, num_classes, depth, embed_dim, num_heads, mlp_ratio,
                         shared_aln, attn_l2_norm, patch_nums):
                super().__init__()
                print("constructed, loudly")
                assert isinstance(patch_nums, tuple)
                self.vae = vae_local
                self.weight = torch.nn.Parameter(torch.zeros(depth, embed_dim))
            def autoregressive_infer_cfg(self, B, label_B, g_seed, cfg, top_k, top_p):
                assert label_B.shape == (B,)
                return self.vae.fhat_to_img(torch.zeros(B, 4, 2, 2))
        """)
    )
    return folder


def test_the_peer_is_timed_in_a_process_of_its_own(reference: Pipeline, tmp_path: Path) -> None:
    folder = clone(tmp_path / "VAR")
    assert PUBLIC_VAR.is_clone(folder)
    with peer_runner(PUBLIC_VAR, folder, reference, threads=1) as peer:
        assert "class-conditional" in peer.what
        found = peer.observe({"prompts": ["a", "b"], "seed": 3}, number=4, place=2)
        assert (found.contender, found.round, found.place) == (PUBLIC_VAR.name, 4, 2)
        assert found.stage_ms == {}
        assert 0 < (found.loop_ms or 0) < found.wall_ms
        process = peer.process.process
    assert process.poll() is not None  # it ends with the block


def test_a_peer_that_does_not_run_here_is_one_line(reference: Pipeline, tmp_path: Path) -> None:
    folder = clone(tmp_path / "VAR", works=False)
    with (
        pytest.raises(BackendError, match="ImportError: no module named flash"),
        peer_runner(PUBLIC_VAR, folder, reference, threads=1),
    ):
        pass


def test_a_sweep_times_every_pair_of_threads_and_batch(subject: Subject) -> None:
    scenarios = sweep_scenarios(cores=2, max_batch=2)
    assert [(s.threads, s.batch) for s in scenarios] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    loaded: list[int] = []

    def load(threads: int) -> Subject:
        loaded.append(threads)
        return subject

    points = list(
        sweep(
            load,
            scenarios,
            rounds=1,
            warmup=0,
            seed=0,
            seconds_per_batch=60,
            on_start=lambda *_: None,
        )
    )
    assert loaded == [1, 2]  # once for each number
    assert [point.scenario for point in points] == list(scenarios)
    assert all(len(point.times(side)) == 1 for point in points for side in ("engines", "torch"))


def engines_subject(folder: Path, precisions: tuple[Any, ...], **changes: Any) -> Subject:
    """A folder of engines that load, as a benchmark's contender, without a baseline."""
    write_engines(folder, precisions=precisions, **changes)
    options = {"num_threads": 1, "precision": None}
    pipeline = load_pipeline(folder, "onnxruntime", device="cpu", num_threads=1)
    source = Source(label="onnxruntime", path=folder, backend="onnxruntime", options=options)
    return Subject(
        contender=Side(source=source, pipeline=pipeline),
        baseline=None,
        baseline_missing="not asked for",
        weights_mib={"onnxruntime": 1.0},
    )


def test_every_other_precision_of_the_folder_is_a_contender(tmp_path: Path) -> None:
    both = engines_subject(tmp_path / "both", ("fp32", "int8"))
    assert both.contender.pipeline.precision == "fp32"
    assert other_precisions(both) == ("int8",)
    assert other_precisions(engines_subject(tmp_path / "one", ("fp32",))) == ()


def test_a_precision_that_not_all_stages_have_is_none(tmp_path: Path) -> None:
    subject = engines_subject(tmp_path, ("fp32", "fp16"))
    assert other_precisions(subject) == ("fp16",)
    stages = read_manifest(tmp_path).stages
    change_manifest(tmp_path, stages={**stages, "step": stages["step"][:1]})
    assert other_precisions(subject) == ()


def test_a_precision_the_folder_lacks_is_said_with_the_command_that_adds_it(tmp_path: Path) -> None:
    subject = engines_subject(tmp_path / "engines", ("fp32",))
    lacking, same = made(["int8", "fp32"], subject)
    assert lacking.runner is None
    assert lacking.entry.name == "onnxruntime int8"
    assert "has no int8 engines" in lacking.entry.missing
    assert re.search(r"run: nsp export .*--fp32 --int8", lacking.entry.missing)
    assert "are already fp32" in same.entry.missing


def test_a_precision_says_what_it_costs_as_its_export_measured_it(tmp_path: Path) -> None:
    parity = {
        "outputs": {"logits": {"relative": 0.0234}},
        "units": [{"tokens": 10, "agreement": 1.0}, {"tokens": 90, "agreement": 0.9}],
    }
    manifest = write_engines(tmp_path, precisions=("fp32", "int8"), parity=parity)
    words = gate_words(manifest, "onnxruntime", "int8")
    assert "off by at most 2.3 % of their range" in words
    assert "91 % of 100 sampled tokens were PyTorch's (90 % in the worst part)" in words
    assert gate_words(manifest, "onnxruntime", "bf16") == ""
