"""From a model's outputs to an answer: the steps a bundle declares, in plain numpy.

A step reads one output (`on`, which may be left out where the model has only one) and replaces it,
or adds an entry of another name (`as`). Exponentials are computed in float64 and rounded to float32
once: two machines differ in the last bit of one value in millions. Where a model's outputs have a
batch axis, lists of answers have it, too, unless the batch is 1: then the answer is that one.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Sequence, Tuple

import numpy as np

from .steps import (
    Axis,
    Count,
    Integers,
    Name,
    Names,
    Number,
    Numbers,
    along,
    attempt,
    build,
    check_steps,
    label,
    must,
    need,
    on_axis,
    show,
)

__all__ = ["Postprocess"]

Run = Callable[..., Any]
Labels = Optional[Sequence[str]]


class Postprocess:
    """Makes a model's outputs readable.

    `steps` are tables with an `op` and its options, `outputs` the names of the model's outputs and
    `labels` the names of its classes, if it has such. Calling it takes the outputs by name and
    gives a new dict: the outputs, and what the steps made of them.

    >>> steps = [{"op": "softmax"}, {"op": "top-k", "k": 1, "as": "best"}]
    >>> answer = Postprocess(steps, ["y"], ["cat", "dog"])({"y": np.array([[0.0, 9.0]])})
    >>> answer["best"]
    [{'index': 1, 'label': 'dog', 'score': 0.9998766183853149}]

    Raises:
        UsageError: an unknown op, option or output, or an option of another type or out of range.
        InputError: when called: an output is missing, has another shape than a step can read, or
            holds NaN where something is to be decided.
    """

    def __init__(
        self, steps: Sequence[Mapping[str, Any]], outputs: Sequence[str], labels: Labels = None
    ) -> None:
        arrays, taken = list(outputs), set(outputs)  # what can be read; which names exist
        self._steps: List[Tuple[str, Tuple[str, ...], str, Run]] = []
        for number, step in enumerate(check_steps(steps), 1):
            run = build(step, number, _STEPS, labels, common=("on", "as"))
            where = f"step {number} ({step['op']})"
            read, into = _names(step, where, outputs)
            for name in read:
                known = ", ".join(arrays) or "nothing"
                must(name in arrays, f"{where} reads {show(name)}; by then there is {known}")
            must(isinstance(into, str) and into != "", f"{where} has as = {show(into)}: no name")
            must(into in read or into not in taken, f"{where} has as = {into!r}, which is taken")
            self._steps.append((where, read, into, run))
            taken.add(into)
            arrays = [name for name in arrays if name != into]
            if step["op"] not in _LISTS and step.get("labels") is not True:
                arrays.append(into)
        self._label = " -> ".join(map(label, steps))

    def __str__(self) -> str:
        return self._label

    def __call__(self, outputs: Mapping[str, np.ndarray]) -> Dict[str, Any]:
        """The outputs and the answers."""
        found: Dict[str, Any] = dict(outputs)
        with np.errstate(all="ignore"):
            for where, read, into, run in self._steps:
                for name in read:
                    have = ", ".join(map(str, outputs)) or "none"
                    fits = isinstance(found.get(name), np.ndarray)
                    need(fits, f"{where} reads the output {name!r}; given: {have}")
                found[into] = attempt(where, "failed", run, *(found[name] for name in read))
        return found


def _names(
    step: Mapping[str, Any], where: str, outputs: Sequence[str]
) -> Tuple[Tuple[str, ...], str]:
    """What a step reads, and where its result goes."""
    if step["op"] == "nms":
        must("on" not in step, f"{where} has on; it reads what boxes and scores name")
        return (step["boxes"], step["scores"]), step.get("as", "detections")
    several = f"{where} has no on, and the outputs are {', '.join(outputs) or 'none'}"
    must("on" in step or len(outputs) == 1, several)
    on = step.get("on", outputs[0])
    return (on,), step.get("as", on)


def _floats(x: np.ndarray) -> np.ndarray:
    need(x.dtype.kind == "f", f"got {x.dtype}; wanted floats: put dequantize before")
    return x.astype(np.float64)


def _decidable(x: np.ndarray) -> np.ndarray:
    need(x.dtype.kind in "biuf", f"got {x.dtype}; wanted numbers")
    need(not np.isnan(x).any(), "got NaN: the model failed on this sample")
    return x


def _unbatch(rows: List[Any]) -> Any:
    return rows[0] if len(rows) == 1 else rows


def _rows(x: np.ndarray, names: Labels) -> np.ndarray:
    """(N, C) of (C,) or (N, C), with a label for each class."""
    need(x.ndim in (1, 2), f"got the shape {list(x.shape)}; wanted (classes,) or (N, classes)")
    _check_labels(names, x.shape[-1])
    return np.atleast_2d(_decidable(x))


def _check_labels(names: Labels, classes: int) -> None:
    fits = names is None or len(names) == classes
    need(fits, f"has {len(names or ())} labels for {classes} classes")


def _softmax(labels_: Labels, *, axis: Axis = -1) -> Run:
    """exp(x - max) / sum along `axis`, float32."""

    def run(x: np.ndarray) -> np.ndarray:
        y, where = _floats(x), on_axis(x, axis)
        y = np.exp(y - y.max(axis=where, keepdims=True))
        return np.asarray(y / y.sum(axis=where, keepdims=True)).astype(np.float32)

    return run


def _sigmoid(labels_: Labels) -> Run:
    """1 / (1 + exp(-x)), float32."""
    return lambda x: np.asarray(1 / (1 + np.exp(-_floats(x)))).astype(np.float32)


def _dequantize(
    labels_: Labels, *, scale: Numbers, zero_point: Integers = 0, axis: Optional[Axis] = None
) -> Run:
    """(x - zero_point) * scale, float32; numbers, or lists along `axis`."""
    scales, zeros = np.array(scale, np.float32), np.array(zero_point, np.int64)
    must(bool((scales > 0).all()), f"has scale = {scale}; wanted numbers above 0")
    must(axis is not None or scales.ndim + zeros.ndim == 0, "has a list; it also needs axis")

    def run(x: np.ndarray) -> np.ndarray:
        need(x.dtype.kind in "iu", f"got {x.dtype}; wanted integers")
        steps = x.astype(np.int64) - along(zeros, x, axis or 0)
        return np.asarray(steps.astype(np.float32) * along(scales, x, axis or 0))

    return run


def _top_k(labels_: Labels, *, k: Count, labels: Optional[Names] = None) -> Run:
    """The `k` largest of (C,) or each row of (N, C): a list of {index, label, score}.

    Largest first, the lower index first among equals. `label` is there when there are labels.
    """
    names: Labels = labels_ if labels is None else labels

    def row(scores: np.ndarray) -> List[Dict[str, Any]]:
        best = np.argsort(-scores.astype(np.float64), kind="stable")[:k].tolist()
        return [_named({"index": i}, i, names, score=scores[i].item()) for i in best]

    def run(x: np.ndarray) -> Any:
        rows = _rows(x, names)
        need(k <= rows.shape[1], f"has k = {k}; there are {rows.shape[1]} classes")
        return _unbatch([row(scores) for scores in rows])

    return run


def _named(first: Dict[str, Any], index: int, names: Labels, *, score: float) -> Dict[str, Any]:
    named = {} if names is None else {"label": names[index]}
    return {**first, **named, "score": score}


def _threshold(labels_: Labels, *, at: Number = 0.5, labels: bool = False) -> Run:
    """x > at, bool; with `labels` the names of the classes over it, for (C,) or (N, C)."""
    must(not labels or labels_ is not None, "has labels = true, and the bundle has no labels")
    names = labels_ or ()

    def run(x: np.ndarray) -> Any:
        need(x.dtype.kind == "f", f"got {x.dtype}; wanted floats: put dequantize before")
        over = np.asarray(_decidable(x) > x.dtype.type(at))
        if not labels:
            return over
        rows = _rows(over, labels_)
        return _unbatch([[names[i] for i in np.flatnonzero(row).tolist()] for row in rows])

    return run


def _argmax(labels_: Labels, *, axis: Axis = -1) -> Run:
    """The index of the largest along `axis`, int64; the lowest index among equals."""
    return lambda x: np.asarray(_decidable(x).argmax(axis=on_axis(x, axis))).astype(np.int64)


def _ctc_greedy(
    labels_: Labels, *, blank: Literal[0, -1] = 0, labels: Optional[Names] = None
) -> Run:
    """(T, C) or (N, T, C) -> the string of the best classes: repeats collapse, then blanks go.

    Labels are per class, also for the blank; a final blank (-1) may have none.
    """
    names: Sequence[str] = (labels_ if labels is None else labels) or ()
    must(len(names) > 0, "needs labels, and the bundle has none")

    def run(x: np.ndarray) -> Any:
        need(x.ndim in (2, 3), f"got the shape {list(x.shape)}; wanted (T, C) or (N, T, C)")
        classes = x.shape[-1]
        if len(names) != classes - 1 or blank == 0:
            _check_labels(names, classes)
        best = _decidable(x if x.ndim == 3 else x[None]).argmax(axis=-1)
        new = np.ones(best.shape, bool)
        new[:, 1:] = best[:, 1:] != best[:, :-1]
        kept = new & (best != blank % classes)
        return _unbatch(["".join(names[i] for i in row[k].tolist()) for row, k in zip(best, kept)])

    return run


def _nms(
    labels_: Labels,
    *,
    boxes: Name,
    scores: Name,
    iou: Number = 0.5,
    score: Number = 0.25,
    top: Count = 100,
    format_: Literal["xyxy", "yxyx", "cxcywh", "xywh"] = "xyxy",
) -> Run:
    """Greedy non-maximum suppression per class: a list of {box, class, label, score}.

    boxes (M, 4) with scores (M,) or (M, C); or (N, M, 4) with (N, M) or (N, M, C). Of all boxes
    over `score`, best first (among equals in their order), one is dropped if its intersection over
    union with a better one of its class is over `iou`; at most `top` stay. `box` is [x1, y1, x2,
    y2] in the model's units whatever `format` says of the input.
    """
    must(0 <= iou <= 1, f"has iou = {iou}; wanted 0 to 1")

    def run(boxes: np.ndarray, scores: np.ndarray) -> Any:
        fits = boxes.ndim in (2, 3) and boxes.shape[-1] == 4
        need(fits, f"got boxes {list(boxes.shape)}; wanted (M, 4) or (N, M, 4)")
        each, many = (boxes, scores) if boxes.ndim == 3 else (boxes[None], scores[None])
        many = many[:, :, None] if many.ndim == 2 else many
        each = _corners(_floats(_decidable(each)), format_)
        fits = many.ndim == 3 and many.shape[:2] == each.shape[:2]
        need(fits, f"got boxes {list(boxes.shape)} with scores {list(scores.shape)}")
        _check_labels(labels_, many.shape[2])
        _floats(_decidable(scores))
        return _unbatch([image(b, s) for b, s in zip(each, many)])

    def image(corners: np.ndarray, likely: np.ndarray) -> List[Dict[str, Any]]:
        rows, classes = np.nonzero(likely > likely.dtype.type(score))
        order = np.argsort(-likely[rows, classes].astype(np.float64), kind="stable")
        found = []
        for i in _suppress(corners[rows[order]], classes[order], iou, top):
            row, kind = rows[order[i]], int(classes[order[i]])
            first = {"box": corners[row].tolist(), "class": kind}
            found.append(_named(first, kind, labels_, score=likely[row, kind].item()))
        return found

    return run


def _corners(boxes: np.ndarray, format_: str) -> np.ndarray:
    a, b, c, d = (boxes[..., i] for i in range(4))
    if format_ == "yxyx":
        a, b, c, d = b, a, d, c
    elif format_ == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    elif format_ == "xywh":
        c, d = a + c, b + d
    return np.stack([a, b, c, d], axis=-1)


def _suppress(boxes: np.ndarray, classes: np.ndarray, iou: float, top: int) -> List[int]:
    """Which of the boxes, best first, stay."""
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = np.maximum(high - low, 0)
    area = sides[:, 0] * sides[:, 1]
    left = np.arange(len(boxes))
    kept: List[int] = []
    while len(left) and len(kept) < top:
        best, left = left[0], left[1:]
        kept.append(int(best))
        common = np.minimum(high[best], high[left]) - np.maximum(low[best], low[left])
        shared = np.maximum(common[:, 0], 0) * np.maximum(common[:, 1], 0)
        same = shared > iou * (area[best] + area[left] - shared)
        left = left[~(same & (classes[left] == classes[best]))]
    return kept


_STEPS: Dict[str, Callable[..., Run]] = {
    "softmax": _softmax, "sigmoid": _sigmoid, "dequantize": _dequantize, "top-k": _top_k,
    "threshold": _threshold, "argmax": _argmax, "nms": _nms, "ctc-greedy": _ctc_greedy,
}  # fmt: skip
_LISTS = ("top-k", "nms", "ctc-greedy")
