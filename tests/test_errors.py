import pytest

from nsp.errors import ConfigError, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("caf\udce9.png", "caf\\xe9.png"),
        ("half \ud83d", "half \\ud83d"),
        ("a\u2028b\x85c", "a\\u2028b\\x85c"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        ("Café, 猫, 👩🏽‍🚒", "Café, 猫, 👩🏽‍🚒"),
    ],
)
def test_what_would_break_a_line_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert one_line(text) == shown
    assert str(ConfigError(text)) == shown
    shown.encode()


def test_a_long_name_loses_its_middle_and_the_advice_stays() -> None:
    line = str(ConfigError(f"{'x' * 100_000}.png cannot be read; run: nsp doctor"))
    assert len(line) < 400
    assert line.endswith("x.png cannot be read; run: nsp doctor")


def test_a_long_message_keeps_its_head_and_its_end() -> None:
    line = str(ConfigError("the folder " + "word " * 10_000 + "run: nsp doctor"))
    assert len(line) <= 3000
    assert line.startswith("the folder word")
    assert line.endswith("word run: nsp doctor")
