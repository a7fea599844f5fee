"""Accuracy control: the planted operators are blamed, and no more than needed stay float."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cnn import cnn_data, cnn_weights
from onnx import TensorProto, helper, numpy_helper

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.choose import Allowed
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import fitted, quantizer_for
from edgekit.compress.scheme import Scheme, parse_scheme
from edgekit.compress.sensitivity import Ranking, Sensitivity, aligned, sensitivities
from edgekit.control import AccuracyControl, SearchEndedError, Tried, blame
from edgekit.convert import convert
from edgekit.data import open_dataset
from edgekit.device import Quantization
from edgekit.experience import Experience, Outcome
from edgekit.graph import read_graph
from edgekit.plan import Candidate
from edgekit.quantization import QuantizeRequest, quantize_model
from edgekit.sandbox import Limits

pytestmark = pytest.mark.needs("onnxruntime")
PLANTED = {"big", "p", "small"}  # what makes the outlier, hands it on, and reads it


def outlier_net(path: Path, *, wide: int = 0) -> Path:
    """The small CNN with a channel made a thousand times greater, and small again behind the
    pooling: in float nothing changes, in 8 bits per tensor the other channels are lost.

    `wide`: the convolution itself makes it greater, and there is a detour through so many
    features, to have weights to store."""
    weights = cnn_weights()
    scale = np.ones((1, 8, 1, 1), np.float32)
    scale[0, 3] = 1000
    weights |= {"s": scale, "t": 1 / scale}
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Mul", ["r", "s"], ["big"]),
        helper.make_node("MaxPool", ["big"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Mul", ["p", "t"], ["small"]),
        helper.make_node("Flatten", ["small"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["scores"], transB=1),
    ]
    if wide:
        weights["w1"][3] *= 1000
        weights["b1"][3] *= 1000
        del weights["s"], nodes[2]
        nodes[2].input[0] = "r"
        there = np.random.default_rng(1).normal(0, wide**-0.5, (72, wide))
        weights |= {"there": there.astype(np.float32)}
        weights |= {"back": np.linalg.pinv(there).astype(np.float32)}
        nodes[-1].input[0] = "g"
        nodes.insert(-1, helper.make_node("MatMul", ["f", "there"], ["h"]))
        nodes.insert(-1, helper.make_node("MatMul", ["h", "back"], ["g"]))
    graph = helper.make_graph(
        nodes, "outlier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 12, 12])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=7)
    onnx.save(model, path)
    return path


def ranked(path: Path, data: Path, cache: Cache) -> Ranking:
    model = open_model(path)
    samples = open_dataset(str(data), model.inputs, cache)
    scheme = fitted(Scheme("int8-static"), quantizer_for(Scheme("int8-static"), "onnx"),
                    Quantization())  # fmt: skip
    made = quantize(model, scheme, samples, np.arange(64), cache=cache)
    return sensitivities(model, made, samples, np.arange(64), cache=cache)


def test_the_planted_operators_are_the_noisiest_and_are_blamed(tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    data = cnn_data(tmp_path / "data.npz", 128)
    found = ranked(outlier_net(tmp_path / "net.onnx"), data, cache)
    worst = [name for one in found.groups[:3] for name in one.outputs]
    assert set(worst) == PLANTED
    assert {name for one in blame(found) for name in one["outputs"]} == PLANTED
    assert found.groups[2].sqnr_db < 10 < 25 < found.groups[3].sqnr_db
    assert found.left(0) == pytest.approx(1)
    assert found.left(3) < 0.01


def test_noise_is_that_of_rounding_in_numpy(tmp_path) -> None:
    """One MatMul: rounded inputs times rounded weights, rounded again."""
    rng = np.random.default_rng(3)
    weights, x = rng.normal(size=(16, 8)), rng.uniform(-1, 2, (32, 16)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(weights.astype(np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=7)
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=x)
    cache = Cache(tmp_path / "cache")
    came = open_model(tmp_path / "m.onnx")
    data = open_dataset(str(tmp_path / "d.npz"), came.inputs, cache)
    scheme = fitted(Scheme("int8-static"), quantizer_for(Scheme("int8-static"), "onnx"),
                    Quantization())  # fmt: skip
    picked = np.arange(16)  # all of them are used
    made = quantize(came, scheme, data, picked, cache=cache)
    (only,) = sensitivities(came, made, data, picked, cache=cache).groups

    def rounded(values: np.ndarray) -> np.ndarray:
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        scale = (high - low) / 255
        zero = round(-low / scale)
        return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale

    seen = x[:16].astype(np.float64)
    scales = np.abs(weights).max(axis=0) / 127
    wanted = seen @ weights
    got = rounded(rounded(seen) @ (np.round(weights / scales) * scales))
    noise = ((got - wanted) ** 2).sum() / (wanted**2).sum()
    assert only.outputs == ("y",)
    assert only.noise == pytest.approx(noise, rel=0.1)


@pytest.mark.needs("openvino")
def test_operators_are_found_again_in_other_formats(tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    model = open_model(outlier_net(tmp_path / "net.onnx"))
    made = convert(model, "openvino", cache=cache)
    shapes = {"image": (1, 1, 12, 12)}
    ours, theirs = (read_graph(one.path, shapes=shapes) for one in (model, made))
    found = aligned(("c", "scores", "big"), ours, theirs)
    kinds = {one.outputs[0]: one.type for one in theirs.operators if one.outputs}
    assert [kinds[name] for name in found] == ["Convolution", "MatMul", "Multiply"]


# --- the search ---------------------------------------------------------------------------------


class Staged(AccuracyControl):
    """Whose builds are within the budget from `enough` operators in float on."""

    def __init__(self, enough: int, count: int) -> None:
        super().__init__(None, Quantization(), 0.01, Limits, lambda text: None)  # type: ignore[arg-type]
        self.enough, self.asked = enough, []
        noise = [10.0 ** (-index / 4) for index in range(count)]
        groups = tuple(Sensitivity((f"t{i}",), ("Conv",), n) for i, n in enumerate(noise))
        self.ranking = Ranking(groups, Path())

    def sensitivity(self, candidate: Candidate) -> Ranking:
        return self.ranking

    def _try(self, candidate: Candidate) -> Tried:
        kept = len(candidate.scheme.keep)
        self.asked.append(kept)
        drop = 0.0 if kept >= self.enough else 0.5
        return Tried(candidate, None, {"drop": drop}, screened=False, within=not drop, reason="")


CANDIDATE = Candidate("it", "onnxruntime", "onnx", parse_scheme("int8-static"), 1)


@pytest.mark.parametrize("enough", [1, 2, 5, 9, 17, 30, 39])
def test_no_more_than_needed_stay_float_and_few_are_tried(enough) -> None:
    control = Staged(enough, 60)
    found = [one for one in control.keep_float(CANDIDATE) if one.within]
    least = min(len(one.candidate.scheme.keep) for one in found)
    assert enough <= least <= enough + 3  # bisected to a twentieth of the operators
    assert len(found[-1].candidate.scheme.keep) == least
    assert len(control.asked) <= 11
    assert len(set(control.asked)) == len(control.asked)
    # The next engine begins where this one ended.
    control.asked.clear()
    list(control.keep_float(replace(CANDIDATE, id="other")))
    assert control.asked[0] <= least + 1
    assert len(control.asked) <= 6


@pytest.mark.needs("openvino")
def test_what_cured_networks_like_this_is_tried_first(tmp_path: Path) -> None:
    operators, told = {"Conv": 3}, []
    control = AccuracyControl(
        None, Quantization(), Allowed(0.01), Limits, told.append,  # type: ignore[arg-type]
        experience=Experience(tmp_path, operators, []),
    )  # fmt: skip
    candidate = replace(CANDIDATE, engine="openvino", format="openvino")
    usual = [one.scheme.id for one in control._promising(list(control._options(candidate)))]
    assert len(usual) > 1
    assert told == []
    past = [Outcome("openvino", usual[0], good=False, repair=True)]
    past += [Outcome("openvino", usual[1], good=True, repair=True)]
    Experience(tmp_path, operators, []).add(past)
    control._experience = Experience(tmp_path, operators, [])
    control.known.clear()
    found = [one.scheme.id for one in control._promising(list(control._options(candidate)))]
    assert found == [usual[1], usual[0], *usual[2:]]
    assert "1 of 1 runs on networks like this" in told[0]


def test_hopeless_ones_are_given_up() -> None:
    control = Staged(61, 60)
    assert not [one for one in control.keep_float(CANDIDATE) if one.within]
    assert max(control.asked) == 42
    assert len(control.asked) <= 8


def test_what_no_tool_leaves_in_float_is_not_tried() -> None:
    control = Staged(3, 60)
    scheme = parse_scheme("int8-static:tensorflow")
    candidate = Candidate("it", "litert", "tflite", scheme, 1)
    assert not list(control.keep_float(candidate))
    assert control.asked == []


def test_a_search_that_is_ended_leaves_what_it_found(tmp_path) -> None:
    control = Staged(9, 60)
    calls = []

    def limits() -> Limits:
        calls.append(1)
        raise SearchEndedError

    control._limits = limits
    control._try = lambda candidate: control._limits()  # type: ignore[assignment,method-assign]
    with pytest.raises(SearchEndedError):
        list(control.keep_float(CANDIDATE))
    assert calls == [1]


# --- from end to end ----------------------------------------------------------------------------


def test_quantize_repairs_what_one_channel_spoils(tmp_path) -> None:
    net, data = outlier_net(tmp_path / "net.onnx"), cnn_data(tmp_path / "data.npz", 400)
    cache = Cache(tmp_path / "cache")
    request = QuantizeRequest(str(net), parse_scheme("int8-static"), "onnx", data=str(data))
    spoilt = quantize_model(request, cache=cache)
    assert spoilt.evaluation["drop"] > 0.2
    assert any("MUCH WORSE" in note for note in spoilt.notes)
    found = quantize_model(replace(request, max_drop=0.02), cache=cache)
    assert found.reason == ""
    assert found.evaluation["drop"] <= 0.02
    assert set(found.scheme.keep) == PLANTED
    told = {one.output: one.kept for one in found.operators}
    assert {name: told[name] for name in PLANTED if "dB of the outputs" not in told[name]} == {}
    computed = {one.type: one.computed for one in found.operators}
    assert computed["Conv"] == computed["Gemm"] == "uint8"
