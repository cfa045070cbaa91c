"""Graph networks: Caffe's arithmetic against a float64 oracle in plain loops, and what torch must allow."""

from __future__ import annotations

import io
import math
import weakref
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kdcli import models
from kdcli.base.errors import KdError
from kdcli.models.graph import OPS, GraphNet, safe_name
from kdcli.models.operations.windows import pool_window


def node(name: str, op: str, *inputs: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "inputs": list(inputs) or ["input"], "args": args}


def one(shape: tuple[int, ...], op: str, **args: Any) -> GraphNet:
    """A network of one layer."""
    return GraphNet(shape, [node("layer", op, **args)], "layer")


def caffe_pool(
    maps: np.ndarray, kernel: tuple, stride: tuple, pad: tuple, average: bool, up: bool
) -> np.ndarray | None:
    """Caffe's PoolingLayer::Reshape and Forward_cpu, loop by loop. None where a window is empty."""
    size = maps.shape[1:]
    out = []
    for side, k, s, p in zip(size, kernel, stride, pad, strict=True):
        length = (math.ceil if up else math.floor)((side + 2 * p - k) / s) + 1
        if any(pad) and (length - 1) * s >= side + p:
            length -= 1
        if length < 1:
            return None
        out.append(length)
    result = np.zeros((len(maps), *out))
    for y in range(out[0]):
        for x in range(out[1]):
            hs, ws = y * stride[0] - pad[0], x * stride[1] - pad[1]
            he, we = min(hs + kernel[0], size[0] + pad[0]), min(ws + kernel[1], size[1] + pad[1])
            area = (he - hs) * (we - ws)
            hs, ws, he, we = max(hs, 0), max(ws, 0), min(he, size[0]), min(we, size[1])
            if hs >= he or ws >= we:
                return None
            window = maps[:, hs:he, ws:we]
            result[:, y, x] = window.sum((1, 2)) / area if average else window.max((1, 2))
    return result


@st.composite
def pools(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    size = draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    pad = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    return size, kernel, stride, pad


@given(pools(), st.booleans(), st.booleans(), st.integers(0, 99))
@example(((32, 32), (3, 3), (2, 2), (0, 0)), True, True, 0)  # NIN's
@example(((7, 7), (3, 3), (2, 2), (1, 1)), True, True, 0)
@example(((4, 4), (2, 2), (2, 2), (1, 1)), False, True, 0)
@example(((2, 1), (1, 2), (2, 1), (0, 1)), False, True, 0)  # the other axis has the padding
@example(
    ((6, 6), (3, 3), (3, 3), (2, 2)), True, True, 0
)  # torch keeps a window that starts in explicit padding
@settings(max_examples=150, deadline=None)
def test_pooling_is_caffes_for_every_geometry(geometry: Any, average: bool, up: bool, seed: int) -> None:
    size, kernel, stride, pad = geometry
    maps = (
        np.random.default_rng(seed).normal(size=(2, *size)) - 3
    )  # below 0: a zero of the padding would win a max
    wanted = caffe_pool(maps, kernel, stride, pad, average, up)
    args = {"kernel": list(kernel), "stride": list(stride), "pad": list(pad), "round_up": up}
    operation = "ave_pool" if average else "max_pool"
    if wanted is None:
        with pytest.raises(KdError, match="layer layer"):
            one((2, *size), operation, **args)
        return
    net = one((2, *size), operation, **args).double()
    found = net._modules["layer"](torch.from_numpy(maps[None])).numpy()[0]
    assert found.shape == wanted.shape == net.shapes["layer"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", ["ave_pool", "max_pool"])
def test_global_pooling_is_the_whole_map(op: str) -> None:
    pixels = torch.randn(2, 3, 5, 7)
    wanted = pixels.mean((2, 3)) if op == "ave_pool" else pixels.amax((2, 3))
    torch.testing.assert_close(one((3, 5, 7), op)(pixels), wanted)


def test_pool_window_refuses_impossible_windows() -> None:
    for arguments in ((4, 2, 1, 2), (2, 9, 1, 0), (6, 1, 4, 0)):
        with pytest.raises(KdError):
            pool_window(*arguments, round_up=True, padded=arguments[3] > 0)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_convolution_is_a_sum_over_windows(
    ky: int, kx: int, py: int, px: int, stride: int, dilation: int
) -> None:
    args = {
        "kernel": [ky, kx],
        "pad": [py, px],
        "stride": [stride, 1],
        "dilation": [dilation, 1],
        "groups": 2,
    }
    assume(6 + 2 * py >= dilation * (ky - 1) + 1)
    net = one((4, 6, 5), "conv", out=6, **args).double()
    layer = net.get_submodule("layer")
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    pixels = np.random.default_rng(ky).normal(size=(4, 6, 5))
    padded = np.pad(pixels, ((0, 0), (py, py), (px, px)))
    shape = net.shapes["layer"]
    wanted = np.zeros(shape)
    for o in range(6):
        group = slice(0, 2) if o < 3 else slice(2, 4)
        for y in range(shape[1]):
            for x in range(shape[2]):
                rows = [y * stride + dilation * i for i in range(ky)]
                window = padded[group][:, rows, x : x + kx]
                wanted[o, y, x] = (window * weight[o]).sum() + bias[o]
    found = net._modules["layer"](torch.from_numpy(pixels[None])).detach().numpy()[0]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_lrn_is_caffes_formula() -> None:
    pixels = np.random.default_rng(0).normal(size=(7, 2, 3))
    net = one((7, 2, 3), "lrn", size=3, alpha=0.5, beta=0.6, k=2.0)
    wanted = np.empty_like(pixels)
    for c in range(7):
        total = (pixels[max(0, c - 1) : c + 2] ** 2).sum(0)
        wanted[c] = pixels[c] / (2.0 + 0.5 / 3 * total) ** 0.6
    found = net(torch.from_numpy(pixels[None])).numpy().reshape(7, 2, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


MIXED = [
    node("conv1", "conv", out=6, kernel=[3, 3], pad=[1, 1]),
    node("bn1", "batch_norm", "conv1"),
    node("scale1", "scale", "bn1", bias=True),
    node("relu1", "relu", "scale1", negative_slope=0.1),
    node("left", "max_pool", "relu1", kernel=[3, 3], stride=[2, 2], pad=[1, 1]),
    node("right", "ave_pool", "relu1", kernel=[3, 3], stride=[2, 2], pad=[1, 1]),
    node("sum", "eltwise", "left", "right", operation="sum", coefficients=[1.0, -0.5]),
    node("max", "eltwise", "left", "right", operation="max"),
    node("both", "concat", "sum", "max", "left"),
    node("lrn", "lrn", "both", size=5, alpha=1e-2),
    node("floor", "ave_pool", "lrn", kernel=[3, 3], stride=[2, 2]),
    node("drop", "dropout", "floor", ratio=0.4),
    node("flat", "flatten", "drop"),
    node("act", "tanh", "flat"),
    node("ip", "linear", "act", out=5),
    node("squash", "sigmoid", "ip"),
]
SPEC: dict[str, Any] = {"input": [3, 9, 9], "nodes": MIXED, "output": "ip"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx_with_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    net = GraphNet(classes=5, input_size=(9, 9, 3), **SPEC).eval()
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        net, (torch.randn(2, 3, 9, 9),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in (1, 5):
        pixels = torch.randn(size, 3, 9, 9)
        (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        np.testing.assert_allclose(found, net(pixels).detach().numpy(), atol=1e-5)


def test_trains_and_saves() -> None:
    net = models.build("graph", classes=5, input_size=(9, 9, 3), **SPEC)
    net.train()
    loss = net(torch.randn(4, 3, 9, 9)).square().sum()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n != "ip.bias"
    )
    again = models.build("graph", classes=5, input_size=(9, 9, 3), **SPEC)
    again.load_state_dict(net.state_dict())
    pixels = torch.randn(3, 3, 9, 9)
    torch.testing.assert_close(again.eval()(pixels), net.eval()(pixels))
    assert {"conv1.weight", "conv1.bias", "ip.weight", "scale1.weight"} <= set(net.state_dict())
    assert [m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)] == [0.4]
    # same numbers in torch, but several onnxruntimes get it wrong
    assert not any(m.count_include_pad for m in net.modules() if isinstance(m, torch.nn.AvgPool2d))
    torch.testing.assert_close(
        net(pixels.to(memory_format=torch.channels_last)), net(pixels), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("nodes", "output", "words"),
    [
        ([node("a", "warp")], "a", "unknown operation warp"),
        ([node("a", "relu", "b")], "a", "input b is not computed"),
        ([node("a", "relu"), node("a", "relu")], "a", "name is taken"),
        ([node("forward", "relu")], "forward", "name is taken"),
        ([node("a.b", "relu")], "a.b", "name is taken"),
        ([node("a", "relu", ghost=1)], "a", "relu cannot be built"),
        ([node("a", "dropout", ratio="x")], "a", "dropout cannot be built"),
        (
            [node("a", "conv", out=4, kernel=[9, 9])],
            "a",
            "for 3×8×8: Calculated padded input size per channel",
        ),
        ([node("a", "conv", out=4, kernel=[1, 1], groups=2)], "a", "in_channels must be divisible by groups"),
        ([node("a", "conv", out=2**31, kernel=[1, 1])], "a", "exceeds the limit"),
        ([node("a", "conv", out=1, kernel=[1, 1], pad=[2**20, 2**20])], "a", "exceeds the limit"),
        ([node("a", "linear", out=4), node("b", "max_pool", "a")], "b", "takes maps C×H×W, its input is 4"),
        (
            [node("a", "linear", out=4), node("b", "eltwise", "a", "input")],
            "b",
            "its inputs differ: 4 and 3×8×8",
        ),
        (
            [node("a", "linear", out=4), node("b", "concat", "a", "input")],
            "b",
            "concat cannot be built from {} for 4 and 3×8×8",
        ),
        ([node("a", "relu")], "a", "its output is 3×8×8, not 4 classes"),
        ([node("a", "relu")], "z", "no node 'z'"),
    ],
)
def test_invalid_graphs_are_refused(nodes: list[dict[str, Any]], output: str, words: str) -> None:
    with pytest.raises(KdError) as raised:
        GraphNet(classes=4, input_size=(8, 8, 3), input=[3, 8, 8], nodes=nodes, output=output)
    assert words in raised.value.message


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(KdError, match="takes 3×8×8, the images are 3×9×9"):
        GraphNet(classes=4, input_size=(9, 9, 3), input=[3, 8, 8], nodes=[], output="input")


def test_safe_name_gives_valid_module_names() -> None:
    assert safe_name("inception/3a.pool") == "inception_3a_pool"
    for reserved in ("forward", "input", "shapes", "training", "_modules", ""):
        name = safe_name(reserved)
        net = GraphNet((1, 2, 2), [node(name, "relu")], name)
        assert name in dict(net.named_children())
    assert set(OPS) >= {"conv", "linear", "max_pool", "ave_pool", "relu", "dropout", "softmax", "flatten"}


def test_values_are_freed_after_their_last_use() -> None:
    """Of a chain with branches, one of which ends nowhere, only what is still read is alive."""
    nodes = [
        node("a", "relu"),
        node("b", "relu", "a"),
        node("nowhere", "relu", "b"),
        node("c", "relu", "b"),
        node("sum", "eltwise", "a", "c", operation="sum"),
        node("out", "relu", "sum"),
    ]
    network = GraphNet((2, 3, 3), nodes, "out")
    made: dict[str, weakref.ref[torch.Tensor]] = {}
    alive: dict[str, set[str]] = {}

    def hook(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            alive[name] = {other for other, ref in made.items() if ref() is not None}
            made[name] = weakref.ref(output)

        return look

    for name, module in network.named_children():
        module.register_forward_hook(hook(name))
    with torch.inference_mode():
        assert network(torch.ones(1, 2, 3, 3)).tolist() == [[2.0] * 18]
    assert alive["c"] == {"a", "b"}
    assert alive["sum"] == {"a", "c"}
    assert alive["out"] == {"sum"}
