"""--set changes one value of a run, typed by its place; what does not exist is refused."""

import json
from pathlib import Path

import pytest

from nsp.errors import ConfigError
from nsp.family.recipe import Epochs, RunConfig
from nsp.family.recipe_schema import run_schema
from nsp.family.recipes import preset
from nsp.family.run_values import with_texts

SCHEMA = Path(__file__).parents[2] / "docs" / "run.schema.json"


def test_places_are_phases_or_fields_and_values_have_their_types() -> None:
    texts = (
        *("predictor.optimizer.lr=1e-3", "predictor.optimizer.betas=0.8,0.99", "seed=3"),
        *("tokenizer.epochs=2", "phases.predictor.steps=9", "phases.*.batch_size=4"),
        *("model.vae.dropout=0.5", "sampling.top_k=7", "tracking.run_name=12", "data.flip=yes"),
        *("predictor.lora.targets=mat_qkv,fc1", "predictor.lora.rank=2", "data.validation=none"),
        *('tokenizer.checkpoint_every={"epochs": 1}', "predictor.objective.label_smoothing=0.1"),
    )
    run = with_texts(preset("smoke"), texts)
    tokenizer, predictor = run.phases
    assert (predictor.optimizer.lr, predictor.optimizer.betas) == (1e-3, (0.8, 0.99))
    assert (tokenizer.steps, predictor.steps) == (Epochs(epochs=2), 9)
    assert tokenizer.checkpoint_every == Epochs(epochs=1)
    assert tokenizer.batch_size == predictor.batch_size == 4
    assert predictor.lora is not None
    assert (predictor.lora.rank, predictor.lora.targets) == (2, ("mat_qkv", "fc1"))
    assert (run.model["vae"]["dropout"], run.sampling["top_k"]) == (0.5, 7)
    assert (run.tracking.run_name, run.data.flip, run.seed) == ("12", True, 3)
    assert predictor.objective == {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("predicter.steps=3", "'predicter' is unknown, nearest is predictor"),
        ("predictor.optimizer.learning=3", "'learning' is unknown"),
        ("predictor.optimiser.lr=3", "'optimiser' is unknown, nearest is optimizer"),
        ("model.vae.droput=0.1", "'droput' is unknown, nearest is dropout"),
        ("phases.nine.steps=3", "'nine' is unknown"),
        ("predictor=3", "'predictor' is unknown"),
        ("seed.first=3", "seed is one value"),
        ("seed", "write it as PLACE=VALUE"),
        ("predictor.optimizer.lr=fast", "'fast' is not allowed; expected a number"),
        ("predictor.optimizer.lr=-1", "lr must be a finite number above 0"),
        ("seed=1.5", "1.5 is not allowed; expected an integer"),
        ("model.vae.dropout=2", "dropout must be a number from 0 to 1"),
        ("sampling.top_p=7", "top_p"),
        ("precision=fp15", "expected one of auto, fp32, bf16, fp16"),
    ],
)
def test_wrong_names_and_values_are_refused_with_what_is_right(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_texts(preset("smoke"), [text])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_phase_is_so_many_steps_or_epochs_and_epochs_are_counted_once() -> None:
    values = preset("smoke").to_dict()
    values["phases"][0] |= {"epochs": 3, "validate_every": {"epochs": 2}}
    with pytest.raises(ConfigError, match="steps and epochs are both given; choose one"):
        RunConfig.from_dict(values)
    del values["phases"][0]["steps"]
    run = RunConfig.from_dict(values)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    phase = run.in_steps(20).phases[0]  # of 8 pictures each: the rest of an epoch is left out
    assert (phase.steps, phase.validate_every, phase.checkpoint_every) == (6, 4, 2)
    with pytest.raises(ConfigError, match="a stream has no epochs; give --steps"):
        run.in_steps(None)
    assert preset("smoke").in_steps(None) == preset("smoke")


def test_the_schema_in_the_docs_is_that_of_the_records() -> None:
    """Made by: nsp train --json-schema > docs/run.schema.json."""
    assert json.loads(SCHEMA.read_text()) == run_schema()
    phase = run_schema()["$defs"]["PhaseConfig"]
    run = preset("smoke").to_dict()
    assert set(run) == set(run_schema()["properties"])
    assert set(run["phases"][0]) | {"epochs"} == set(phase["properties"])
