"""LiteRT, or the older tflite_runtime, through its Interpreter, from bytes.

`CompiledModel.from_file` is not used: it crashes the process on malformed files (ai_edge_litert
2.3), and a mapped file that is truncated kills it, too.

Every binding has an Interpreter of its own and runs on views into its tensors. The wrapper's own
methods refuse to run while such views exist, since a resize would leave them dangling; here an
interpreter that has views is never resized, so its `Invoke` is called directly.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from ..errors import ModelError
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes, engine_version, import_engine

__all__ = ["load"]

# Operators whose output shape follows from their inputs' shapes alone,
_BY_SHAPE = frozenset(
    """ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL CAST CONCATENATION CONV_2D CONV_3D COS
    DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV ELU EQUAL EXP FLOOR FULLY_CONNECTED GELU
    GREATER GREATER_EQUAL HARD_SWISH L2_NORMALIZATION LEAKY_RELU LESS LESS_EQUAL
    LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX
    LSTM MAXIMUM MAX_POOL_2D MINIMUM MUL NEG NOT_EQUAL PACK POW PRELU QUANTIZE RELU RELU6
    RELU_N1_TO_1 ROUND RSQRT SELECT SELECT_V2 SIGN SIN SOFTMAX SPACE_TO_DEPTH SQRT SQUARE
    SQUARED_DIFFERENCE SQUEEZE SUB SVDF TANH UNIDIRECTIONAL_SEQUENCE_LSTM
    UNIDIRECTIONAL_SEQUENCE_RNN UNPACK""".split()  # noqa: SIM905  (one name a line is a page)
)
# and those where it does when all inputs but one are constants.
_BY_CONSTANT = frozenset(
    """BROADCAST_TO CUMSUM EXPAND_DIMS GATHER MEAN MIRROR_PAD PAD PADV2 REDUCE_MAX REDUCE_MIN
    REDUCE_PROD RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 SLICE SPLIT SPLIT_V
    STRIDED_SLICE SUM TILE TRANSPOSE TRANSPOSE_CONV""".split()  # noqa: SIM905
)

#: its kind, and the tensors it takes and gives
_Operator = Tuple[str, List[int], List[int]]


def load(
    files: Mapping[str, bytes], options: Options, *, delegate: Optional[Callable[[], Any]] = None,
    device: str = "CPU", provider: str = "XNNPACK",
) -> Loaded:  # fmt: skip
    """Load TFLite bytes; XNNPACK takes what it can, as LiteRT does by default.

    What plugs in names a `delegate` of its own (called once for each interpreter), the `device` it
    runs operators on and what it is called: it takes what it can, LiteRT's own kernels run the
    rest, and which are where is read from the interpreter.
    """
    if len(files) != 1:
        raise ModelError(f"a TFLite variant is one file, found {len(files)}: {', '.join(files)}")
    (model,) = files.values()
    if model[4:8] != b"TFL3":
        raise ModelError(f"not a TFLite model: bytes 4..8 are {model[4:8]!r}, wanted b'TFL3'")
    return _Loaded(model, options, delegate, device, provider)


class _Loaded(Loaded):
    max_bindings = 2  # each is an interpreter with its own copy of the packed weights

    def __init__(
        self, model: bytes, options: Options, delegate: Optional[Callable[[], Any]], device: str,
        provider: str,
    ) -> None:  # fmt: skip
        module = import_engine("litert")
        name = module.__name__.partition(".")[0]
        number = getattr(import_module(name), "__version__", None) or engine_version("litert")
        self.version = str(number) if name == "ai_edge_litert" else f"tflite-runtime {number}"
        self._make = module.Interpreter
        self._model, self._threads = model, options.threads
        self._delegate, self._device, self._provider = delegate, device, provider
        first = self.interpreter()
        self._idle: List[Tuple[Any, Optional[Shapes]]] = [(first, None)]
        self._in, self._out = first.get_input_details(), first.get_output_details()
        names_in, names_out = _signature_names(first)
        self.inputs = tuple(_spec(d, names_in) for d in self._in)
        self.outputs = tuple(_spec(d, names_out) for d in self._out)
        operators = _operators(first)
        kinds = {kind for kind, _, _ in operators}
        self._resources = "VAR_HANDLE" in kinds
        self.stateful = self._resources or any("LSTM" in k or "RNN" in k or k == "SVDF"
                                               for k in kinds)  # fmt: skip
        inputs = {detail["index"] for detail in self._in}
        self._tensors_stay = not self._resources and _all_static(operators, inputs)
        self._allocated: Optional[Any] = None

    def interpreter(self) -> Any:
        own: Dict[str, Any] = {}
        if self._delegate is not None:
            from ai_edge_litert.interpreter import OpResolverType

            plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            own = {"experimental_delegates": [self._delegate()],
                   "experimental_op_resolver_type": plain}  # fmt: skip
        return self._make(model_content=self._model, num_threads=self._threads, **own)

    def bind(self, shapes: Shapes) -> Binding:
        interpreter, before = self._idle.pop() if self._idle else (self.interpreter(), None)
        self._allocated = interpreter
        if before != shapes:
            self.shaped(interpreter, shapes)
        if self._tensors_stay:
            views = [_view(interpreter, detail["index"]) for detail in (*self._in, *self._out)]
            if all(view is not None for view in views):
                count = len(self._in)
                return _Views(self, interpreter, shapes, views[:count], views[count:])
        return _Copies(self, interpreter, self._in, self._out, shapes)

    def shaped(self, interpreter: Any, shapes: Shapes) -> Any:
        for detail, shape in zip(interpreter.get_input_details(), shapes):
            if tuple(detail["shape"]) != shape:
                interpreter.resize_tensor_input(detail["index"], shape)
        interpreter.allocate_tensors()
        return interpreter

    def release(self, interpreter: Any, shapes: Shapes) -> None:
        """Keep one for the next shapes, unless somebody still holds a view into it."""
        if not self._idle and interpreter._safe_to_run():
            self._idle.append((interpreter, shapes))

    def placement(self, *, operators: bool = True) -> Placement:
        if self._allocated is None:
            # 1 may be too small for a free dimension: XNNPACK has taken its operators by then.
            with contextlib.suppress(Exception):
                ones = tuple(spec.with_batch(1) for spec in self.inputs)
                self.bind(self.usual_shapes or ones).close()
        listed = _operators(self._allocated or self._idle[-1][0])
        counts: Dict[str, int] = {}
        for kind, _, _ in listed:
            counts[kind] = counts.get(kind, 0) + 1
        delegate = self._provider if counts.get("DELEGATE") else "reference kernels"
        if self._delegate is None:
            return Placement({"CPU": 1.0}, delegate, "float32", counts)
        taken = _taken(listed)
        nodes = tuple(
            (self._device if number in taken else "CPU", kind, f"{kind}#{number}")
            for number, (kind, _, _) in enumerate(listed) if kind != "DELEGATE"
        )  # fmt: skip
        on_it = sum(device == self._device for device, _, _ in nodes) / (len(nodes) or 1)
        shares = {key: share for key, share in ((self._device, on_it), ("CPU", 1 - on_it)) if share}
        return Placement(shares, delegate, "float32", counts, nodes)

    def close(self) -> None:
        self._idle, self._allocated = [], None


class _Views(Binding):
    """On the interpreter's own memory."""

    fixed_outputs = True

    def __init__(
        self, owner: _Loaded, interpreter: Any, shapes: Shapes, inputs: List[Any],
        outputs: List[Any],
    ) -> None:  # fmt: skip
        self._owner, self._interpreter, self._shapes = owner, interpreter, shapes
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        for view in self.inputs:
            view[...] = 0
        self.invoke = interpreter._interpreter.Invoke

    def reset(self) -> None:
        self._interpreter._interpreter.ResetVariableTensors()

    def close(self) -> None:
        super().close()
        self.inputs = self.outputs = ()
        if not self._owner.stateful:
            self._owner.release(self._interpreter, self._shapes)


class _Copies(Binding):
    """For models whose tensors may move while they run: sets inputs and gets outputs each time."""

    fresh_outputs = True

    def __init__(
        self, owner: _Loaded, interpreter: Any, inputs: List[Any], outputs: List[Any],
        shapes: Shapes,
    ) -> None:  # fmt: skip
        self._owner, self._interpreter, self._shapes = owner, interpreter, shapes
        self.inputs = tuple(np.zeros(s, d["dtype"]) for d, s in zip(inputs, shapes))
        self.outputs = ()
        self._in = tuple((d["index"], buffer) for d, buffer in zip(inputs, self.inputs))
        self._out = tuple(d["index"] for d in outputs)
        self.invoke = self._run

    def _run(self) -> None:
        # The Interpreter's own methods first count references to be sure that nobody holds a
        # view into its tensors: nobody here does. `raw` is not kept for the same reason.
        raw = self._interpreter._interpreter
        for index, buffer in self._in:
            raw.SetTensor(index, buffer)
        raw.Invoke()
        self.outputs = tuple([self._get(raw, index) for index in self._out])

    def _get(self, raw: Any, index: int) -> np.ndarray:
        try:
            return np.asarray(raw.GetTensor(index, 0))  # scalars come as numpy scalars
        except ValueError:  # what has no elements cannot be read
            detail = self._interpreter._get_tensor_details(index, 0)
            if 0 not in detail["shape"]:
                raise
            return np.zeros(tuple(detail["shape"]), detail["dtype"])

    def reset(self) -> None:
        if self._owner._resources:  # no call resets those: they belong to the interpreter
            self._interpreter = self._owner.shaped(self._owner.interpreter(), self._shapes)
        else:
            self._interpreter._interpreter.ResetVariableTensors()

    def close(self) -> None:
        super().close()
        if not self._owner.stateful:
            self._owner.release(self._interpreter, self._shapes)


def _operators(interpreter: Any) -> List[_Operator]:
    """All operators; the wrapper's own list describes every tensor, which takes a while."""
    raw = interpreter._interpreter
    return [
        (raw.NodeName(i), raw.NodeInputs(i).tolist(), raw.NodeOutputs(i).tolist())
        for i in range(raw.NumNodes())
    ]


def _taken(operators: List[_Operator]) -> Set[int]:
    """Which operators delegates run: those between what a delegate takes and what it gives, which
    the interpreter keeps in its list."""
    makers = {
        tensor: number
        for number, (kind, _, made) in enumerate(operators) if kind != "DELEGATE"
        for tensor in made
    }  # fmt: skip
    found: Set[int] = set()
    for kind, given, wanted in operators:
        todo = list(wanted) if kind == "DELEGATE" else []
        while todo:
            tensor = todo.pop()
            number = makers.get(tensor)
            if tensor not in given and number is not None and number not in found:
                found.add(number)
                todo += operators[number][1]
    return found


def _all_static(operators: List[_Operator], inputs: Set[int]) -> bool:
    """Whether no operator can decide its output's shape while it runs. Such an output gets its
    memory then, and all others may move. Memory after allocation proves nothing: a RESHAPE to a
    computed shape has some, too."""
    made = inputs.union(*(outputs for _, _, outputs in operators))
    for kind, taken, _ in operators:
        varying = sum(index in made for index in taken)
        if kind not in _BY_SHAPE and not (kind in _BY_CONSTANT and varying <= 1):
            return False
    return True


def _view(interpreter: Any, index: int) -> Optional[np.ndarray]:
    """The tensor's memory, or None where it has none, or is a scalar (which is given by value)."""
    try:
        view = interpreter.tensor(index)()
    except ValueError:
        return None
    return view if isinstance(view, np.ndarray) else None


_Names = Dict[int, List[str]]


def _signature_names(interpreter: Any) -> Tuple[_Names, _Names]:
    """Tensor index -> names in the model's only signature: what its author called it. A tensor
    that is two outputs has two."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}, {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    found: Tuple[_Names, _Names] = {}, {}
    details = runner.get_input_details(), runner.get_output_details()
    for names, tensors in zip(found, details):
        for name, detail in tensors.items():
            names.setdefault(detail["index"], []).append(name)
    return found


def _spec(detail: Dict[str, Any], names: _Names) -> TensorSpec:
    given = names.get(detail["index"])
    name = given.pop(0) if given else detail["name"]
    kind = np.dtype(detail["dtype"])
    if kind.kind not in "fiub":
        raise ModelError(f"{name!r} is of type {kind.name}; not supported")
    shape: List[Dim] = []
    signature = detail.get("shape_signature", detail["shape"])
    for position, dim in enumerate(signature):
        shape.append(int(dim) if dim > 0 else f"{name}_{position}")
    return TensorSpec(name, kind.name, tuple(shape))
