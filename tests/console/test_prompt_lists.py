"""Lists of what to make are read as what they are, and what is wrong is named with its line."""

from pathlib import Path

import pytest

from nsp.console.prompt_lists import ListedImage, read_list
from nsp.errors import ConfigError


def prompts_of(path):
    return tuple(row.prompt for row in read_list(path))


def plain(rows):
    return [(row.prompt, row.class_id, row.seed) for row in rows]


def test_rows_without_a_prompt_or_class_are_for_models_without_condition(tmp_path):
    (tmp_path / "a.csv").write_text("ink,seed\n0.5,3\n,4\n")
    first, second = read_list(tmp_path / "a.csv", ("ink",), has_condition=False)
    assert (first.prompt, first.class_id, first.seed) == (None, None, 3)
    assert (first.settings, second.settings) == ({"ink": 0.5}, {})
    with pytest.raises(ConfigError, match="line 1: there is no column prompt"):
        read_list(tmp_path / "a.csv", ("ink",))


def test_columns_of_settings_are_read_where_the_model_has_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,guidance-scale,more_smooth,negative_prompt\ncat,2.5,true,dog\nowl,,,\n")
    first, second = read_list(path, ("guidance_scale", "more_smooth"))
    assert first.settings == {"guidance_scale": 2.5, "more_smooth": True}
    assert (first.negative, second.negative, second.settings) == ("dog", None, {})
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "cat", "top_k": 3}\n')
    assert read_list(path, ("top_k",))[0].settings == {"top_k": 3}


def test_prompts_files_may_have_a_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffred apple\r\n\r\n  café \r\n".encode())
    assert prompts_of(path) == ("red apple", "café")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"red apple\ngreen apple", ("red apple", "green apple")),
        ("one\u2028two\ncafé\tau lait\n".encode(), ("one\u2028two", "café\tau lait")),
        (b"red apple\r\n\r\ngreen apple\r\n", ("red apple", "green apple")),
    ],
)
def test_lines_of_a_prompts_file_end_in_line_feeds_only(content, prompts, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert prompts_of(path) == prompts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "contains no prompts"),
        (b"\xef\xbb\xbf", "contains no prompts"),
        (b"\n \n", "contains no prompts"),
        (b"\xff\xfea\x00", "line 1: not UTF-8"),
        (b"cat\ncaf\xe9\n", "line 2: not UTF-8"),
        (b"cat\nd\0g\n", r"line 2: control character U\+0000"),
        (b"cat\rdog\r", r"line 1: control character U\+000D"),
        (b"cat\n\n\x1b[31mred\n", r"line 3: control character U\+001B"),
        ("cat\u0085dog".encode(), r"line 1: control character U\+0085"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(content, words, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"prompts\.txt.*{words}"):
        read_list(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "class\n3\ngolden retriever\nTrue\n"),
        ("a.jsonl", '{"class": 3}\n{"class": " golden retriever "}\n{"class_id": "True"}\n'),
    ],
)
def test_a_class_is_a_number_or_a_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = [(row.class_id, row.class_name) for row in read_list(tmp_path / name)]
    assert found == [(3, None), (None, "golden retriever"), (None, "True")]


APPLE, CAT = ListedImage(prompt="red apple", seed=7), ListedImage(prompt="cat, asleep")


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", 'prompt,seed\nred apple,7\n"cat, asleep",\n', [APPLE, CAT]),
        (
            "a.csv",
            '\ufeff\n"seed",Caption\r\n7,red apple\r\n\r\n,"cat, asleep"\r\n',
            [APPLE, CAT],
        ),
        ("a.csv", "text;seed\nred apple;7\ncat, asleep;\n", [APPLE, CAT]),
        ("a.tsv", "prompt\tseed\nred apple\t7\ncat, asleep\t\n", [APPLE, CAT]),
        ("a.CSV", "prompt\nred apple\n", [ListedImage(prompt="red apple")]),
        ("a.csv", "class_id,seed\n3,\n0,1\n", [ListedImage(class_id=3), ListedImage(None, 0, 1)]),
        (
            "a.jsonl",
            '{"prompt": "red apple", "seed": 7}\n\n{"text": "cat, asleep", "seed": null}',
            [APPLE, CAT],
        ),
        (
            "a.ndjson",
            '{"class": 3}\r\n{"class_id": 4}\r\n',
            [ListedImage(None, 3), ListedImage(None, 4)],
        ),
        ("a.txt", "prompt\nred, seed\n{red} apple\n", None),
        ("a", '"quoted", he said\n[sic] a cat\n', None),
    ],
)
def test_a_list_is_read_as_what_it_is(tmp_path, name, content, rows):
    path = tmp_path / name
    path.write_text(content, newline="")
    if rows is None:  # plain lines
        rows = [ListedImage(prompt=line) for line in content.splitlines()]
    assert plain(read_list(path)) == plain(rows)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,guidance_scale\ncat,2\n", "line 1: column 'guidance_scale' is unknown"),
        ("a.csv", "a red apple\na cat\n", "line 1: column 'a red apple' is unknown"),
        ("a.csv", "prompt,text\na,b\n", "line 1: column 'text' repeats another"),
        ("a.csv", "class,prompt\n1,b\n", "line 1: column 'prompt' repeats another"),
        ("a.csv", "seed\n1\n", "line 1: there is no column prompt"),
        ("a.csv", "prompt,seed\ncat\n", "line 2: 1 cells, but the header has 2"),
        ("a.csv", "prompt,seed\na,1\n,2\n", "line 3: prompt is ''"),
        (
            "a.csv",
            "prompt,seed\n\ncat,one\n",
            "line 3: seed must be an integer of at least 0, not 'one'",
        ),
        ("a.csv", "prompt,seed\ncat,-1\n", "line 2: seed must be an integer of at least 0"),
        ("a.csv", f"prompt,seed\ncat,{2**63}\n", f"line 2: seed must be at most {2**63 - 1}"),
        ("a.csv", "class,seed\n1,2\n,2\n", "line 3: class is ''; write its number or its name"),
        ("a.csv", "class\n-1\n", "line 2: class must be an integer of at least 0, not -1"),
        ("a.jsonl", '{"class": -1}\n', "line 1: class must be an integer of at least 0, not -1"),
        ("a.csv", 'prompt\n"cat\nand dog"\n', "line 2: control character U\\+000A"),
        ("a.csv", 'prompt\n"cat" and dog\n', "line 2: a text follows a closing quote"),
        ("a.csv", "prompt\n" + "a" * 200_000, "line 2: a text of more than 131,072"),
        ("a.csv", b"prompt\ncaf\xe9\n", "line 2: not UTF-8"),
        (
            "a.csv",
            '{"prompt": "cat"}\n',
            "line 1: this is JSON, not a table; .* call the file .jsonl",
        ),
        ("a.csv", "", "contains no prompts"),
        ("a.csv", "prompt,seed\n", "contains no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not valid JSON"),
        ("a.jsonl", "prompt,seed\ncat,1\n", "line 1: not valid JSON"),
        ("a.jsonl", '"cat"\n', "line 1: 'cat' is not an object"),
        ("a.jsonl", '{"prompt": "a", "top_k": 3}\n', "line 1: column 'top_k' is unknown"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1: column 'prompt' repeats another"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: prompt is 3"),
        (
            "a.jsonl",
            '{"prompt": "a", "seed": true}\n',
            "line 1: seed must be an integer .*, not True",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "seed": 1.0}\n',
            "line 1: seed must be an integer .*, not 1.0",
        ),
        ("a.jsonl", '{"class": ' + "9" * 5000 + "}\n", "line 1: not valid JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1: control character U\\+D800"),
        ("a.jsonl", '{"prompt": "a"}\n{"class": 1}\n', "has prompts and classes"),
        ("a.txt", '{"prompt": "cat"}\n', "line 1: this is JSON, not a prompt; .* the file .jsonl"),
        ("a.json", '[\n{"prompt": "cat"}]\n', "line 1: this is JSON"),
        ("a.txt", "prompt,seed\ncat,1\n", "line 1: this is the header of a table"),
        ("a", "seed\tcaption\n1\tcat\n", "line 1: this is the header of a table"),
        ("a.txt", "prompt,seed,cfg\ncat,1,2\n", "line 1: this is the header of a table"),
        ("a.txt", "prompt|seed\ncat|1\n", "line 1: this is the header of a table"),
    ],
)
def test_what_cannot_be_drawn_of_a_list_is_named_with_its_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"{name}.*{words}"):
        read_list(path)


def test_a_list_without_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("nsp.console.prompt_lists._MAX_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_list(Path("/dev/zero"))
