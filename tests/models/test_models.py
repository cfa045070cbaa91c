"""Networks: published sizes, any image size they claim, gradients everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli import models
from kdcli.base.errors import UsageError
from kdcli.models.layers import count_network

NAMES = [name for name in models.MODELS if name != "graph"]


@pytest.mark.parametrize(
    ("name", "size", "parameters", "macs"),
    [
        # counted by hand from the layers: conv k·k·in·out·H·W, inner product in·out
        ("lenet", (32, 32, 3), 3_497_866, 75 * 64 * 28**2 + 1600 * 128 * 10**2 + 3200 * 1024 + 1024 * 10),
        ("lenet-caffe", (28, 28, 1), 431_080, 25 * 20 * 24**2 + 500 * 50 * 8**2 + 800 * 500 + 500 * 10),
        ("nin", (32, 32, 3), 966_986, 222_486_528),
    ],
)
def test_sizes_of_the_reference_networks(
    name: str, size: tuple[int, int, int], parameters: int, macs: int
) -> None:
    network = models.build(name, classes=10, input_size=size).eval()
    assert models.parameter_count(network) == parameters
    assert count_network(network, torch.zeros(1, size[2], size[0], size[1])).macs == macs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "size",
    [(27, 30, 1), *(pytest.param(size, marks=pytest.mark.slow) for size in [(32, 32, 3), (33, 40, 1)])],
)
def test_any_size_and_every_parameter_learns(name: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = models.build(name, classes=7, input_size=size, width=0.5)
    logits = network(torch.randn(4, size[2], size[0], size[1]))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    for parameter in filter(lambda each: each.requires_grad, network.parameters()):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_too_small_an_image_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="too small"):
        models.build(name, classes=3, input_size=(1, 1, 3))


def test_lenet_has_no_relu_after_its_convolutions() -> None:
    """What conv2 gives reaches pool2 with its negative values."""
    network = models.build("lenet", classes=10, input_size=(32, 32, 3))
    seen: list[torch.Tensor] = []
    network.pool2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    network(torch.randn(1, 3, 32, 32))
    assert seen[0].min().item() < 0


def test_final_linear_is_the_last_layer_where_nothing_follows() -> None:
    for name in NAMES:
        network = models.build(name, classes=10, input_size=(32, 32, 3), width=0.25).eval()
        head = models.final_linear(network)
        if name == "nin":
            assert head is None
            continue
        assert head is not None
        with torch.no_grad():
            before = network(torch.ones(1, 3, 32, 32))
            head.bias.add_(1.0)
            torch.testing.assert_close(network(torch.ones(1, 3, 32, 32)), before + 1, rtol=1e-4, atol=1e-4)


def test_predict_logits_covers_the_last_batch_and_reports_progress() -> None:
    data = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    told: list[int] = []
    out = models.predict_logits(
        lambda images: images.float().reshape(-1, 1),
        data,
        batch_size=4,
        on_event=lambda event: told.append(event.done),
    )
    assert out[:, 0].tolist() == list(range(10))
    assert told[-1] == 10
