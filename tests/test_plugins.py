"""Families and backends of other packages: found by entry points, a broken one stops no other."""

import logging
import sys
from pathlib import Path

import pytest

from nsp.backends import available
from nsp.backends.available import BACKENDS, availability, backend_names, backend_record
from nsp.console.doctor import examine
from nsp.console.settings import sampling_options
from nsp.errors import ConfigError
from nsp.families.var import Var
from nsp.family import registry
from nsp.family.recipes import recipes
from nsp.plugins import Plugins

# The beginning of a family that is `var` under the name "mine".
SOUND = "from nsp.families.var import Var\nclass Thing(Var):\n    name = 'mine'\n"
TABLE = {"var": "nsp.families.var:Var"}
GROUP = "nsp.families"
BACKEND_GROUP = "nsp.backends"
# Plays the engines of ONNX Runtime, by a class of its own.
BACKEND = """
import dataclasses
from nsp.backends.available import BACKENDS, Availability
from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend

class Mine(OnnxRuntimeBackend):
    name = "mine"

def load(files, stages_io, *, kv_layout, device, num_threads=None):
    return Mine(files, stages_io, kv_layout=kv_layout, providers=[CPU], num_threads=num_threads)

RECORD = dataclasses.replace(
    BACKENDS["onnxruntime"], name="mine", loader="good_one:load", engines_of="onnxruntime",
    probe=lambda record: Availability(True, "runs engines like a toy", device="cpu"),
)
"""


def install(
    site: Path, package: str, entries: dict[str, str], code: str | None, group: str = GROUP
) -> None:
    """Lay an installed package: its record of entry points and, unless it was removed, its code."""
    record = site / f"{package}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (record / "entry_points.txt").write_text("\n".join(lines) + "\n")
    if code is not None:
        (site / f"{package}.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("good_one", "broken_one", "gone_one", "other_one"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_broken_or_removed_plugin_is_a_warning_and_stops_no_other(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "good_one", {"good": "good_one:Thing"}, "class Thing: pass\n")
    install(site, "broken_one", {"broken": "broken_one:Thing"}, "raise OSError('half written')\n")
    install(site, "gone_one", {"gone": "gone_one:Thing"}, None)
    plugins = Plugins(GROUP, TABLE)
    assert set(plugins.names()) == {"var", "good", "broken", "gone"}
    with caplog.at_level(logging.WARNING):
        assert plugins.load("broken") is None
        assert plugins.load("gone") is None
    first, second = caplog.messages
    assert "'broken' of package broken_one cannot be loaded" in first
    assert "OSError: half written" in first
    assert "'gone' of package gone_one cannot be loaded" in second
    assert plugins.load("good").__name__ == "Thing"  # type: ignore[attr-defined]
    assert plugins.load("never heard of") is None


def test_a_built_in_name_wins_and_of_two_others_the_first(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "broken_one", {"var": "broken_one:Thing"}, "raise OSError\n")
    install(site, "good_one", {"mine": "good_one:Thing"}, "class Thing: pass\n")
    install(site, "other_one", {"mine": "other_one:Thing"}, "class Thing: pass\n")
    plugins = Plugins(GROUP, TABLE)
    with caplog.at_level(logging.WARNING):
        assert plugins.names() == ["var", "mine"]
    assert any("'var' of package broken_one is left out" in each for each in caplog.messages)
    assert any(
        "'mine' of package" in each and "that of package" in each for each in caplog.messages
    )
    assert plugins.load("var") is Var


def test_a_plugin_that_cannot_be_used_is_one_warning_however_often_names_are_asked_for(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "good_one", {"mine": "good_one:Thing"}, "class Thing: pass\n")
    install(site, "broken_one", {"broken": "broken_one:Thing"}, "raise OSError('half written')\n")
    monkeypatch.setattr(registry, "_PLUGINS", Plugins(GROUP, TABLE))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert registry.family_names() == ["var"]
            with pytest.raises(ConfigError, match=r"unknown family 'broken'; known: var$"):
                registry.family("broken")
    assert len(caplog.messages) == 2
    assert {"'mine'", "'broken'"} == {each.split()[1].strip(":") for each in caplog.messages}
    assert all("left out" in each for each in caplog.messages)


def test_a_backend_of_another_package_is_named_listed_and_never_hides_one_of_ours(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {"mine": "good_one:RECORD", "torch": "good_one:RECORD"}
    install(site, "good_one", entries, BACKEND, BACKEND_GROUP)
    install(site, "broken_one", {"broken": "broken_one:RECORD"}, "raise OSError\n", BACKEND_GROUP)
    install(site, "other_one", {"odd": "other_one:RECORD"}, "RECORD = 3\n", BACKEND_GROUP)
    plugins = Plugins(BACKEND_GROUP, dict.fromkeys(BACKENDS, ""))
    monkeypatch.setattr(available, "_PLUGINS", plugins)
    with caplog.at_level(logging.WARNING):
        assert backend_names() == [*BACKENDS, "mine"]
        listed = {each["name"]: each["reason"] for each in examine()["backends"]}
    assert listed["mine"] == "runs engines like a toy"
    assert listed.keys() == {*BACKENDS, "mine"}
    assert backend_record("mine").built_for == "onnxruntime"
    assert backend_record("torch") is BACKENDS["torch"]
    assert [each.split(" is ")[0] for each in caplog.messages if "torch" in each] == [
        "nsp.backends 'torch' of package good_one"
    ]
    assert len(caplog.messages) == 3  # the clash, the broken one, the one that is no record
    reason = availability("nowhere").reason
    assert reason == f"unknown backend 'nowhere'; known: auto, {', '.join(BACKENDS)}, mine"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from nsp.family.contract import Family\nclass Thing(Family): pass\n", "cannot be used"),
        (f"{SOUND}    def __init__(self): raise RuntimeError('no')\n", "RuntimeError: no"),
        (f"{SOUND}    sampling = 3\n", "cannot be used"),
        ("from nsp.families.var import Var\nclass Thing(Var): pass\n", "calls itself 'var'"),
        ("class Thing: pass\n", "is not a subclass of nsp's Family"),
        ("from nsp.families.var import Var\nclass Thing(Var):\n    api = 99\n", "version 99"),
    ],
)
def test_what_is_no_family_of_this_contract_is_refused_by_name(
    site: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    install(site, "good_one", {"mine": "good_one:Thing"}, code)
    monkeypatch.setattr(registry, "_PLUGINS", Plugins(GROUP, TABLE))
    with pytest.raises(ConfigError, match=f"family 'mine'.*{words}"):
        registry.family("mine")
    with pytest.raises(ConfigError, match=r"unknown family 'other'; known: var$"):
        registry.family("other")


def test_a_plugin_that_ends_the_process_when_imported_is_one_warning(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "broken_one", {"broken": "broken_one:Thing"}, "import sys; sys.exit(3)\n")
    with caplog.at_level(logging.WARNING):
        assert Plugins(GROUP, TABLE).load("broken") is None
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("return {'smoke': print}", "recipe 'smoke' of family mine is left out"),
        ("raise OSError('no')", "family mine has no usable recipes"),
    ],
)
def test_recipes_of_a_plugin_take_no_others_place_and_stop_none(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: str,
    words: str,
) -> None:
    install(
        site,
        "good_one",
        {"mine": "good_one:Thing"},
        f"{SOUND}    @property\n    def recipes(self): {code}\n",
    )
    monkeypatch.setattr(registry, "_PLUGINS", Plugins(GROUP, registry.BUILT_IN))
    with caplog.at_level(logging.WARNING):
        assert recipes()["smoke"].family == "var"
    assert words in caplog.text
    registry.family.cache_clear()


def test_a_setting_called_like_an_option_of_the_verb_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        groups = sampling_options(["var"], {"top_k"})
    names = {option.name for options in groups.values() for option in options}
    assert "top_k" not in names
    assert "the setting top_k of family var is left out" in caplog.text
