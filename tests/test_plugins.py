"""Families of other packages: found by entry points, and none that is broken stops another."""

import logging
import sys
from pathlib import Path

import pytest

from nsp.errors import ConfigError
from nsp.families.var import Var
from nsp.family import registry
from nsp.plugins import Plugins

TABLE = {"var": "nsp.families.var:Var"}
GROUP = "nsp.families"


def install(site: Path, package: str, entries: dict[str, str], code: str | None) -> None:
    """Lay an installed package: its record of entry points and, unless it was removed, its code."""
    record = site / f"{package}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
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


@pytest.mark.parametrize(
    ("code", "words"),
    [
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
    with pytest.raises(ConfigError, match="unknown family 'other'; known: var, mine"):
        registry.family("other")
