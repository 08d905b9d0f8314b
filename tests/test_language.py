"""Texts are plain English for readers whose second language it is: these phrases stay away.

Each was in the texts once and made readers stumble: a clause without a noun ("that of what is not a
step"), clipped or inverted sentences, rare words. Next to each stands a plain alternative.
"""

import re
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Phrases as regular expressions, in lower case; they are found across lines, comments and the
# parts of a string.
PHRASES = {
    r"\b(is|are|was|be) not to be had\b": "is not available on this machine",
    r"\bthat of what\b": "name the thing: the time of work that is not a step",
    r"\bthose of what\b": "name the things",
    r"\bwhat is random\b": "random choices, or random numbers",
    r"\bof which all\b": "whose ... are all ...",
    r"\bof which none\b": "none of whose ...",
    r"\bwhat is not to be\b": "name the thing that must not be ...",
    r"\basked for by\b": "requested with; the kind of condition",
    r"\b(is|are|was|were) asked for,": "is requested, but",
    r"\b(it|this|file|that) is no (path|folder|text|token|list|number)\b": "is not a ...",
    r"\bis no regular file\b": "is not a regular file",
    r"\bdoes not load\b": "cannot be loaded",
    r"\bdo not load\b": "cannot be loaded",
    r"\bwhich is not here\b": "which this machine does not have",
    r"\bis here, but\b": "this machine has ..., but",
    r"\bwhatever lies\b": "whatever the folder contains",
    r"\bwhat lies (in|at|on|beside|below|there)\b": "the content of; what is at",
    r"\b(is|are) taken;": "using ...;",
    r"\btheir moving average lies\b": "their moving average is under",
    r"\bholds? no\b": "has no; contains no",
    r"\bmade anew\b": "made again; created",
    r"\b(loaded|begin|started|read) anew\b": "again",
    r"\bfrom here on\b": "from now on; is now",
    r"\bhalf characters?\b": "lone surrogates",
    r"\bholds? what no\b": "has characters that no file name can have",
    r"\bthe bare reason\b": "only the reason",
    r"\bplays? no part\b": "is not used",
    r"\bpass(es|ed|ing)? over\b": "skip",
    r"\bwithout a word\b": "without a warning; without an error",
    r"\bends? what else\b": "end other programs on the GPU",
    r"\bheeds?\b": "uses; has an effect with",
    r"\bhas not\b[,;.:]": "does not have",
    r"\bwhere there is none\b": "if there is none",
    r"\bwhere (one|it|they|both|there) (is|are) (given|none|some)\b": "if ... is given",
    r"\bgo(es)? on (from|with|there|where|as)\b": "continues from",
    r"\bunder way\b": "current; still running",
    r"\bat hand\b": "available",
    r"\bheld (to|against) (PyTorch|its|their|the|what|guidance)\b": "compared with",
    r"\bis told (by|once|where|when)\b": "is reported when; is known by",
    r"\btold (apart|where|when|once)\b": "distinguished; reported when",
    r"\bsays? of (itself|it|each|one)\b": "the description of",
    r"\bwhat (it|they|one) (is|are) called\b": "its name",
    r"\bspeaks? of\b": "reports; mentions",
    r"\bof no use\b": "useless",
    r"\bno more memory\b": "no memory left",
    r"\bgets? no more\b": "has no ... left",
    r"\bby the (first|last) that\b": "name the thing",
    r"\bstands? for the whole of\b": "represents the whole",
    r"\b(it|they|those) of before\b": "older ones",
    r"\bof before (it|that|torch|there)\b": "older than",
    r"\bone an? (line|object)\b": "one per line",
    r"\bhow (it|they) (goes|go) on\b": "how it continues",
}
_JOINT = re.compile(r'"\n\s*f?"')  # between the parts of a string
_BREAK = re.compile(r"\n[\s#>]*")
_OPTIONAL = re.compile(r"\([^)]*\)|\[[^]]*\]|\\.|.\?")


def _literal(phrase: str) -> str:
    """Return the longest part of a phrase that every match has: searching it takes no time."""
    return max(_OPTIONAL.split(phrase), key=len)


_COMPILED = [(_literal(phrase), re.compile(phrase), plain) for phrase, plain in PHRASES.items()]


def products() -> list[Path]:
    """Return the files that users and readers of the code read; links lead to files listed too."""
    folders = ("nsp", "export", "benchmarks", "examples", "deploy")
    paths = [ROOT / "cli.py", ROOT / "train.py", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    paths += [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    linked = {path for path in (ROOT / "nsp").iterdir() if path.is_symlink()}
    return sorted(p for p in paths if p not in linked and linked.isdisjoint(p.parents))


def stumbles(text: str) -> list[tuple[int, str, str]]:
    """Return the line of every phrase in a text, the phrase, and what to write instead."""
    joined = _BREAK.sub(" ", _JOINT.sub("", text.lower()))
    found = [
        (match, plain)
        for literal, pattern, plain in _COMPILED
        if literal in joined
        for match in pattern.finditer(joined)
    ]
    return sorted((_line(text, joined, match), match[0], plain) for match, plain in found)


def _line(text: str, joined: str, match: re.Match[str]) -> int:
    """Return the line of `text` in which a match in `joined` begins: as many letters in."""
    count = sum(map(str.isalnum, joined[: match.start()]))
    plain = _JOINT.sub(lambda joint: " " * len(joint[0]), text)
    letters = (place for place, letter in enumerate(plain) if letter.isalnum())
    return text.count("\n", 0, next(islice(letters, count, None))) + 1


def test_no_text_uses_a_phrase_that_readers_stumbled_over() -> None:
    paths = products()
    assert len(paths) > 200
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {plain}"
        for path in paths
        for line, phrase, plain in stumbles(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("device cuda is not to be had here", 1),
        ("a\nthe time of the block: that of\n    # what is not a step", 2),
        ('raise Error(\n    f"{module} does "\n    f"not load"\n)', 2),
        ('a = "split in wo"\nf"rds"\n\n# whatever lies\n# in a folder', 4),
        ("What is random about a sample is its own.", 1),
    ],
)
def test_a_phrase_is_found_across_lines_comments_and_strings(text: str, line: int) -> None:
    ((found, _, _),) = stumbles(text)
    assert found == line
