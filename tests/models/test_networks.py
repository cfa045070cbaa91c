"""The field's networks: published sizes, blocks as their papers have them, stages, widths, files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import mobilenetv2, shufflenetv2

from kdcli import models
from kdcli.base.config import ExportConfig, InfoConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.data import preprocess
from kdcli.deploy.info import info
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier, checkpoint
from kdcli.models.common import scaled
from kdcli.models.feature_extractor import find_stages
from kdcli.models.layers import count_network
from kdcli.models.mobilenet import InvertedResidual
from kdcli.models.shufflenet import GroupUnit, SplitUnit, shuffled
from tests.helpers import ROOT

# parameters with 100 classes: the literature's figures; ResNets, WRN-16-1 and VGG8 added up by hand as well
PUBLISHED = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn-16-1": 180_916,
    "wrn-16-2": 703_284,
    "wrn-40-1": 569_780,
    "wrn-40-2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2-half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    # whitening, the groups' convolutions and batch norms, fc: added up by hand
    "cifarnet": 312 + (13_824 + 36_864 + 256) + (147_456 + 589_824 + 1_024) + (1_179_648 + 1_024) + 25_700,
}
SMALLEST = ("resnet8", "wrn-16-1", "vgg8", "mobilenetv2-half", "shufflenetv1", "shufflenetv2")
NARROW = 0.25

# channels and side of the maps of a 32×32 image at the end of each stage
STAGES = {
    "lenet": [(64, 14), (128, 5)],
    "lenet-caffe": [(20, 14), (50, 5)],
    "nin": [(96, 16), (192, 8), (192, 8)],
    "nin-fc": [(96, 16), (192, 8), (192, 8)],
    "convnet-tiny": [(8, 32), (16, 16)],
    "convnet-small": [(16, 32), (32, 16), (64, 8)],
    "convnet-large": [(64, 32), (128, 16), (128, 8)],
    **{f"resnet{depth}": [(16, 32), (32, 16), (64, 8)] for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet32x4": [(64, 32), (128, 16), (256, 8)],
    "wrn-16-1": [(16, 32), (32, 16), (64, 8)],
    "wrn-40-1": [(16, 32), (32, 16), (64, 8)],
    "wrn-16-2": [(32, 32), (64, 16), (128, 8)],
    "wrn-40-2": [(32, 32), (64, 16), (128, 8)],
    "vgg8": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)],
    "vgg13": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenetv2-half": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
    "cifarnet": [(64, 15), (256, 7), (256, 3)],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes_alone(name: str, *, classes: int = 100, side: int = 32, **args: Any) -> nn.Module:
    """A network without values: what only shapes decide costs nothing."""
    with torch.device("meta"):
        return models.build(name, classes=classes, input_size=(side, side, 3), **args).eval()


def settled(network: nn.Module, example: Tensor) -> nn.Module:
    """In eval mode; its batch norm has the statistics of an example, so that signals last, and is no identity."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in norms:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            module.momentum = 1.0
        network.train()(example)
    return network.eval()


def made(
    name: str, *, classes: int = 5, size: tuple[int, int, int] = (32, 32, 3), width: float = NARROW
) -> nn.Module:
    torch.manual_seed(0)
    network = models.build(name, classes=classes, input_size=size, width=width)
    return settled(network, images(4, size[2], *size[:2]))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    assert models.parameter_count(shapes_alone(name)) == PUBLISHED[name]


def resnet_by_hand(depth: int, widths: list[int], classes: int) -> int:
    """Convolutions k·k·in·out, batch norms two a channel, a shortcut where channels change."""
    blocks = (depth - 2) // 6
    first, *stages = widths
    total, before = 27 * first + 2 * first, first
    for after in stages:
        total += 9 * before * after + 9 * after**2 + 4 * after
        total += before * after + 2 * after if before != after else 0
        total += (blocks - 1) * (18 * after**2 + 4 * after)
        before = after
    return total + before * classes + classes


@pytest.mark.parametrize(
    ("name", "depth", "width", "widths"),
    [
        ("resnet8", 8, 1.0, [16, 16, 32, 64]),
        ("resnet20", 20, 0.5, [8, 8, 16, 32]),
        ("resnet110", 110, 0.5, [8, 8, 16, 32]),
        ("resnet8x4", 8, 0.5, [16, 32, 64, 128]),
        ("resnet32x4", 32, 1.5, [48, 96, 192, 384]),
        ("resnet8", 8, 0.03, [1, 1, 1, 2]),  # 0.48, 0.48, 0.96, 1.92; but where stride is 2, a shortcut
        ("resnet8", 8, 0.3, [5, 5, 10, 19]),  # 4.8, 4.8, 9.6, 19.2
    ],
)
def test_width_multiplies_each_count_of_channels(
    name: str, depth: int, width: float, widths: list[int]
) -> None:
    expected = resnet_by_hand(depth, widths, 10)
    if widths == [1, 1, 1, 2]:
        expected += 1 + 2
    assert models.parameter_count(shapes_alone(name, classes=10, width=width)) == expected


def test_width_rounds_to_the_multiple_of_a_family() -> None:
    assert [scaled(10, 0.25), scaled(10, 0.24), scaled(3, 0.01), scaled(7, 1.0)] == [3, 2, 1, 7]
    assert [scaled(116, 0.5, 2), scaled(12, 0.5, 4), scaled(12, 0.4, 4), scaled(1, 0.1, 12)] == [58, 8, 4, 12]
    least = shapes_alone("shufflenetv1", width=0.05)  # 1.2, 12, 24, 48: each 12 more than what it reads
    counts = [least.conv1, *(stage[1].conv3 for stage in layers(least))]
    assert [module.out_channels for module in counts] == [12, 24, 36, 48]


def layers(network: nn.Module) -> list[Any]:
    return [network.get_submodule(name) for name in network.stage_names]


@pytest.mark.parametrize("name", SMALLEST)
@settings(max_examples=2, deadline=None)
@given(width=st.floats(0.01, 2), side=st.integers(17, 70), colours=st.sampled_from([1, 3]))
def test_any_width_gives_a_network_that_runs(name: str, width: float, side: int, colours: int) -> None:
    with torch.device("meta"):
        size = (side, side + 3, colours)
        network = models.build(name, classes=5, input_size=size, width=width)
        assert network(torch.empty(2, colours, side, side + 3)).shape == (2, 5)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf"), 65.0])
def test_invalid_width_is_a_usage_error(width: float) -> None:
    with pytest.raises(UsageError, match="width cannot be"):
        models.build("resnet8", classes=3, input_size=(32, 32, 3), width=width)


def test_every_network_by_name_takes_a_width_and_a_converted_one_does_not() -> None:
    assert all(models.accepts(name, "width") for name in models.names())
    assert not models.accepts("graph", "width")
    with pytest.raises(UsageError, match="unknown network"):
        models.accepts("resnet9000", "width")


def test_width_multiplies_the_widths_of_older_networks() -> None:
    half = shapes_alone("lenet", width=0.5)
    assert [half.conv1.out_channels, half.conv2.out_channels, half.ip1.out_features] == [32, 64, 512]
    own = shapes_alone("lenet", widths=[6, 9, 11], width=0.5)
    assert [own.conv1.out_channels, own.conv2.out_channels, own.ip1.out_features] == [3, 5, 6]
    nin = shapes_alone("nin-fc", width=0.25, classes=7)
    counts = [module.out_channels for module in nin.modules() if isinstance(module, nn.Conv2d)]
    assert counts == [48, 40, 24, 48, 48, 48, 48, 48]
    assert (nin.ip1.out_features, nin.ip2.out_features) == (256, 7)
    assert shapes_alone("nin", width=0.25, classes=7).cccp6.out_channels == 7
    assert shapes_alone("convnet-tiny", width=2.0).fc.in_features == 32


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_is_called_once_and_gives_its_maps(name: str) -> None:
    network = shapes_alone(name)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for stage in network.stage_names:
        network.get_submodule(stage).register_forward_hook(
            lambda module, args, output, stage=stage: seen.append((stage, tuple(output.shape)))
        )
    network(torch.empty(2, 3, 32, 32, device="meta"))
    expected = [(2, channels, side, side) for channels, side in STAGES[name]]
    assert seen == list(zip(network.stage_names, expected, strict=True))


def test_every_network_defines_its_stages() -> None:
    assert set(STAGES) == set(models.names())


@pytest.mark.parametrize("name", [name for name in STAGES if name != "nin"])
def test_the_last_layer_reads_a_vector(name: str) -> None:
    network = shapes_alone(name)
    head = models.final_linear(network)
    assert head is not None
    seen: list[tuple[int, ...]] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    network(torch.empty(2, 3, 32, 32, device="meta"))
    assert seen == [(2, head.in_features)]


def test_where_stages_end_with_a_relu() -> None:
    """As the literature takes them: after the ReLU, but in pre-activation and linear-bottleneck networks."""
    for name in SMALLEST:
        network, least = made(name, width=0.5), []
        for stage in layers(network):
            stage.register_forward_hook(
                lambda module, args, output, least=least: least.append(float(output.min()))
            )
        with torch.inference_mode():
            network(images(2, 3, 32, 32))
        assert all(value < 0 for value in least) == (name in ("wrn-16-1", "mobilenetv2-half")), name
        assert all(value >= 0 for value in least) == (name not in ("wrn-16-1", "mobilenetv2-half")), name


def test_older_networks_keep_the_names_of_their_weights() -> None:
    trunk = ["conv1", "cccp1", "cccp2", "conv2", "cccp3", "cccp4", "conv3", "cccp5"]
    for name, names in {
        "nin": [*trunk, "cccp6"],
        "nin-fc": [*trunk, "ip1", "ip2"],
        "lenet": ["conv1", "conv2", "ip1", "ip2"],
    }.items():
        assert list(shapes_alone(name).state_dict()) == [
            f"{layer}.{part}" for layer in names for part in ("weight", "bias")
        ]


def test_a_converted_network_has_the_last_node_of_each_size_as_stages() -> None:
    def node(name: str, source: str, op: str, **args: Any) -> dict[str, Any]:
        return {"name": name, "op": op, "inputs": [source], "args": args}

    network = models.build(
        "graph",
        classes=2,
        input_size=(8, 8, 3),
        input=(3, 8, 8),
        nodes=[
            node("conv", "input", "conv", out=4, kernel=[3, 3], pad=[1, 1]),
            node("relu", "conv", "relu"),
            node("pool", "relu", "max_pool", kernel=[2, 2], stride=[2, 2]),
            node("last", "pool", "conv", out=2, kernel=[1, 1]),
            node("whole", "last", "ave_pool", kernel=[4, 4]),
        ],
        output="whole",
    )
    example = torch.zeros(2, 3, 8, 8)
    assert find_stages(network, example) == ("relu", "pool")  # one map a class is the answer, not a feature
    answers = models.build(
        "graph",
        classes=2,
        input_size=(8, 8, 3),
        input=(3, 8, 8),
        nodes=[
            node("maps", "input", "conv", out=5, kernel=[3, 3], pad=[1, 1]),
            node("relu", "maps", "relu"),
            node("scores", "relu", "conv", out=2, kernel=[1, 1]),
            node("whole", "scores", "ave_pool", kernel=[8, 8]),
        ],
        output="whole",
    )
    assert find_stages(answers, example) == ("relu",)


def norm(maps: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """(x − mean) / √(variance + 1e-5) · weight + bias, written out."""
    mean, variance, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (maps - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def test_resnet8_is_its_formula() -> None:
    network = made("resnet8", width=0.5).double()
    state, pixels = network.state_dict(), images(2, 3, 32, 32).double()
    maps = torch.relu(norm(F.conv2d(pixels, state["conv1.weight"], padding=1), state, "bn1"))
    for number in (1, 2, 3):
        block, stride = f"layer{number}.0", 1 if number == 1 else 2
        inner = F.conv2d(maps, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        inner = torch.relu(norm(inner, state, f"{block}.bn1"))
        inner = norm(F.conv2d(inner, state[f"{block}.conv2.weight"], padding=1), state, f"{block}.bn2")
        if number > 1:
            maps = F.conv2d(maps, state[f"{block}.shortcut.0.weight"], stride=2)
            maps = norm(maps, state, f"{block}.shortcut.1")
        maps = torch.relu(inner + maps)
    expected = maps.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(pixels), expected, rtol=1e-9, atol=1e-9)


def test_wrn_16_1_is_its_formula() -> None:
    network = made("wrn-16-1", width=0.5).double()
    state, pixels = network.state_dict(), images(2, 3, 32, 32).double()
    maps = F.conv2d(pixels, state["conv1.weight"], padding=1)
    for number in (1, 2, 3):
        for unit in (0, 1):
            block, stride = f"block{number}.{unit}", 2 if number > 1 and unit == 0 else 1
            active = torch.relu(norm(maps, state, f"{block}.bn1"))
            inner = F.conv2d(active, state[f"{block}.conv1.weight"], stride=stride, padding=1)
            inner = torch.relu(norm(inner, state, f"{block}.bn2"))
            inner = F.conv2d(inner, state[f"{block}.conv2.weight"], padding=1)
            if stride == 2:
                maps = F.conv2d(active, state[f"{block}.shortcut.weight"], stride=2)
            maps = inner + maps
    maps = torch.relu(norm(maps, state, "bn1"))
    expected = maps.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(pixels), expected, rtol=1e-9, atol=1e-9)


def test_shuffle_takes_one_channel_of_each_group_in_turn() -> None:
    maps = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffled(maps, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert shuffled(maps, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert shuffled(maps, 1) is maps


@pytest.mark.parametrize("halves", [False, True])
def test_a_unit_of_shufflenet_is_its_formula(halves: bool) -> None:
    before, after = 24, 60 if halves else 24
    unit = settled(GroupUnit(before, after, 2 if halves else 1), images(4, before, 7, 6)).double()
    state, maps = unit.state_dict(), images(2, before, 7, 6).double()
    inner = torch.relu(norm(F.conv2d(maps, state["conv1.weight"], groups=3), state, "bn1"))
    size = inner.shape[1]
    inner = inner[:, [group * size // 3 + place for place in range(size // 3) for group in range(3)]]
    inner = F.conv2d(inner, state["conv2.weight"], stride=2 if halves else 1, padding=1, groups=size)
    inner = norm(
        F.conv2d(torch.relu(norm(inner, state, "bn2")), state["conv3.weight"], groups=3), state, "bn3"
    )
    if halves:
        padded = F.pad(maps, (1, 1, 1, 1))
        pooled = sum(padded[:, :, y : y + 7 : 2, x : x + 6 : 2] for y in range(3) for x in range(3)) / 9
        expected = torch.relu(torch.cat([inner, pooled], 1))
    else:
        expected = torch.relu(inner + maps)
    torch.testing.assert_close(unit(maps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs", "channels"),
    [
        (SplitUnit(8, 8, 1), shufflenetv2.InvertedResidual(8, 8, 1), 8),
        (SplitUnit(6, 8, 2), shufflenetv2.InvertedResidual(6, 8, 2), 6),
        (InvertedResidual(4, 4, 1, 6), mobilenetv2.InvertedResidual(4, 4, 1, 6), 4),
        (InvertedResidual(4, 6, 2, 6), mobilenetv2.InvertedResidual(4, 6, 2, 6), 4),
    ],
)
def test_units_are_those_of_torchvision(ours: nn.Module, theirs: nn.Module, channels: int) -> None:
    torch.manual_seed(0)
    theirs = settled(theirs, images(4, channels, 7, 6))
    values = list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    for number, module in enumerate(ours.eval().modules()):  # a plain ReLU where the paper clips at 6
        module.register_forward_hook(lambda *seen, number=number: largest.append(float(seen[2].max())))
    largest: list[float] = []
    maps = images(2, channels, 7, 6)
    with torch.inference_mode():
        torch.testing.assert_close(ours(maps), theirs(maps))
    assert max(largest) < 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_grey_and_colour_images_of_any_size_and_each_by_itself(name: str) -> None:
    if name not in SMALLEST and name not in ("resnet8x4", "vgg13"):
        network = made(name, width=0.1, size=(17, 20, 1))
        assert network(images(1, 1, 17, 20)).shape == (1, 5)
        return
    for size in ((28, 28, 1), (32, 32, 3)):
        network = made(name, size=size)
        pixels = images(3, size[2], *size[:2])
        with torch.inference_mode():
            logits = network(pixels)
            assert logits.shape == (3, 5)
            assert float(logits.std(dim=0).mean()) > 0.03  # they tell images apart
            for number in range(3):
                alone = network(pixels[number : number + 1])
                torch.testing.assert_close(alone, logits[number : number + 1], rtol=1e-4, atol=1e-4)
            last = network.to(memory_format=torch.channels_last)
            turned = last(pixels.to(memory_format=torch.channels_last))
        torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_seed_gives_the_same_weights_and_convolutions_start_by_he(name: str) -> None:
    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return models.build(name, classes=5, input_size=(32, 32, 3), width=0.5)

    first, second, other = (list(fresh(seed).state_dict().values()) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    for module in fresh(1).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            expected = (2 / (module.out_channels * np.prod(module.kernel_size))) ** 0.5
            assert abs(float(module.weight.detach().std()) / expected - 1) < 0.1


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("resnet8", 8),
        ("wrn-16-1", 8),
        ("vgg8", 16),
        ("mobilenetv2-half", 17),
        ("shufflenetv1", 9),
        ("shufflenetv2", 9),
        ("cifarnet", 17),
    ],
)
def test_the_smallest_image_trains_one_at_a_time_and_a_smaller_one_is_refused(name: str, least: int) -> None:
    torch.manual_seed(0)
    network = models.build(name, classes=5, input_size=(least, least, 3), width=NARROW)
    network(images(1, 3, least, least)).sum().backward()  # batch norm refuses a single value
    with pytest.raises(UsageError, match=f"{least + 3}×{least - 1} are too small") as caught:
        models.build(name, classes=5, input_size=(least + 3, least - 1, 3))
    assert f"{least}×{least}" in caught.value.hint


def test_cifarnet_whitens_the_patches_of_the_images_it_is_fitted_on() -> None:
    network = models.build("cifarnet", classes=5, input_size=(32, 32, 3), width=NARROW)
    pixels = images(40, 3, 32, 32).cumsum(3)  # neighbours are alike
    network.fit_to_images(pixels)  # type: ignore[operator]
    weight = network.whiten.weight.detach().double().numpy().reshape(24, 12)
    patches = np.lib.stride_tricks.sliding_window_view(pixels.double().numpy(), (2, 2), axis=(2, 3))
    patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    assert np.array_equal(weight[:12], -weight[12:])
    white = patches @ weight[:12].T
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(white.T @ white / len(white), np.diag(values / (values + 5e-4)), atol=1e-4)
    assert not network.whiten.weight.requires_grad


def test_vgg_halves_large_images_once_more() -> None:
    for side, last in ((32, 4), (63, 7), (64, 4)):
        network, seen = shapes_alone("vgg8", side=side), []
        network.block4.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.shape[-1])
        )
        network(torch.empty(1, 3, side, side, device="meta"))
        assert seen == [last]


RAW = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


def as_classifier(name: str) -> Classifier:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return Classifier(
        made(name),
        preprocess.fit("mean-std", pixels),
        arch=name,
        arch_args={"width": NARROW},
        classes=tuple("abcde"),
        input_size=(32, 32, 3),
    ).eval()


@pytest.mark.parametrize("name", SMALLEST)
def test_a_checkpoint_gives_the_same_logits_again(name: str, tmp_path: Path) -> None:
    model = as_classifier(name)
    with torch.inference_mode():
        expected = model(RAW)
    model.save(tmp_path / "model.pt")
    loaded = models.load(tmp_path / "model.pt")
    assert loaded.arch_args == {"width": NARROW}
    with torch.inference_mode():
        torch.testing.assert_close(loaded(RAW), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_an_onnx_file_gives_the_same_logits_for_any_batch(name: str) -> None:
    model = as_classifier(name)
    kept = 2  # units are alike and each takes the exporter its time: one unit a stage, but two of the first
    for stage in [*model.network.children(), *getattr(model.network, "blocks", ())]:
        if isinstance(stage, nn.Sequential) and type(stage[0]).__module__.startswith("kdcli") and stage[1:]:
            del stage[kept:]
            kept = 1
    settled(model.network, images(4, 3, 32, 32))
    with torch.inference_mode():
        expected = model(RAW)
        prepared = model.prepare(RAW).contiguous().numpy()
    assert float(expected.std(dim=0).mean()) > 0.03  # it tells images apart
    proto = to_onnx(model, opset=ExportConfig().opset, with_preprocessing=False)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        [logits] = session.run(None, {"input": prepared[:batch]})
        np.testing.assert_allclose(logits, expected[:batch].numpy(), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_with_another_width_than_its_weights_is_refused(tmp_path: Path) -> None:
    as_classifier("resnet8").save(tmp_path / "model.pt")
    stored = checkpoint.load(tmp_path / "model.pt")
    for width in (0.5, 0, "wide", None):
        stored.arch_args["width"] = width
        with pytest.raises(KdError):
            models.from_checkpoint(stored)


def test_info_shows_a_network_by_its_name() -> None:
    found = info("resnet8x4", InfoConfig(classes=100))
    assert (found.parameters, found.input_size) == (PUBLISHED["resnet8x4"], (32, 32, 3))
    assert sum(row.parameters for row in found.layers) == found.parameters
    assert found.layers[0].name == "conv1"


@pytest.mark.slow
def test_docs_table_lists_each_network_and_its_cost() -> None:
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(models.names())
    for name, parameters, macs in rows:
        network = shapes_alone(name)
        assert int(parameters.replace(",", "")) == models.parameter_count(network), name
        assert f"{count_network(network, torch.empty(1, 3, 32, 32, device='meta')).macs / 1e6:.1f}" == macs, (
            name
        )
