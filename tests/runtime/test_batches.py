import pytest

from nsp.errors import ConfigError
from nsp.runtime.batches import cut_batches, plan_images, read_prompts


def test_the_kth_image_of_a_condition_has_seed_plus_k():
    planned = plan_images(prompts=["a", "b", "a"], seed=5, num_images=2)
    assert [(p.prompt, p.seed) for p in planned] == [
        ("a", 5),
        ("a", 6),
        ("b", 5),
        ("b", 6),
        ("a", 7),
        ("a", 8),
    ]
    assert [p.index for p in planned] == list(range(6))


def test_cutting_keeps_every_image_and_the_order():
    planned = plan_images(class_ids=range(7))
    batches = list(cut_batches(planned, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [image for batch in batches for image in batch] == planned


@pytest.mark.parametrize(
    ("prompts", "class_ids", "words"),
    [
        ((), (), "nothing to generate"),
        (("a",), (1,), "both"),
        (("a", " \t"), (), "prompt 2 is empty"),
    ],
)
def test_a_plan_needs_one_kind_of_condition(prompts, class_ids, words):
    with pytest.raises(ConfigError, match=words):
        plan_images(prompts=prompts, class_ids=class_ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 0}, "num_images is an integer of at least 1, not 0"),
        ({"num_images": 1.5}, "num_images"),
        ({"seed": None}, "seed=None"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed=18446744073709551616"),
        ({"prompts": "cat"}, "prompts is a list of texts"),
        ({"prompts": [None]}, "prompt 1 is None"),
        ({"prompts": (), "class_ids": [1.5]}, "list of integers"),
    ],
)
def test_a_plan_of_something_else_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        plan_images(**{"prompts": ["cat"], **options})


def test_no_batch_is_empty():
    with pytest.raises(ConfigError, match="batch_size"):
        cut_batches(plan_images(class_ids=[1]), 0)


def test_prompts_files_may_have_a_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffred apple\r\n\r\n  café \r\n".encode())
    assert read_prompts(path) == ("red apple", "café")


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
    assert read_prompts(path) == prompts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
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
        read_prompts(path)
