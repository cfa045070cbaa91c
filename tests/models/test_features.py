"""Feature extraction: choice of stages; logits and weights unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base.errors import KdError, UsageError
from kdcli.engine import fit, read_metrics
from kdcli.models import checkpoint
from kdcli.models.feature_extractor import FeatureExtractor, find_stages
from tests.helpers import config, make_splits


class Plain(nn.Module):
    """Neither `stage_names` nor `head_name`: two sizes of maps, one module used twice, one that gives no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(80, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.norm(self.relu(self.conv1(pixels)))
        logits: Tensor = self.fc(self.flat(self.drop(self.relu(self.conv2(self.pool(maps))))))
        return logits


def example(channels: int = 3, side: int = 8) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_find_stages_defaults_to_the_last_maps_of_each_size() -> None:
    network = Plain()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert find_stages(network, example()) == ("norm", "conv2")
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_find_stages_returns_wanted_layers_in_running_order() -> None:
    assert find_stages(Plain(), example(), "conv2, conv1") == ("conv1", "conv2")
    for wanted in ("conv9", "relu", "flat"):
        with pytest.raises(UsageError, match=f"no layer '{wanted}' that returns maps"):
            find_stages(Plain(), example(), wanted)
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(UsageError, match="no maps"):
        find_stages(vectors, example())


class ChannelsLast(nn.Module):
    """Maps of 4×4, then the same with channels last, as in swin transformers; `cube` could be either."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.cube = nn.Linear(6, 4)
        self.narrow = nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(20, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        last = self.cube(self.norm(self.patches(pixels).permute(0, 2, 3, 1)))
        logits: Tensor = self.fc(self.narrow(last.permute(0, 3, 1, 2)).flatten(1))
        return logits


def test_outputs_with_channels_last_are_no_maps() -> None:
    network = ChannelsLast()
    assert find_stages(network, example()) == ("patches", "narrow")
    for name in ("norm", "cube"):
        with pytest.raises(UsageError, match=f"no layer '{name}' that returns maps"):
            find_stages(network, example(), name)
    assert find_stages(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 2)), example()) == (
        "0",
    )


@pytest.mark.parametrize("name", ["lenet", "nin", "convnet-small", "resnet8", "wrn-16-1"])
def test_reading_features_changes_neither_logits_nor_weights(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, classes=4, input_size=(32, 32, 3), width=0.25).eval()
    pixels = example(3, 32)
    expected = network(pixels)
    keys = list(network.state_dict())
    stages = find_stages(network, pixels)
    tap = FeatureExtractor(network, stages)
    logits, maps, embedding = tap(pixels)
    assert torch.equal(logits, expected)
    assert list(network.state_dict()) == keys
    assert len(maps) == len(stages) and all(stage.dim() == 4 for stage in maps)
    head = models.final_linear(network)
    if head is None:
        assert torch.equal(embedding, maps[-1].mean(dim=(2, 3)))
    else:
        torch.testing.assert_close(head(embedding), logits)
    tap.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_features_belong_to_the_same_pass_as_logits() -> None:
    network = Plain().eval()
    tap = FeatureExtractor(network, ("conv1", "conv2"))
    first, second = example(), -example()
    kept = [stage.clone() for stage in tap(first)[1]]
    network(second)  # a pass of the bare network in between, as validation makes one
    logits, maps, embedding = tap(second)
    torch.testing.assert_close(maps[0], network.conv1(second))
    assert not torch.equal(maps[0], kept[0])
    torch.testing.assert_close(embedding, maps[-1].mean(dim=(2, 3)))
    assert logits.shape == (2, 2)


@pytest.mark.slow
def test_features_of_a_compiled_network_belong_to_its_pass() -> None:
    torch.manual_seed(0)
    network = models.build("resnet8", classes=4, input_size=(8, 8, 3), width=0.25).eval()
    tap = FeatureExtractor(network, ("layer1", "layer3"))
    compiled = torch.compile(tap, backend="eager")
    for seed in range(3):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        logits, maps, embedding = compiled(pixels)
        network(-pixels)  # as validation does between steps
        expected = tap(pixels)
        for found, wanted in ((logits, expected[0]), (maps[0], expected[1][0]), (embedding, expected[2])):
            torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_an_onnx_teacher_and_several_teachers_have_no_features(workplace: Path) -> None:
    from kdcli.base.config import ExportConfig, make
    from kdcli.deploy.export import export

    splits = make_splits(size=(16, 16, 3))
    teacher = fit(config(method="ce", student="convnet-small", epochs=1, name="t"), splits).run.student
    export(
        models.load(teacher),
        make(ExportConfig, {"output": Path("t.onnx"), "with_preprocessing": True}),
        splits,
    )
    with pytest.raises(KdError, match="gives logits, but no features"):
        fit(config(method="at", teacher=Path("t.onnx"), student="convnet-tiny"), splits)
    with pytest.raises(UsageError, match="not averaged over several teachers"):
        fit(config(method="kd+at", teacher=[teacher, teacher], student="convnet-tiny"), splits)
    with pytest.raises(UsageError, match=r"teacher .* no layer 'x'"):
        fit(config(method="at", teacher=teacher, student="convnet-tiny", teacher_stages="x"), splits)
    with pytest.raises(UsageError, match=r"student convnet-tiny has no layer 'y'"):
        fit(config(method="at", teacher=teacher, student="convnet-tiny", student_stages="y"), splits)
    assert not list(Path("runs").glob("*at*"))


def test_feature_method_changes_the_student_and_not_the_teacher(workplace: Path) -> None:
    splits = make_splits(size=(16, 16, 3))
    teacher = fit(config(method="ce", student="convnet-small", epochs=1, name="t"), splits).run.student
    before = teacher.read_bytes()
    result = fit(config(method="at", teacher=teacher, student="convnet-tiny", epochs=2, name="s"), splits)
    assert teacher.read_bytes() == before
    assert result.teacher_passes == 1  # over the test images; training images were seen live
    lines = [line.terms["at"] for line in read_metrics(result.run.metrics_file) if line.kind == "epoch"]
    assert lines[1] < lines[0]
    stored = checkpoint.load(result.run.last).training
    assert stored is not None and stored["adapters"] == {}
