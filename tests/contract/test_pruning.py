"""Scores, refits and zeros against least squares; the job with good and bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pruned_graphs import generated

from edgekit import sandbox
from edgekit.artifact import open_model
from edgekit.builder import Builder
from edgekit.cache import Cache
from edgekit.compress.layers_onnx import PRODUCTS, find_layers
from edgekit.compress.prune import Pruning
from edgekit.compress.prune_axes import Classes
from edgekit.compress.prune_channels import analyse, remove, weights_of
from edgekit.compress.prune_choose import choose, choose_evenly, latency_costs, share_saved
from edgekit.compress.prune_latency import interpolate, layer_shapes, measure_layers
from edgekit.compress.prune_moments import Moments, input_moments
from edgekit.compress.prune_noise import Output, noise_db
from edgekit.compress.prune_refit import compensated, refit
from edgekit.compress.prune_score import Reader, curves, groups_of, readers_in
from edgekit.compress.prune_sparse import sparsify, zero_by_output, zero_smallest
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme
from edgekit.data import open_dataset, split_samples
from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.plan import Candidate, with_pruned
from edgekit.pruning import Pruned, PruneRequest, prune_model
from edgekit.sandbox import Limits

pytestmark = pytest.mark.needs("onnxruntime")


def redundant() -> onnx.ModelProto:
    """Conv - Conv - Conv without activations, whose 8 channels in between are combinations of 4:
    half of them can go, and nothing is lost if the next layer is fitted to it."""
    rng = np.random.default_rng(0)
    four = rng.normal(size=(4, 3, 3, 3))
    mix = np.concatenate([np.eye(4), rng.normal(size=(4, 4))])
    weights = {
        "w1": np.einsum("ij,jklm->iklm", mix, four), "b1": rng.normal(size=8),
        "w2": rng.normal(size=(6, 8, 1, 1)), "b2": rng.normal(size=6),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "c1"),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["y"], "c2"),
    ]
    graph = helper.make_graph(
        nodes, "redundant", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 6, 6])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def answers(model: onnx.ModelProto, given: list[dict[str, np.ndarray]]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.concatenate([session.run(None, one)[0] for one in given])


def test_channels_that_others_can_make_up_for_go_without_loss() -> None:
    model, given = redundant(), samples()
    weights = weights_of(model)
    layers = find_layers(model, weights)
    moments = input_moments(model, layers, weights, given)
    classes = analyse(model, given[0])
    groups = groups_of(classes)
    curves(groups, readers_in(classes, layers, weights, moments), compensated=True)
    gone = choose(classes, groups, 0.49)
    assert int(gone.sum()) == 4
    exact = answers(model, given)
    plain = remove(model, classes, gone)
    assert np.abs(answers(plain, given) - exact).max() > 0.5
    made = remove(model, classes, gone, compensated(classes, gone, layers, weights, moments))
    first = np.abs(answers(made, given) - exact).max()
    refit(model, made, classes, gone, lambda: iter(given))
    assert np.abs(answers(made, given) - exact).max() <= first
    assert np.abs(answers(made, given) - exact).max() < 0.05 * np.abs(exact).max()


def test_what_a_channel_costs_is_what_least_squares_leave() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6))
    x -= x.mean(axis=0)
    rows = rng.normal(size=(3, 6))
    y = x @ rows.T
    reader = Reader(rows, x.T @ x / len(x), np.array([0, 0, 1, 1, 2, 2]))
    trace_free = np.array([0, 1, 2])
    group = groups_of_three()
    curves([group], [reader], compensated=True)
    first = int(group.order[0])
    left = {}
    for one in trace_free:
        stay = np.repeat(np.arange(3) != one, 2)
        found = np.linalg.lstsq(x[:, stay], y, rcond=None)[0]
        left[int(one)] = float(((y - x[:, stay] @ found) ** 2).sum() / (y**2).sum())
    assert first == min(left, key=lambda one: left[one])
    assert group.costs[0] == pytest.approx(left[first], rel=0.15)  # the damping


def groups_of_three():
    from edgekit.compress.prune_score import Group

    return Group(np.array([0, 1, 2]), np.zeros(3), (0,))


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_zeros_by_output_lose_less_than_zeros_of_the_smallest(pattern) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2000, 16)) @ rng.normal(size=(16, 16))
    rows, xx = rng.normal(size=(5, 16)), x.T @ x / len(x)
    plain, made = (zero_smallest(rows, 0.5, pattern), zero_by_output(rows, xx, 0.5, pattern))
    lost = [((x @ (one - rows).T) ** 2).sum() for one in (plain, made)]
    assert lost[1] < 0.8 * lost[0]
    if pattern:
        for one in (plain, made):
            assert set((one.reshape(5, 4, 4) != 0).sum(axis=2).ravel()) == {pattern[0]}
    else:
        assert (plain == 0).sum() == 40


def two_layers(useless: float) -> onnx.ModelProto:
    """Conv - Conv; of the second's weights all but two inputs are next to nothing."""
    rng = np.random.default_rng(4)
    second = rng.normal(size=(6, 8, 1, 1))
    second[:, 2:] *= useless
    weights = {"w1": rng.normal(size=(8, 3, 3, 3)), "w2": second}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "c1"),
        helper.make_node("Conv", ["c1", "w2"], ["y"], "c2"),
    ]
    graph = helper.make_graph(
        nodes, "two", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 6, 6])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_zeros_go_where_they_cost_least() -> None:
    model, given = two_layers(1e-4), samples()
    weights = weights_of(model)
    layers = find_layers(model, weights)
    moments = input_moments(model, layers, weights, given)
    rows = sparsify(layers, weights, moments, 0.12, None)
    share = [row["zeros"] / row["weights"] for row in rows]
    assert sum(row["zeros"] for row in rows) == pytest.approx(0.12 * (216 + 48), abs=3)
    assert share[1] > 0.4 > 0.1 > share[0]


def test_noise_is_the_power_over_that_of_the_difference() -> None:
    model, given = two_layers(1.0), samples()
    made = two_layers(0.9)
    was, now = answers(model, given).astype(np.float64), answers(made, given).astype(np.float64)
    kept = np.array([True, False, True, True, False, True])
    found = noise_db(
        model, made, [Output("y"), Output("c1"), Output("y", 1, np.ones(6, bool))], given
    )
    wanted = 10 * np.log10((was**2).sum() / ((was - now) ** 2).sum())
    assert found == [pytest.approx(wanted, abs=0.1), None, pytest.approx(wanted, abs=0.1)]
    less = remove_outputs(made, kept)
    (cut,) = noise_db(model, less, [Output("y", 1, kept)], given)
    off = was[:, kept] - now[:, kept]
    assert cut == pytest.approx(10 * np.log10((was[:, kept] ** 2).sum() / (off**2).sum()), abs=0.1)


def remove_outputs(model: onnx.ModelProto, kept: np.ndarray) -> onnx.ModelProto:
    """The last convolution with these outputs alone."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    weight = numpy_helper.to_array(made.graph.initializer[1])[kept]
    made.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w2"))
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = int(kept.sum())
    return made


def test_multiples_and_even_shares() -> None:
    model = generated(3)
    classes: Classes = analyse(model, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    for pick in (choose, choose_evenly):
        groups = groups_of(classes)
        gone = pick(classes, groups, 0.3, 4)
        left = [int((~gone[group.order]).sum()) for group in groups]
        assert all(
            n % 4 == 0 or n == len(g.order) or len(g.order) <= 4
            for n, g in zip(left, groups, strict=True)
        )
        assert gone.any()


@pytest.mark.parametrize(
    ("group", "more"),
    [
        (1, {"strides": [2, 2]}),
        (1, {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 2]}),
        (2, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        (4, {"dilations": [2, 1], "strides": [1, 2]}),
        (1, {"pads": [3, 3, 3, 3]}),  # more than the kernel reaches
    ],
)
def test_transposed_convolutions_are_sums_over_patches(group, more) -> None:
    rng = np.random.default_rng(3)
    weights = {"w": rng.normal(size=(4, 6, 3, 2)).astype("f"),
               "b": rng.normal(size=6 * group).astype("f")}  # fmt: skip
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "up", group=group, **more)
    graph = helper.make_graph(
        [node], "up", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 7, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = rng.normal(size=(2, 4, 7, 8)).astype("f")
    wanted = np.moveaxis(answers(model, [{"x": x}]), 1, -1).reshape(-1, 6 * group)
    (layer,) = find_layers(model, weights, kinds=["ConvTranspose"])
    assert find_layers(model, weights) == []
    # Positions are drawn from as many as there are, so all of them come in the drawn order.
    order = np.random.default_rng(7).permutation(len(wanted))
    parts = layer.patches(x, weights, np.random.default_rng(7), len(wanted))
    rows = layer.rows(weights).reshape(group, -1, parts.shape[2])
    found = np.concatenate([p @ r.T for p, r in zip(parts, rows, strict=True)], axis=1)
    np.testing.assert_allclose(found + weights["b"], wanted[order], atol=1e-4)
    again = dict(weights)
    layer.put(again, layer.rows(weights))
    np.testing.assert_array_equal(again["w"], weights["w"])


def test_channels_that_only_a_transposed_convolution_reads_go_without_loss() -> None:
    model, given = redundant(), samples()
    node = model.graph.node[1]
    node.op_type = "ConvTranspose"
    node.attribute.append(helper.make_attribute("strides", [2, 2]))
    kernel = np.random.default_rng(8).normal(size=(8, 6, 3, 3)).astype("f")
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(kernel, "w2"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    weights = weights_of(model)
    layers = find_layers(model, weights, kinds=PRODUCTS)
    moments = input_moments(model, layers, weights, given)
    classes = analyse(model, given[0])
    groups = groups_of(classes)
    curves(groups, readers_in(classes, layers, weights, moments), compensated=True)
    gone = choose(classes, groups, 0.49)
    assert int(gone.sum()) == 4
    exact = answers(model, given)
    made = remove(model, classes, gone)
    assert np.abs(answers(made, given) - exact).max() > 0.5
    refit(model, made, classes, gone, lambda: iter(given))
    assert np.abs(answers(made, given) - exact).max() < 0.05 * np.abs(exact).max()


# --- the job --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prune")
    onnx.save(generated(10), folder / "model.onnx")
    x = np.random.default_rng(0).normal(size=(80, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    return folder / "model.onnx", folder / "data.npz"


def pruned(case, tmp_path, pruning, **more) -> Pruned:
    asked = PruneRequest(str(case[0]), pruning, data=str(case[1]), **more)
    return prune_model(asked, cache=Cache(tmp_path))


def test_the_job_gives_a_smaller_model_and_an_account(case, tmp_path) -> None:
    found = pruned(case, tmp_path, Pruning("channels"), amount=0.4)
    assert not found.reason
    assert found.facts["reached"] >= 0.4
    assert found.artifact.size_bytes < found.before.size_bytes
    rows = {row["name"]: row for row in found.facts["layers"]}
    assert rows["head"]["blocked"] == "an output of the model"
    before, after = found.facts["macs"]
    assert sum(row["macs"][1] for row in rows.values()) == after < before
    made = weights_of(onnx.load(found.artifact.path))
    assert sum(a.size for a in made.values() if a.dtype.kind == "f") == found.facts["parameters"][1]
    again = pruned(case, tmp_path, Pruning("channels"), amount=0.4)
    assert again.artifact.sha256 == found.artifact.sha256


def test_the_way_to_an_amount_is_evaluated_and_measured_with_it(case, tmp_path) -> None:
    found = pruned(case, tmp_path, Pruning("channels"), amount=0.4, way=True)
    assert [one.amount for one in found.steps] == [0.1, 0.2, 0.3]
    assert all(one.latency_ratio and one.latency_ratio[0] > 0 for one in found.steps)
    reached = [one.reached for one in found.steps]
    assert reached == sorted(reached)
    assert reached[-1] <= found.facts["reached"]
    assert all("sqnr_db" in row for row in found.facts["layers"] if row.get("channels"))


def test_the_most_that_a_limit_allows(case, tmp_path) -> None:
    found = pruned(case, tmp_path, Pruning("channels"), max_drop=0.02)
    kept = [one for one in found.steps if one.drop <= 0.02]
    assert kept
    assert found.pruning.amount == max(one.amount for one in kept)


@pytest.mark.parametrize("method", ["magnitude", "n-m"])
def test_zeros(case, tmp_path, method) -> None:
    found = pruned(case, tmp_path, Pruning(method, 0.6), amount=0.6)
    model = onnx.load(found.artifact.path)
    zeros = sum(row["zeros"] for row in found.facts["layers"])
    stored = [w for w in weights_of(model).values() if w.dtype == np.float32]
    assert sum(int((w == 0).sum()) for w in stored) >= zeros > 0
    assert any("not faster" in note for note in found.notes)


def test_a_killed_run_leaves_nothing_half_written_and_is_gone_on_with(case, tmp_path) -> None:
    line = [
        sys.executable, "-c", "from edgekit.cli import main; main()", "prune", str(case[0]),
        "--amount", "0.4", "--multiple", "1", "--data", str(case[1]), "-o", "made.onnx",
    ]  # fmt: skip

    def run(cache: str, folder: str, kill_s: float | None = None) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        child = subprocess.Popen(
            line, env={**os.environ, "EDGEKIT_CACHE": str(tmp_path / cache)}, cwd=tmp_path / folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(kill_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return tmp_path / folder / "made.onnx"

    wanted = run("one", "whole").read_bytes()
    for kill_s in (0.6, 1.2, 1.8, 2.4):
        made = run("two", "killed", kill_s)
        assert not made.exists() or made.read_bytes() == wanted
    assert run("two", "killed").read_bytes() == wanted


def test_more_than_can_go_is_the_best_there_is(case, tmp_path) -> None:
    found = pruned(case, tmp_path, Pruning("channels", refit=False), amount=0.999)
    assert "could go" in found.reason
    assert found.usable


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"data": None}, UsageError, "give --data"),
        ({"data": None, "pruning": Pruning("channels", importance="l1", refit=False),
          "max_drop": 0.1}, UsageError, "--max-drop without"),
        ({"metric": "nonsense"}, EdgeKitError, "nonsense"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(case, tmp_path, change, error, text) -> None:
    asked = PruneRequest(str(case[0]), Pruning("channels"), amount=0.5, data=str(case[1]))
    with pytest.raises(error, match=text):
        prune_model(dataclasses.replace(asked, **change), cache=Cache(tmp_path))


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_amounts_are_shares(amount) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        Pruning("channels", amount)


def test_norms_need_no_data(case, tmp_path) -> None:
    asked = PruneRequest(
        str(case[0]), Pruning("channels", importance="l2", refit=False), amount=0.3
    )
    assert prune_model(asked, cache=Cache(tmp_path)).facts["reached"] >= 0.3


def test_a_model_with_nothing_to_remove_says_what_blocks_each_layer(tmp_path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "only")
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "g.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype("f"))
    asked = PruneRequest(
        str(tmp_path / "g.onnx"), Pruning("channels"), amount=0.5, data=str(tmp_path / "d.npz")
    )
    with pytest.raises(ModelError, match="only: an output of the model"):
        prune_model(asked, cache=Cache(tmp_path / "cache"))


def test_quantized_models_are_refused(tmp_path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "q", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z"),
         numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "q.onnx")
    np.savez(tmp_path / "d.npz", x=samples(1)[0]["x"].repeat(40, axis=0))
    asked = PruneRequest(
        str(tmp_path / "q.onnx"), Pruning("channels"), amount=0.5, data=str(tmp_path / "d.npz")
    )
    with pytest.raises(ModelError, match="prune the float model"):
        prune_model(asked, cache=Cache(tmp_path / "cache"))


# --- latency, even shares, and pruning before quantization ----------------------------------------


def test_linear_tables_are_read_between_what_was_measured() -> None:
    rows, columns = [8, 16, 32], [4, 16]
    ns = [[3 * r + 5 * c for c in columns] for r in rows]
    table = {"rows": rows, "columns": columns, "ns": ns}
    for r, c in ((8, 4), (20, 10), (31, 15)):
        assert interpolate(table, r, c) == pytest.approx(3 * r + 5 * c)


def test_layers_are_measured_with_fewer_channels() -> None:
    """What is measured is real layers: they load, and fewer channels are never slower."""
    model = generated(10)
    classes = analyse(model, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    shapes = [one for one in layer_shapes(model, classes) if one]
    depthwise = {"type": "Conv", "x": [1, 16, 6, 6], "kernel": [3, 3], "rows": 16, "columns": 1,
                 "group": 16, "settings": {"pads": [1, 1, 1, 1]}}  # fmt: skip
    tables = measure_layers([*dict.fromkeys(shapes), json.dumps(depthwise)])
    for table in tables:
        ns = np.array(table["ns"])
        assert ns.shape == (len(table["rows"]), len(table["columns"]))
        assert (ns > 0).all()
        assert (np.diff(ns, axis=0) >= 0).all()
        assert (np.diff(ns, axis=1) >= 0).all()
    assert tables[-1]["rows"] == [8, 16]
    assert tables[-1]["columns"] == [1]


def test_channels_go_where_time_is_spent() -> None:
    """Two layers of which one takes all the time: its channels go, though all cost the same."""
    model = generated(10)
    classes = analyse(model, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    groups = groups_of(classes)
    for group in groups:
        group.costs = np.ones(len(group.order))
    slow = max(groups, key=lambda one: len(one.order))
    tables = []
    for one in classes.trace.products:
        wide = len(one.rows) if one.rows is not None else 1
        deep = len(one.columns) if one.columns is not None else 1
        long = 1000.0 if one.node in slow.layers else 0.001
        ns = [[long * (r + 1) for _ in (0, deep)] for r in (0, wide)]
        tables.append({"rows": [0, wide], "columns": [0, deep], "ns": ns} if one.weight else None)
    costs = latency_costs(classes, tables)
    gone = choose(classes, groups, 0.2, costs=costs)
    of_slow = int(gone[slow.order].sum())
    assert of_slow > 0
    assert of_slow > 0.8 * int(gone.sum())
    assert share_saved(classes, gone, costs) >= 0.2


def test_even_shares_take_heads_and_neurons_alike(case, tmp_path) -> None:
    found = pruned(case, tmp_path, Pruning("channels", spread="even"), amount=0.4)
    changed = [
        1 - row["channels"][1] / row["channels"][0] for row in found.facts["layers"]
        if row.get("channels") and not row["blocked"] and row["channels"][0] >= 8
    ]  # fmt: skip
    assert changed
    assert max(changed) - min(changed) <= 0.25
    assert found.facts["reached"] >= 0.39


def test_latency_is_measured_of_layers_once_and_of_the_result_always(
    case, tmp_path, monkeypatch
) -> None:
    way = Pruning("channels", minimize="latency")
    first = pruned(case, tmp_path, way, amount=0.3)
    assert first.facts["latency"]["before"]["label"] == "measured"
    assert len(first.facts["latency"]["ratio"]) == 3
    called: list[str] = []
    whole = sandbox.call
    monkeypatch.setattr(
        sandbox, "call", lambda target, *rest, **more: (
            called.append(target), whole(target, *rest, **more))[1],
    )  # fmt: skip
    again = pruned(case, tmp_path, way, amount=0.5)
    assert again.facts["reached"] >= 0.49 or again.reason
    assert "edgekit.compress.prune_onnx:prune_onnx" in called
    assert "edgekit.compress.prune_latency:measure_layers" not in called


def test_pruned_and_quantized(case, tmp_path) -> None:
    """What optimize makes of a candidate: pruned, then int8, and evaluated beside the model as it
    came."""
    cache = Cache(tmp_path)
    source = open_model(case[0])
    data = open_dataset(str(case[1]), source.inputs, cache)
    split = split_samples(data, None)
    reference = Candidate("onnxruntime-fp32", "onnxruntime", "onnx", Scheme("fp32"), 1)
    builder = Builder(source, data, split, "cosine", [], cache, reference)
    int8 = dataclasses.replace(
        reference, id="onnxruntime-int8-static-matmul",
        scheme=Scheme("int8-static", COMPUTE_OPERATORS, reduce_range=True),
    )  # fmt: skip
    plan = with_pruned((reference, int8), [Pruning("channels", 0.4)], "onnx")
    assert [one.id for one in plan[2:]] == [
        "onnxruntime-channels-40%", "onnxruntime-channels-40%+int8-static-matmul",
    ]  # fmt: skip
    limits = Limits(timeout_s=300)
    float_model, small = (builder.artifact(one, limits, lambda *_: None) for one in plan[2:])
    count = {path: sum(w.size for w in weights_of(onnx.load(path)).values() if w.size > 16)
             for path in (source.path, float_model.path, small.path)}  # fmt: skip
    assert count[float_model.path] < 0.9 * count[source.path]
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(small.path).graph.node}
    assert [step["step"] for step in small.provenance][-2:] == ["prune", "quantize"]
    builder.evaluate(reference, source, split.selection, limits, lambda *_: None)
    found = builder.evaluate(plan[3], small, split.selection, limits, lambda *_: None)
    assert found["metric"] > 0.5


def test_few_samples_are_doubted_and_many_are_not() -> None:
    """Of 200 rows of 400 independent inputs, each seems to follow from the others: what was learned
    from them must not be believed on new ones."""
    rng = np.random.default_rng(3)
    few, many = rng.normal(size=(200, 400)), rng.normal(size=(40_000, 400))
    empty = np.zeros(0)
    seen = Moments(np.zeros(400), (few.T @ few / 200)[None], empty, empty, 200)
    weights = rng.normal(size=(3, 400))
    keep = np.arange(400) < 300
    target = many @ weights.T

    def off(xx: np.ndarray) -> float:
        inner = xx[np.ix_(keep, keep)] + 1e-9 * np.eye(300)
        fitted = np.linalg.solve(inner, (weights @ xx[:, keep]).T).T
        return float(((target - many[:, keep] @ fitted.T) ** 2).mean())

    alone = float(((many[:, ~keep] @ weights[:, ~keep].T) ** 2).mean())  # what only goes away
    assert off(seen.xx[0]) > 1.5 * alone
    assert off(seen.doubted()[0]) < 1.2 * alone
    mixed = many @ rng.normal(size=(400, 400))  # these do follow from each other
    enough = Moments(np.zeros(400), (mixed.T @ mixed / 40_000)[None], empty, empty, 40_000)
    assert np.diag(enough.doubted()[0] / enough.xx[0]).max() < 1.05
