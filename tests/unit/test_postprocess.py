"""Postprocessing against torch, SciPy and plain loops."""

import itertools
import tomllib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_runtime.errors import InputError, UsageError
from edgekit_runtime.postprocess import Postprocess

RNG = np.random.default_rng(1)
few = settings(deadline=None, max_examples=100)
LABELS = ["cat", "dog", "owl"]


def answer(steps: Any, labels: Any = None, **outputs: np.ndarray) -> dict[str, Any]:
    return Postprocess(steps, list(outputs), labels)(outputs)


def one(op: str, y: Any, names: Any = None, **options: Any) -> Any:
    """What one step makes of the only output."""
    return answer([{"op": op, **options}], names, y=np.asarray(y))["y"]


def refused(call: Callable[[], object], says: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is written wrong ------------------------------------------------------------------------

# the steps as in TOML, for a model with the outputs a and b, and what the message says
MISTAKES = """
{op = "crop"} -> step 1 has the unknown op 'crop'; known ops: softmax, sigmoid, dequantize, top-k
{on = "a"} -> step 1 has the unknown op None
{op = "softmax"} -> step 1 (softmax) has no on, and the outputs are a, b
{op = "softmax", on = "c"} -> step 1 (softmax) reads 'c'; by then there is a, b
{op = "softmax", on = 3} -> step 1 (softmax) reads 3; by then there is a, b
{op = "softmax", on = "a", as = ""} -> step 1 (softmax) has as = '': no name
{op = "softmax", on = "a", as = 1} -> step 1 (softmax) has as = 1: no name
{op = "softmax", on = "a", as = "b"} -> step 1 (softmax) has as = 'b', which is taken
{op = "softmax", on = "a", axis = "x"} -> has axis = 'x'; wanted an integer, -8 to 7
{op = "softmax", on = "a", dim = 1} -> has the unknown option 'dim'; known: axis, on, as
{op = "sigmoid", on = "a", axis = 1} -> has the unknown option 'axis'; known: on, as
{op = "dequantize", on = "a"} -> has no scale; wanted a finite number, or a list of them
{op = "dequantize", on = "a", scale = 0} -> has scale = 0; wanted numbers above 0
{op = "dequantize", on = "a", scale = [1, 2]} -> has a list; it also needs axis
{op = "dequantize", on = "a", scale = 1, zero_point = [1, 2]} -> has a list; it also needs axis
{op = "dequantize", on = "a", scale = 1, zero_point = 0.5} -> zero_point = 0.5; wanted an integer
{op = "dequantize", on = "a", scale = [1], zero_point = [1, "x"]} -> wanted an integer, or a list
{op = "dequantize", on = "a", scale = 1, axis = true} -> has axis = True; wanted an integer
{op = "top-k", on = "a"} -> step 1 (top-k) has no k; wanted an integer, 1 to
{op = "top-k", on = "a", k = 0} -> has k = 0; wanted an integer, 1 to
{op = "top-k", on = "a", k = 1, labels = ["x", 3]} -> has labels = ['x', 3]; wanted a list of strings
{op = "top-k", on = "a", k = 1, labels = []} -> has labels = []; wanted a list of strings
{op = "threshold", on = "a", at = "half"} -> has at = 'half'; wanted a finite number
{op = "threshold", on = "a", labels = true} -> has labels = true, and the bundle has no labels
{op = "threshold", on = "a", labels = ["x"]} -> has labels = ['x']; wanted true or false
{op = "argmax", on = "a", axis = 8} -> has axis = 8; wanted an integer, -8 to 7
{op = "ctc-greedy", on = "a"} -> needs labels, and the bundle has none
{op = "ctc-greedy", on = "a", labels = ["x"], blank = 1} -> has blank = 1; wanted one of 0, -1
{op = "nms", boxes = "a"} -> step 1 (nms) has no scores; wanted a name
{op = "nms", scores = "a"} -> step 1 (nms) has no boxes; wanted a name
{op = "nms", boxes = "a", scores = 1} -> has scores = 1; wanted a name
{op = "nms", boxes = "a", scores = "c"} -> step 1 (nms) reads 'c'; by then there is a, b
{op = "nms", boxes = "a", scores = "b", on = "a"} -> has on; it reads what boxes and scores name
{op = "nms", boxes = "a", scores = "b", iou = 2} -> has iou = 2; wanted 0 to 1
{op = "nms", boxes = "a", scores = "b", score = nan} -> has score = nan; wanted a finite number
{op = "nms", boxes = "a", scores = "b", top = 0} -> has top = 0; wanted an integer, 1 to
{op = "nms", boxes = "a", scores = "b", format = "yolo"} -> wanted one of xyxy, yxyx, cxcywh, xywh
{op = "top-k", on = "a", k = 1}, {op = "softmax", on = "a"} -> step 2 (softmax) reads 'a'; by then there is b
{op = "nms", boxes = "a", scores = "b"}, {op = "argmax", on = "detections"} -> reads 'detections'
{op = "argmax", on = "a", as = "i"}, {op = "argmax", on = "b", as = "i"} -> as = 'i', which is taken
"""  # noqa: E501


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_is_named(line: str) -> None:
    written, says = line.split(" -> ")
    steps = tomllib.loads(f"steps = [{written}]")["steps"]
    refused(lambda: Postprocess(steps, ["a", "b"], None), says, UsageError)


def test_other_mistakes() -> None:
    refused(lambda: Postprocess("top-k", ["a"], None), "wanted a list", UsageError)  # type: ignore[arg-type]
    refused(lambda: Postprocess(["top-k"], ["a"], None), "step 1 is no table", UsageError)  # type: ignore[list-item]
    refused(lambda: Postprocess([{"op": "softmax"}], [], None), "the outputs are none", UsageError)


X23 = np.zeros((2, 3), np.float32)
BOX = np.zeros((5, 4), np.float32)


@pytest.mark.parametrize(
    ("step", "y", "says"),
    [
        ({"op": "softmax"}, X23.astype(np.int8), "got int8; wanted floats: put dequantize before"),
        ({"op": "softmax", "axis": 2}, X23, "has axis = 2, got the shape [2, 3]"),
        ({"op": "softmax"}, X23[:, :0], "failed: zero-size array"),
        ({"op": "sigmoid"}, X23.astype(bool), "got bool; wanted floats"),
        ({"op": "dequantize", "scale": 1}, X23, "got float32; wanted integers"),
        ({"op": "dequantize", "scale": [1, 2], "axis": 1}, X23.astype(int), "has a list of 2, got"),
        ({"op": "top-k", "k": 4}, X23, "has k = 4; there are 3 classes"),
        (
            {"op": "top-k", "k": 1},
            np.array(1.0),
            "got the shape []; wanted (classes,) or (N, classes)",
        ),
        ({"op": "top-k", "k": 1}, X23[None], "got the shape [1, 2, 3]"),
        ({"op": "top-k", "k": 1}, X23 * np.nan, "got NaN: the model failed on this sample"),
        ({"op": "top-k", "k": 1}, np.array(["a"]), "got <U1; wanted numbers"),
        ({"op": "top-k", "k": 1, "labels": ["x", "y"]}, X23, "has 2 labels for 3 classes"),
        ({"op": "top-k", "k": 1, "labels": list("wxyz")}, X23, "has 4 labels for 3 classes"),
        ({"op": "threshold"}, X23.astype(np.uint8), "got uint8; wanted floats"),
        ({"op": "threshold"}, X23 * np.nan, "got NaN"),
        ({"op": "threshold", "labels": True}, X23[:, :2], "has 3 labels for 2 classes"),
        ({"op": "threshold", "labels": True}, X23[None], "got the shape [1, 2, 3]"),
        ({"op": "argmax", "axis": -3}, X23, "has axis = -3, got the shape [2, 3]"),
        ({"op": "argmax"}, X23 * np.nan, "got NaN"),
        ({"op": "argmax"}, X23[:, :0], "failed: attempt to get argmax of an empty sequence"),
        ({"op": "ctc-greedy"}, X23[0], "got the shape [3]; wanted (T, C) or (N, T, C)"),
        ({"op": "ctc-greedy"}, X23[:, :2], "has 3 labels for 2 classes"),
        ({"op": "ctc-greedy"}, np.zeros((2, 4)), "has 3 labels for 4 classes"),
        ({"op": "ctc-greedy", "blank": -1}, np.zeros((2, 5)), "has 3 labels for 5 classes"),
        ({"op": "ctc-greedy"}, X23 * np.nan, "got NaN"),
    ],
)
def test_an_output_that_does_not_fit_is_named(step: Any, y: np.ndarray, says: str) -> None:
    post = Postprocess([step], ["y"], None if step["op"] == "top-k" else LABELS)
    refused(lambda: post({"y": y}), f"step 1 ({step['op']}) ", InputError)
    refused(lambda: post({"y": y}), says, InputError)


@pytest.mark.parametrize(
    ("boxes", "scores", "says"),
    [
        (BOX[0], X23, "got boxes [4]; wanted (M, 4) or (N, M, 4)"),
        (BOX[:, :3], X23, "got boxes [5, 3]"),
        (BOX, X23, "got boxes [5, 4] with scores [2, 3]"),
        (BOX, np.zeros((1, 5, 3)), "got boxes [5, 4] with scores [1, 5, 3]"),
        (BOX[None], np.zeros(5), "got boxes [1, 5, 4] with scores [5]"),
        (BOX, np.zeros((5, 2)), "has 3 labels for 2 classes"),
        (BOX * np.nan, np.zeros((5, 3)), "got NaN"),
        (BOX, np.full((5, 3), np.nan), "got NaN"),
        (BOX.astype(np.int8), np.zeros((5, 3)), "got int8; wanted floats"),
        (BOX, np.zeros((5, 3), np.int8), "got int8; wanted floats"),
    ],
)
def test_boxes_that_do_not_fit_are_named(boxes: np.ndarray, scores: np.ndarray, says: str) -> None:
    post = Postprocess([{"op": "nms", "boxes": "b", "scores": "s"}], ["b", "s"], LABELS)
    refused(lambda: post({"b": boxes, "s": scores}), says, InputError)


def test_a_missing_output_is_named() -> None:
    post = Postprocess([{"op": "argmax", "on": "y"}], ["y"], None)
    says = "step 1 (argmax) reads the output 'y'; given: z"
    refused(lambda: post({"z": X23}), says, InputError)
    refused(lambda: post({}), "given: none", InputError)


# --- what goes where ------------------------------------------------------------------------------


def test_a_step_replaces_or_adds_and_the_outputs_stay() -> None:
    outputs = {"y": X23.copy(), "z": X23 + 1}
    steps = [
        {"op": "softmax", "on": "y"},
        {"op": "argmax", "on": "y", "as": "class"},
        {"op": "top-k", "on": "y", "as": "best", "k": 1},
    ]
    post = Postprocess(steps, ["y", "z"], LABELS)
    found = post(outputs)
    assert list(found) == ["y", "z", "class", "best"]
    np.testing.assert_allclose(found["y"], 1 / 3, rtol=1e-7)
    assert found["z"] is outputs["z"]
    assert list(outputs) == ["y", "z"]
    assert not outputs["y"].any()
    assert str(post) == "softmax -> argmax -> top-k 1"
    assert str(Postprocess([], ["y"], None)) == ""
    assert Postprocess([], ["y"], None)(outputs) == outputs


def test_the_only_output_need_not_be_named() -> None:
    steps = [{"op": "softmax", "as": "p"}, {"op": "argmax"}, {"op": "top-k", "on": "p", "k": 2}]
    found = answer(steps, None, y=np.array([[0.0, 2.0, 1.0]], np.float32))
    assert found["y"].tolist() == [1]
    assert [row["index"] for row in found["p"]] == [1, 2]


# --- softmax, sigmoid, dequantize, argmax ---------------------------------------------------------


@pytest.mark.needs("scipy")
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax_is_scipys(axis: int) -> None:
    from scipy.special import softmax

    y = RNG.normal(0, 20, (3, 4, 5)).astype(np.float32)
    found = one("softmax", y, axis=axis)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(y.astype(np.float64), axis=axis), rtol=1e-6)


def test_softmax_of_large_numbers() -> None:
    assert one("softmax", np.float32([3e38, 3e38])).tolist() == [0.5, 0.5]
    assert one("softmax", np.float32([1e30, -1e30])).tolist() == [1, 0]
    assert one("softmax", np.float32([0, -np.inf])).tolist() == [1, 0]
    assert one("softmax", np.float16([60000, 60000])).tolist() == [0.5, 0.5]
    assert np.isnan(one("softmax", np.float32([np.nan, 0]))).all()


@pytest.mark.needs("torch")
def test_sigmoid_is_torchs() -> None:
    import torch

    y = np.concatenate([RNG.normal(0, 20, 100), [1e4, -1e4, 0, np.inf, -np.inf]]).astype("f4")
    found = one("sigmoid", y)
    assert found.dtype == np.float32
    wanted = torch.sigmoid(torch.from_numpy(y).double()).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-38)


def test_dequantize_by_definition() -> None:
    q = RNG.integers(-128, 128, (2, 3), dtype=np.int8)
    f = np.float32
    wanted = np.array([[f(int(v) + 7) * f(0.1) for v in row] for row in q], f)
    found = one("dequantize", q, scale=0.1, zero_point=-7)
    assert (found.dtype, found.tolist()) == (np.float32, wanted.tolist())
    scales, zeros = [0.5, 0.1, 3], [1, -2, 100]
    wanted = np.array(
        [[f(int(v) - z) * f(s) for v, s, z in zip(row, scales, zeros, strict=True)] for row in q], f
    )
    for axis in (1, -1):
        found = one("dequantize", q, scale=scales, zero_point=zeros, axis=axis)
        assert found.tolist() == wanted.tolist()
    assert one("dequantize", q, scale=[1, 2], axis=0)[1].tolist() == (2.0 * q[1]).tolist()
    assert one("dequantize", np.uint8([255, 0]), scale=1, zero_point=255).tolist() == [0, -255]


def test_argmax() -> None:
    assert one("argmax", [[1.0, 3, 3], [2, 0, 1]]).tolist() == [1, 0]
    assert one("argmax", [[1.0, 3, 3], [2, 0, 4]], axis=0).tolist() == [1, 0, 1]
    found = one("argmax", np.uint8([0, 255]))
    assert (found.dtype, found.shape, found.tolist()) == (np.int64, (), 1)


# --- top-k, threshold -----------------------------------------------------------------------------


@few
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.data())
def test_top_k_by_sorting(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    names = [f"class {i}" for i in range(len(scores))]
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    wanted = [{"index": i, "label": names[i], "score": scores[i]} for i in best]
    for dtype in (np.float32, np.int8):
        assert one("top-k", np.array(scores, dtype), names, k=k) == wanted
        assert one("top-k", np.array([scores], dtype), names, k=k) == wanted
        assert one("top-k", np.array([scores] * 2, dtype), names, k=k) == [wanted] * 2


def test_top_k_has_plain_values() -> None:
    (row,) = one("top-k", np.array([0, 255], np.uint8), k=1)
    assert row == {"index": 1, "score": 255}
    (row,) = one("top-k", np.array([0.1, 0.25], np.float32), LABELS, k=1, labels=["x", "y"])
    assert row == {"index": 1, "label": "y", "score": 0.25}
    assert [type(value) for value in row.values()] == [int, str, float]
    assert one("top-k", np.zeros((0, 3)), k=1) == []
    found = one("top-k", np.array([-np.inf, np.inf]), k=2)
    assert [row["index"] for row in found] == [1, 0]


def test_threshold() -> None:
    y = np.array([[0.5, 0.50001, 0.2], [0.9, 0.1, 0.8]], np.float32)
    found = one("threshold", y)
    assert (found.dtype, found.tolist()) == (np.bool_, [[False, True, False], [True, False, True]])
    assert one("threshold", y, LABELS, labels=True) == [["dog"], ["cat", "owl"]]
    assert one("threshold", y[:1], LABELS, labels=True) == ["dog"]
    assert one("threshold", y[0], LABELS, labels=True, at=0.6) == []
    # 0.1 as float32 is more than 0.1, and not over it
    assert one("threshold", np.float32([0.1, 0.11]), at=0.1).tolist() == [False, True]
    steps = [{"op": "threshold"}, {"op": "argmax"}]  # a bool array can be read on
    assert answer(steps, None, y=y)["y"].tolist() == [1, 0]


# --- ctc-greedy -----------------------------------------------------------------------------------


def ctc_by_loop(best: list[int], blank: int, names: list[str]) -> str:
    runs = [index for index, _ in itertools.groupby(best)]
    return "".join(names[index] for index in runs if index != blank)


@few
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3), st.booleans())
def test_ctc_by_loop(rows: list[list[int]], last: bool) -> None:
    names = ["<b>", "a", "bc", "d"] if not last else ["a", "bc", "d", "<b>"]
    length = max(map(len, rows))
    full = [row + [0] * (length - len(row)) for row in rows]
    y = np.eye(4, dtype=np.float32)[np.array(full, int).reshape(len(rows), length)]
    wanted = [ctc_by_loop(row, 3 if last else 0, names) for row in full]
    blank = -1 if last else 0
    assert one("ctc-greedy", y, names, blank=blank) == (wanted if len(rows) > 1 else wanted[0])
    assert one("ctc-greedy", y[0], blank=blank, labels=names) == wanted[0]
    if last:
        assert one("ctc-greedy", y[0], names[:3], blank=-1) == wanted[0]


# --- nms ------------------------------------------------------------------------------------------


def detect(boxes: Any, scores: Any, labels: Any = None, **options: Any) -> Any:
    step = {"op": "nms", "boxes": "b", "scores": "s", **options}
    arrays = {"b": np.asarray(boxes, np.float32), "s": np.asarray(scores, np.float32)}
    return answer([step], labels, **arrays)["detections"]


def nms_by_loop(boxes: Any, scores: Any, iou: float, score: float, top: int) -> Any:
    """One class after the other, one pair after the other."""

    def overlap(p: list[float], q: list[float]) -> float:
        w = min(p[2], q[2]) - max(p[0], q[0])
        h = min(p[3], q[3]) - max(p[1], q[1])
        common = max(w, 0) * max(h, 0)
        union = sum(max(r[2] - r[0], 0) * max(r[3] - r[1], 0) for r in (p, q)) - common
        return common / union if union else 0

    kept = []
    for kind in range(len(scores[0]) if scores else 0):
        mine = [i for i in range(len(boxes)) if scores[i][kind] > score]
        chosen: list[int] = []
        for i in sorted(mine, key=lambda i: (-scores[i][kind], i)):
            if all(overlap(boxes[i], boxes[j]) <= iou for j in chosen):
                chosen.append(i)
        kept += [(-scores[i][kind], i, kind) for i in chosen]
    return [(boxes[i], kind, -negative) for negative, i, kind in sorted(kept)][:top]


box = st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: [*map(float, b)])
scored = st.tuples(box, st.lists(st.integers(0, 4).map(lambda v: v / 4), min_size=2, max_size=2))


@few
@given(
    st.lists(scored, max_size=14),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(1, 8),
)
def test_nms_by_loop(items: Any, iou: float, score: float, top: int) -> None:
    """Small integers: every sum and ratio compared is exact, ties and empty boxes are common."""
    boxes, scores = [b for b, _ in items], [s for _, s in items]
    arrays = (np.reshape(boxes, (-1, 4)), np.reshape(scores, (-1, 2)))
    found = detect(*arrays, ["p", "q"], iou=iou, score=score, top=top)
    wanted = nms_by_loop(boxes, scores, iou, score, top)
    assert [(d["box"], d["class"], d["score"]) for d in found] == wanted
    assert [d["label"] for d in found] == ["pq"[d["class"]] for d in found]
    alone = detect(arrays[0], arrays[1][:, 0], iou=iou, score=score, top=top)
    wanted = nms_by_loop(boxes, [s[:1] for s in scores], iou, score, top)
    assert [(d["box"], d["class"], d["score"]) for d in alone] == wanted
    pair = detect(*(np.stack([a, a]) for a in arrays), ["p", "q"], iou=iou, score=score, top=top)
    assert pair == [found, found]
    assert detect(*(a[None] for a in arrays), ["p", "q"], iou=iou, score=score, top=top) == found


@pytest.mark.needs("torchvision")
def test_nms_is_torchvisions() -> None:
    import torch
    from torchvision.ops import nms

    low = RNG.random((500, 2), np.float32)
    boxes = np.concatenate([low, low + RNG.random((500, 2), np.float32) / 4], axis=1)
    scores = RNG.random(500, np.float32)
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.4).numpy()
    found = detect(boxes, scores, iou=0.4, score=0, top=500)
    assert [d["score"] for d in found] == scores[kept].tolist()


@pytest.mark.parametrize(
    ("layout", "given_box"),
    [
        ("xyxy", [1, 2, 5, 8]),
        ("yxyx", [2, 1, 8, 5]),
        ("cxcywh", [3, 5, 4, 6]),
        ("xywh", [1, 2, 4, 6]),
    ],
)
def test_boxes_come_out_as_corners(layout: str, given_box: list[float]) -> None:
    (found,) = detect([given_box], [0.75], format=layout)
    assert found == {"box": [1.0, 2.0, 5.0, 8.0], "class": 0, "score": 0.75}
    assert [type(value) for value in found["box"]] == [float] * 4


def test_nms_options() -> None:
    boxes = [[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4]]  # iou 0.5 with the first
    assert len(detect(boxes, [0.9, 0.8, 0.25])) == 2  # iou 0.5 is not over 0.5, 0.25 not over 0.25
    assert len(detect(boxes, [0.9, 0.8, 0.26], iou=0.49)) == 1
    assert len(detect(boxes, [0.9, 0.8, 0.26], iou=1)) == 3
    both = [[0.9, 0.8], [0.1, 0.1], [0.3, 0.85]]
    found = detect(boxes, both)  # other classes do not suppress each other
    assert [(d["class"], d["score"]) for d in found] == [
        (0, np.float32(0.9)),
        (1, np.float32(0.85)),
    ]
    step = {"op": "nms", "boxes": "b", "scores": "s", "as": "found"}
    arrays = {"b": np.zeros((0, 4), np.float32), "s": np.zeros((0, 7), np.float32)}
    assert answer([step], None, **arrays)["found"] == []
    endless = [[-np.inf, -np.inf, np.inf, np.inf], [0, 0, 1, 1]]
    assert len(detect(endless, [0.9, 0.8])) == 2


def test_many_boxes_take_no_minutes() -> None:
    """A detector's 25,200 boxes of 80 classes, all over the threshold and far apart."""
    corner = np.arange(25_200, dtype=np.float32)[:, None] * 2
    boxes = np.concatenate([corner, corner, corner + 1, corner + 1], axis=1)
    scores = RNG.random((25_200, 8), np.float32)
    found = detect(boxes, scores, score=0, top=50)
    assert len(found) == 50
    assert found[0]["score"] == scores.max()
