"""How the steps of pre- and postprocessing declare their options, and how a bundle's are checked.

An op is a function that returns the work to do for each sample. Its keyword-only parameters are
the step's options: name, type and default are written once, there.
"""

from __future__ import annotations

import inspect
from typing import (
    Annotated,
    Any,
    Callable,
    Literal,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from .errors import EdgeKitError, InputError, UsageError, one_line

__all__ = [
    "MAX_SIDE", "MAX_VALUES", "Axis", "Count", "CountOr0", "Int32", "Integers", "Name", "Names",
    "Number", "Numbers", "Positive", "Sample", "Shape", "Size", "along", "attempt", "build",
    "check_steps", "fill_value", "label", "must", "need", "on_axis", "show",
]  # fmt: skip

MAX_VALUES = 1 << 26  # pixels or samples: 64 MPixel, an hour at 16 kHz
MAX_SIDE = 65_535  # pixels: a JPEG's own limit

Test = Callable[[Any], bool]


def _integer(low: int, high: int) -> Tuple[Test, str]:
    return lambda v: type(v) is int and low <= v <= high, f"an integer, {low} to {high}"


def _list_of(test: Test) -> Test:
    return lambda v: isinstance(v, (list, tuple)) and len(v) > 0 and all(map(test, v))


def _one_or_list(test: Test) -> Test:
    return lambda v: test(v) or _list_of(test)(v)


def _is_number(value: Any) -> bool:  # that float32 can hold; NaN is not
    return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and bool(np.float32(value) > 0)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    return len(sides) == 2 and all(type(v) is int and 1 <= v <= MAX_SIDE for v in sides)


def _is_shape(value: Any) -> bool:
    fits = _list_of(lambda v: type(v) is int and (v == -1 or 1 <= v <= MAX_VALUES))(value)
    return fits and list(value).count(-1) <= 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


# What an option may be, and how a message says so.
Count = Annotated[int, _integer(1, MAX_VALUES)]
CountOr0 = Annotated[int, _integer(0, MAX_VALUES)]
Int32 = Annotated[int, _integer(-(2**31), 2**31 - 1)]
Axis = Annotated[int, _integer(-8, 7)]
Number = Annotated[float, (_is_number, "a finite number")]
Positive = Annotated[float, (_is_positive, "a number above 0")]
Name = Annotated[str, (_is_name, "a name")]
Integers = Annotated[Any, (_one_or_list(_integer(-(2**31), 2**31 - 1)[0]), "an integer, or a list")]
Numbers = Annotated[Any, (_one_or_list(_is_number), "a finite number, or a list of them")]
Names = Annotated[Any, (_list_of(lambda v: isinstance(v, str)), "a list of strings")]
Size = Annotated[Any, (_is_size, f"[height, width] or one integer, 1 to {MAX_SIDE}")]
Shape = Annotated[Any, (_is_shape, "a list of sizes, one of them may be -1")]


def check_steps(steps: Any) -> Sequence[Any]:
    """The steps, if they are a list at all."""
    must(isinstance(steps, (list, tuple)), f"the steps are {show(steps)}; wanted a list of tables")
    found: Sequence[Any] = steps
    return found


def build(
    step: Any,
    number: int,
    ops: Mapping[str, Callable[..., Any]],
    *given: Any,
    common: Tuple[str, ...] = (),
) -> Any:
    """What the function of the step's op returns for `given` and the step's options.

    A parameter is a `bool`, a `Literal` or one of the kinds above; a final `_` is not part of its
    name (`format_` is written `format`). Options in `common` are the caller's business. `number`
    counts from 1, like a reader of the TOML.

    Raises:
        UsageError: an unknown op, or an option that is unknown, missing, mistyped or out of range.
    """
    op = step.get("op") if isinstance(step, Mapping) else None
    if not isinstance(op, str) or op not in ops:
        found = f"has the unknown op {show(op)}" if isinstance(step, Mapping) else "is no table"
        raise UsageError(f"step {number} {found}; known ops: {', '.join(ops)}")
    hints = get_type_hints(ops[op], include_extras=True)
    parameters = inspect.signature(ops[op]).parameters.values()
    options = {p.name.rstrip("_"): p for p in parameters if p.kind is p.KEYWORD_ONLY}
    taken = {}
    try:
        for name in step:
            known = ", ".join((*options, *common)) or "none"
            fits = name in options or name in ("op", *common)
            must(fits, f"has the unknown option {show(name)}; known: {known}")
        for name, parameter in options.items():
            test, wanted = _kind(hints[parameter.name])
            if name in step:
                must(test(step[name]), f"has {name} = {show(step[name])}; wanted {wanted}")
                taken[parameter.name] = step[name]
            else:
                must(parameter.default is not parameter.empty, f"has no {name}; wanted {wanted}")
        return ops[op](*given, **taken)
    except UsageError as error:
        raise UsageError(f"step {number} ({op}) {error}") from None


def _kind(hint: Any) -> Tuple[Test, str]:
    if get_origin(hint) is Union:  # Optional: an option without a default value
        hint = get_args(hint)[0]
    if hint is bool:
        return lambda v: type(v) is bool, "true or false"
    if get_origin(hint) is Literal:
        words = get_args(hint)
        listed = ", ".join(map(str, words))
        return lambda v: type(v) is type(words[0]) and v in words, f"one of {listed}"
    test, wanted = hint.__metadata__[0]
    return test, wanted


def label(step: Mapping[str, Any]) -> str:
    """A step in a few words: `resize 256x256 bilinear`."""
    words = [step["op"]]
    for key in ("size", "method", "to", "mode", "rate", "dtype", "length", "mels", "k", "at"):
        value = step.get(key, "")
        words.append("x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    return " ".join(filter(None, words))


class Sample:
    """What is known of a sample before a step runs. A step notes here what it will change."""

    def __init__(self, source: str) -> None:
        self.source = source
        #: the axes of an image; an array is taken for one until a step says otherwise
        self.layout = "HWC" if source in ("image", "array") else ""
        self.color = "RGB"
        #: where `normalize` finds channels; None: it has to be told
        self.channel_axis: Optional[int] = -1
        self.rate: Optional[int] = None  # Hz
        self.fresh = True  # no step has run
        self.block: Optional[int] = None  # so many bytes from either end of a file suffice

    def image(self) -> None:
        """The next step is for images."""
        now = f"is laid out {self.layout}" if self.layout else "is none"
        must(self.layout == "HWC", f"is for an image (H, W, C), and the sample {now} by then")

    def signal(self) -> None:
        """The next step is for samples of one axis and gives rows of features."""
        must(self.source != "image", "is for a sample of one axis (n,), not for an image")
        self.layout, self.channel_axis = "", -1


def show(value: Any) -> str:
    """A value that was found, short enough for a message."""
    try:
        return repr(value)[:60]
    except Exception:  # an int of thousands of digits
        return f"a very long {type(value).__name__}"


def must(holds: bool, otherwise: str) -> None:
    """Check what the author of the steps wrote."""
    if not holds:
        raise UsageError(otherwise)


def need(holds: Any, otherwise: str) -> None:
    """Check what a user gave."""
    if not holds:
        raise InputError(otherwise)


def attempt(what: str, failed: str, run: Callable[..., Any], *given: Any) -> Any:
    """`run(*given)`; whatever it raises becomes an InputError that says where.

    Raises:
        EdgeKitError: others than InputErrors pass.
    """
    try:
        return run(*given)
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except EdgeKitError:
        raise
    except Exception as error:  # Pillow and wave raise nearly anything for damaged files
        raise InputError(f"{what} {failed}: {one_line(error)}") from None


def on_axis(x: np.ndarray, axis: int) -> int:
    """`axis` of `x`, counted from 0.

    Raises:
        InputError: `x` has no such axis.
    """
    need(-x.ndim <= axis < x.ndim, f"has axis = {axis}, got the shape {list(x.shape)}")
    return axis % x.ndim


def along(values: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """One value as it is; a list in a shape that goes along that axis of `x`.

    Raises:
        InputError: the axis has another length.
    """
    if values.ndim == 0:
        return values
    where = on_axis(x, axis)
    wrong = f"has a list of {len(values)}, got the shape {list(x.shape)}, axis {axis}"
    need(x.shape[where] == len(values), wrong)
    return values.reshape([-1 if i == where else 1 for i in range(x.ndim)])


def fill_value(value: float, dtype: np.dtype[Any]) -> Any:
    """`value` as a number of `dtype`.

    Raises:
        InputError: a `dtype` of integers cannot hold it.
    """
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        fits = low <= value <= high and value == int(value)
        need(fits, f"has {value} for filling, which {dtype} cannot hold")
    return dtype.type(value)
