"""ncnn: `m.param`, `m.bin` and `m.json`, the sidecar that says what the param file cannot:

    {"inputs": [{"name": "in0", "dtype": "float32", "shape": [1, 3, "H", "W"], "dims": 3}],
     "outputs": [{"name": "out0", "dtype": "float32", "shape": [1, 10]}]}

Names are those of blobs. `dims` is the rank of ncnn's Mat, which holds the last axes of `shape`;
those before them must be 1. Without it, `dims` is the rank without a leading 1.

ncnn reports by return codes and on stderr, where nothing silences it, and its layers trust the
file: the checks here stop honest mistakes, not a hostile model, which can end the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Set, Tuple

import numpy as np

from ..errors import EngineMissingError, EngineTooOldError, ModelError, one_line
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes
from .chatter import hearing

__all__ = ["load"]

_MAGIC = "7767517"
# ncnn walks the net by recursion: 20,000 layers in a row fit in 8 MiB of stack, 50,000 do not.
_MAX_LAYERS = 10_000
_MAX_SIDECAR_BYTES = 100_000  # Python 3.9 takes a second per 300,000 digits of one number
_REDUCED = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed",
    "use_bf16_storage",
)  # fmt: skip
_EXAMPLE = (
    '{"inputs": [{"name": "in0", "dtype": "float32", "shape": [1, 3, "H", "W"]}], "outputs": [...]}'
)
_SOFTWARE = 3  # ncnn's GpuInfo.type(): 0 discrete, 1 integrated, 2 virtual, 3 the CPU
_TOO_SMALL = "an input is too small for the model, or there is no memory"

#: what a blob is to the caller, and the rank of ncnn's Mat; with its index in the net
_Tensor = Tuple[TensorSpec, int]
_Blob = Tuple[int, TensorSpec, int]


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load a net on the CPU, in float32: on ARM ncnn would choose float16 by itself. Or on the
    first Vulkan device, in either."""
    import ncnn

    vulkan = options.accelerator == "vulkan"
    with hearing([]) if vulkan else contextlib.nullcontext():
        found = vulkan and hasattr(ncnn, "get_gpu_count") and ncnn.get_gpu_count()
    if vulkan and not found:
        raise EngineMissingError(
            "ncnn finds no Vulkan device here: a driver and its loader (libvulkan.so.1) are needed"
        )

    named = {Path(name).suffix.lower(): name for name in files}
    if ".json" not in named:
        raise ModelError(f"an ncnn model needs a .json beside its .param; write {_EXAMPLE}")
    if len(files) != 3 or set(named) != {".param", ".bin", ".json"}:
        raise ModelError(f"an ncnn variant is a .param, a .bin and a .json; found {[*files]}")
    param, weights = named[".param"], named[".bin"]
    inputs, outputs = _read_sidecar(files[named[".json"]], named[".json"])
    layers = _read_layers(files[param], param)
    unknown = [kind for kind in layers if ncnn.layer_to_index(kind) < 0]
    if unknown:
        raise EngineTooOldError(
            f"{param}: ncnn {ncnn.__version__} has no layer type {unknown[0]!r}; update ncnn, or "
            "convert the model without it"
        )
    net = ncnn.Net()
    net.opt.num_threads = options.threads
    for name in (*_REDUCED, "use_vulkan_compute"):
        if hasattr(net.opt, name):  # not every version and build has them all
            half = "fp16" in name and options.precision == "float16"
            setattr(net.opt, name, vulkan and (half or name == "use_vulkan_compute"))
    with _private_copy(files[param]) as path:
        if net.load_param(path) != 0:
            raise ModelError(f"ncnn refuses {param}; what it found is on stderr")
    made, left = net.input_names(), net.output_names()
    if sorted(made) != sorted(spec.name for spec, _ in inputs):
        found = ", ".join(spec.name for spec, _ in inputs)
        raise ModelError(f"{named['.json']} has the inputs {found}; {param} has {', '.join(made)}")
    for spec, _ in outputs:
        if spec.name not in left:
            raise ModelError(f"{param} has no output {spec.name!r}; it has {', '.join(left)}")
    with _private_copy(files[weights]) as path:
        if net.load_model(path) != 0:
            raise ModelError(f"{weights} is shorter than {param} says, or damaged")
    return _Loaded(net, layers, inputs, outputs)


class _Loaded(Loaded):
    def __init__(
        self, net: Any, layers: Dict[str, int], inputs: List[_Tensor], outputs: List[_Tensor]
    ) -> None:
        import ncnn

        self._net, self._layers = net, layers
        index = {blob.name: i for i, blob in enumerate(net.blobs())}
        self._in: List[_Blob] = [(index[spec.name], spec, dims) for spec, dims in inputs]
        self._out: List[_Blob] = [(index[spec.name], spec, dims) for spec, dims in outputs]
        self.version = ncnn.__version__
        self.inputs = tuple(spec for spec, _ in inputs)
        self.outputs = tuple(spec for spec, _ in outputs)

    def bind(self, shapes: Shapes) -> Binding:
        return _Binding(self._net, self._in, self._out, shapes)

    def placement(self, *, operators: bool = True) -> Placement:
        reduced = any(getattr(self._net.opt, name, False) for name in _REDUCED)
        precision = "float16" if reduced else "float32"
        if not getattr(self._net.opt, "use_vulkan_compute", False):
            return Placement({"CPU": 1.0}, "ncnn", precision, {**self._layers})
        import ncnn

        # what has no Vulkan kernel runs on the CPU, between a download and an upload
        nodes = tuple(
            ("GPU" if layer.support_vulkan else "CPU", layer.type, layer.name)
            for layer in self._net.layers()
        )
        devices = [device for device, _, _ in nodes]
        shares = {one: devices.count(one) / len(nodes) for one in dict.fromkeys(devices)}
        card = ncnn.get_gpu_info(0)
        software = card.type() == _SOFTWARE
        return Placement(
            shares, f"ncnn Vulkan, {card.device_name()}", precision, {**self._layers}, nodes,
            simulated=card.device_name() if software else "",
        )  # fmt: skip

    def close(self) -> None:
        # Never net.clear(): it crashes if an Extractor or a blob is alive, in another thread, say.
        # Whoever still runs holds the net, and the last one frees it.
        self._net = None


class _Binding(Binding):
    """Inputs are Mats that ncnn allocated, seen through numpy: a Mat around numpy's own memory
    has no reference count, and a layer that works in place would crash on it."""

    fresh_outputs = True

    def __init__(self, net: Any, inputs: List[_Blob], outputs: List[_Blob], shapes: Shapes) -> None:
        feeds, padded, buffers = [], [], []
        free: Dict[Dim, int] = {}
        for (index, spec, dims), shape in zip(inputs, shapes):
            if not spec.accepts(shape):  # a manifest may leave free what ncnn does not
                raise RuntimeError(f"the .json has the input {spec}, not {[*shape]}")
            mat, view = _new_mat(shape[len(shape) - dims :] or (1,), spec)
            if view.flags.c_contiguous:
                buffer = view.reshape(shape)
            else:  # ncnn begins every channel at a multiple of 16 bytes
                buffer = np.zeros(shape, spec.dtype)
                padded.append((view, buffer.reshape(view.shape)))
            feeds.append((index, mat))
            buffers.append(buffer)
            free.update((d, n) for d, n in zip(spec.shape, shape) if isinstance(d, str))
        wanted = [(index, dims, *_expected(spec, dims, free)) for index, spec, dims in outputs]
        self.inputs, self.outputs = tuple(buffers), ()
        self.invoke = _invocation(self, net.create_extractor, feeds, padded, wanted)


def _invocation(
    binding: Binding, new_extractor: Callable[[], Any], feeds: Any, padded: Any, wanted: Any
) -> Callable[[], None]:
    """The function that runs once. An Extractor lives no longer than the call."""
    asarray = np.ascontiguousarray
    (source, feed), (target, _, _, shape, full) = feeds[0], wanted[0]

    def invoke_one() -> None:
        """The usual case without loops; what is not usual goes the other way."""
        extractor = new_extractor()
        if extractor.input(source, feed) == 0:
            code, mat = extractor.extract(target)
            if code == 0 and not mat.empty():
                try:
                    array = asarray(mat)
                except ValueError:
                    return invoke()
                if array.shape == shape:
                    binding.outputs = (array.reshape(full),)
                    return None
        return invoke()  # says what is wrong

    def invoke() -> None:
        for view, buffer in padded:
            view[...] = buffer
        extractor = new_extractor()
        for index, mat in feeds:
            if extractor.input(index, mat) != 0:
                raise RuntimeError("ncnn refuses an input")
        found = []
        try:
            for index, rank, what, known, whole in wanted:
                code, mat = extractor.extract(index)  # a copy of its own, freed with the array
                # numpy would read an empty Mat's memory, which is not there
                if code == 0 and not mat.empty() and (array := asarray(mat)).shape == known:
                    found.append(array.reshape(whole))
                else:
                    found.append(_as_declared(code, mat, rank, what))
        except ValueError as error:  # negative sizes: what a kernel makes of a smaller image
            raise RuntimeError(f"ncnn cannot compute {what.name!r}: {_TOO_SMALL}") from error
        binding.outputs = tuple(found)

    return invoke if padded or len(feeds) != 1 or len(wanted) != 1 else invoke_one


def _expected(spec: TensorSpec, dims: int, free: Dict[Dim, int]) -> Tuple[Any, ...]:
    """An output's spec as far as the inputs' shapes tell, then the shapes of ncnn's Mat and of our
    array: None where they do not tell, or where the array is not just the Mat reshaped."""
    spec = replace(spec, shape=tuple(free.get(d, d) for d in spec.shape))
    if spec.dtype != "float32" or any(isinstance(d, str) for d in spec.shape):
        return spec, None, None
    return spec, spec.shape[len(spec.shape) - dims :] or (1,), spec.shape


def _as_declared(code: int, mat: Any, dims: int, spec: TensorSpec) -> np.ndarray:
    """An output that was not known before, or an error."""
    if code != 0:
        raise RuntimeError(f"ncnn cannot compute {spec.name!r} (code {code}): {_TOO_SMALL}")
    if mat.empty():  # nothing detected, say
        array = np.zeros([0 if isinstance(d, str) else d for d in spec.shape], spec.dtype)
        if array.size:
            raise RuntimeError(f"ncnn computes no {spec.name!r}; the .json says {spec}")
        return array
    array = np.ascontiguousarray(mat).view(spec.dtype)
    full = (1,) * (len(spec.shape) - dims) + array.shape
    if array.ndim != dims or not replace(spec, shape=spec.shape or (1,)).accepts(full):
        found = [*array.shape]
        raise RuntimeError(f"ncnn computes {spec.name!r} of shape {found}; the .json says {spec}")
    return array.reshape(full if spec.shape else ())


def _new_mat(shape: Tuple[int, ...], spec: TensorSpec) -> Tuple[Any, np.ndarray]:
    """A Mat of zeros, and the same memory as an array."""
    import ncnn

    mat = ncnn.Mat(*reversed(shape))  # width first
    if mat.empty():
        raise RuntimeError(f"ncnn has no memory for {spec.name!r} of the shape {[*shape]}")
    view = np.asarray(mat).view(spec.dtype)
    view[...] = 0
    return mat, view


@contextlib.contextmanager
def _private_copy(data: bytes) -> Iterator[str]:
    """A path to a copy that nobody else can change: ncnn takes weights from a path only."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(os.memfd_create("edgekit"), "wb"))  # noqa: PTH123
            path = f"/proc/self/fd/{file.fileno()}"
            Path(path).stat()
        except (AttributeError, OSError):  # not Linux, or no /proc
            path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model")
            file = stack.enter_context(open(path, "wb"))  # noqa: PTH123
        file.write(data)
        file.flush()
        yield path


def _read_layers(param: bytes, where: str) -> Dict[str, int]:
    """How many layers there are of each type. ncnn frees a blob when a layer takes it: one that
    is taken twice would end the process, and so would a chain longer than the stack.

    Raises:
        ModelError: not a param file in text form, or one that does not agree with itself.
    """
    rows = [row for row in map(str.split, param.decode("ascii", "replace").splitlines()) if row]
    if rows[:1] != [[_MAGIC]]:
        raise ModelError(f"{where} is not ncnn's text form: that begins with {_MAGIC}")
    kinds: Dict[str, int] = {}
    free: Set[str] = set()
    made = 0
    for row in rows[2:]:
        counts = [int(n) for n in row[2:4] if n.isdigit() and len(n) < 6]
        blobs = row[4 : 4 + sum(counts)]
        taken = blobs[: counts[0]] if counts else []
        if len(counts) < 2 or len({*blobs}) < sum(counts) or not free.issuperset(taken):
            raise ModelError(
                f"{where}: the layer {' '.join(row[:2])[:60]!r} is cut off, or takes a blob that "
                "no layer before it makes or another one takes, too"
            )
        free.difference_update(taken)
        free.update(blobs[len(taken) :])
        made += len(blobs) - len(taken)
        kinds[row[0]] = kinds.get(row[0], 0) + 1
    count = len(rows) - 2
    if rows[1:2] != [[str(count), str(made)]] or not 0 < count <= _MAX_LAYERS:
        found = " and ".join(rows[1])[:40] if count >= 0 else "nothing"
        raise ModelError(
            f"{where} has {count} layers and {made} blobs (wanted at most {_MAX_LAYERS}), "
            f"it says {found}: it is cut off, or was edited"
        )
    return kinds


def _read_sidecar(data: bytes, where: str) -> Tuple[List[_Tensor], List[_Tensor]]:
    """The inputs and the outputs, each with the rank of its Mat.

    Raises:
        ModelError: not JSON, a missing, unknown or mistyped field.
    """
    if len(data) > _MAX_SIDECAR_BYTES:
        raise ModelError(f"{where} has {len(data)} bytes; wanted {_MAX_SIDECAR_BYTES} at most")
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON: {one_line(error)}") from None
    if (
        not isinstance(raw, dict)
        or set(raw) != {"inputs", "outputs"}
        or not all(isinstance(listed, list) and listed for listed in raw.values())
    ):
        raise ModelError(f"{where} is not of the form {_EXAMPLE}")
    inputs = [_read_tensor(one, where) for one in raw["inputs"]]
    outputs = [_read_tensor(one, where) for one in raw["outputs"]]
    names = [spec.name for spec, _ in (*inputs, *outputs)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ModelError(f"{where} names {twice[0]!r} twice")
    return inputs, outputs


def _read_tensor(raw: Any, where: str) -> _Tensor:
    given = {"dims": None, **raw} if isinstance(raw, dict) else {}
    if set(given) != {"name", "dtype", "shape", "dims"}:
        raise ModelError(f"{where}: {repr(raw)[:80]} has other keys than name, dtype, shape, dims")
    name, dtype, shape, dims = given["name"], given["dtype"], given["shape"], given["dims"]
    if not _is_name(name):
        raise ModelError(f"{where}: name is {repr(name)[:60]}, wanted the name of a blob")
    where = f"{where}: {name[:60]!r}"
    if dtype not in ("float32", "int32"):
        raise ModelError(f"{where}: dtype is {repr(dtype)[:60]}; ncnn takes float32 and int32 only")
    if type(shape) is not list or not all(map(_is_dim, shape)):
        raise ModelError(f"{where}: shape is {repr(shape)[:60]}, wanted a list of sizes and names")
    spec, rank = TensorSpec(name, dtype, tuple(shape)), len(shape)
    if dims is None:
        dims = max(1, rank - (spec.shape[:1] == (1,)))
    fits = type(dims) is int and 1 <= dims <= min(4, max(1, rank))
    if not fits or any(dim != 1 for dim in shape[: rank - dims]):
        raise ModelError(
            f"{where}: a Mat of {repr(dims)[:60]} dims does not hold {repr(shape)[:60]}; wanted "
            "1 to 4 of the last axes, and those before them must be 1"
        )
    return spec, dims


def _is_name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) < 256 and value.isprintable()


def _is_dim(value: Any) -> bool:
    return _is_name(value) or (type(value) is int and 1 <= value < 2**31)
