"""Few calls are kept of long loops, and they still catch what all calls would."""

from dataclasses import replace

import numpy as np
import pytest

from nsp.export.proof.forced import repeat
from nsp.export.proof.kept import kept
from nsp.export.proof.recorded import Call, Recording
from nsp.stage.arena import HostArrays, KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import Axes, StageIO

KV = KVShape(num_layers=1, num_tokens=40, rows=1, num_heads=1, head_width=2, dtype="float32")


class Host(Backend):
    """Stages as NumPy functions of their feeds; new keys and values are written where asked."""

    name = "host"

    def __init__(self, stages, kv_layout: str = "delta") -> None:
        super().__init__({})
        self.kv_layout, self._stages, self.num_runs = kv_layout, stages, 0

    def run(self, stage, feeds, outputs=None):
        self.num_runs += 1
        results = self._stages[stage](feeds)
        for name, place in (outputs or {}).items():
            place[...] = results[name]
        return results

    upload = download = staticmethod(np.array)

    def allocate(self, shape, dtype):
        return np.zeros(shape, dtype)

    copy_rows = HostArrays.copy_rows


def one(value: float) -> np.ndarray:
    return np.full((1, 1, 1, 2), value, np.float32)


def raster(num_steps: int, stages: tuple[str, ...], *, shared: bool) -> Recording:
    """Return a loop of one-token steps: y is x plus the sum of all keys before."""
    calls = []
    for step in range(num_steps):
        x = np.array([float(step)], np.float32)
        y = x + 2 * sum(range(step))
        new = {"new_k_0": one(step), "new_v_0": one(-step)} if shared else {}
        stage = stages[step % len(stages)]
        calls.append(Call(stage, step, {"x": x}, {"y": y, **new}, num_new=1, rows=1))
        calls.append(Call("draw", step, {"y": y}, {"token": y.astype(np.int64)}))
    return Recording(tuple(calls), KV, "tokens", num_steps)


def step_stage(layout: str, wrong_from: int = 1000):
    """Return the stage of `raster`; from one step on it forgets what is cached."""

    def run(feeds):
        past = feeds["past_k_0"]
        length = past.shape[0] if layout == "delta" else past.shape[2]
        total = past.sum() if length < wrong_from else 0
        new = np.full((1, 1, 1, 2), feeds["x"][0], np.float32)
        if layout == "present":
            return {
                "y": feeds["x"] + total,
                "new_k_0": np.concatenate([past, new], 2),
                "new_v_0": np.concatenate([feeds["past_v_0"], -new], 2),
            }
        if layout == "in_place":
            both = {"new_k_0": past.copy(), "new_v_0": feeds["past_v_0"].copy()}
            for sign, whole in zip((1, -1), both.values(), strict=True):
                whole[:, :, int(feeds["x"][0])] = sign * new[0]  # x counts what is cached
            return {"y": feeds["x"] + total, **both}
        return {"y": feeds["x"] + total, "new_k_0": new, "new_v_0": -new}

    return run


def io(layout: str) -> StageIO:
    whole = f"1 1 {KV.num_tokens} 2"
    past = {"delta": "P 1 1 2", "present": "1 1 P 2", "in_place": whole}[layout]
    new = {"delta": "1 1 1 2", "present": "1 1 P+1 2", "in_place": whole}[layout]
    return StageIO(
        inputs={"x": Axes("1"), "past_k_0": Axes(past), "past_v_0": Axes(past)},
        outputs={"y": Axes("1"), "new_k_0": Axes(new), "new_v_0": Axes(new)},
    )


@pytest.mark.parametrize("layout", ["delta", "present", "in_place"])
@pytest.mark.parametrize("shared", [False, True])
def test_of_many_equal_calls_the_first_and_the_last_find_their_whole_past(layout, shared):
    stages = ("even", "odd") if shared else ("even",)
    (found,) = kept([raster(32, stages, shared=shared)])
    for stage in stages:
        backend = Host({stage: step_stage(layout)}, layout)
        compared = list(repeat(stage, io(layout), backend, found))
        assert len(compared) == 2
        assert backend.num_runs == (2 if shared else 32)  # its own cache takes all of them
        for each in compared:
            for name, expected in each.call.outputs.items():
                np.testing.assert_array_equal(each.found[name], expected)


@pytest.mark.parametrize("shared", [False, True])
def test_a_stage_that_forgets_its_past_late_is_caught_by_the_last_call(shared):
    stages = ("even", "odd") if shared else ("even",)
    (found,) = kept([raster(32, stages, shared=shared)])
    backend = Host({"even": step_stage("delta", wrong_from=20)})
    first, last = repeat("even", io("delta"), backend, found)
    np.testing.assert_array_equal(first.found["y"], first.call.outputs["y"])
    assert not np.array_equal(last.found["y"], last.call.outputs["y"])


def test_a_loop_of_a_thousand_steps_keeps_as_many_calls_as_one_of_ten():
    def compared(num_steps: int) -> int:
        recording = Recording(
            tuple(c for c in raster(num_steps, ("s",), shared=False).calls if c.stage == "draw"),
            None,
            "tokens",
            num_steps,
        )
        (found,) = kept([recording])
        return len(found.calls)

    assert compared(1000) == compared(10) == 2


def test_each_size_is_kept_and_the_largest_go_first_where_room_is_short():
    sizes = (10, 20, 5000, 40)
    calls = tuple(
        Call("s", step, {"x": np.full(size, step, np.float32)}, {"y": np.zeros(1, np.float32)})
        for step, size in enumerate(sizes)
    )
    recording = Recording(calls, None, "scale", len(sizes))
    (whole,), (small,) = kept([recording]), kept([recording], most_bytes=1000)
    assert [call.step for call in whole.calls] == [0, 1, 2, 3]
    assert [call.step for call in small.calls] == [0, 1, 3]
    (least,) = kept([recording], most_bytes=1)
    assert len(least.calls) == 1  # of every stage at least one


def test_a_stage_is_compared_in_the_first_recording_that_calls_it():
    def call(stage: str) -> Call:
        return Call(stage, 0, {}, {"y": np.zeros(2)})

    first = Recording((call("a"),), None, "scale", 1)
    second = replace(first, calls=(call("a"), call("b")))
    found = kept([first, second])
    assert [[call.stage for call in each.calls] for each in found] == [["a"], ["b"]]
