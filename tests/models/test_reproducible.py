"""Layers that do not depend on how a batch is divided, and reading what is larger than memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.models import reproducible
from kdcli.models.reproducible import (
    DropoutKeys,
    GlobalBatchNorm,
    use_global_batch_norm,
    use_sample_dropout,
)

CPU = torch.device("cpu")


def dropout(p: float = 0.5, layers: int = 1, seed: int = 1) -> tuple[nn.Sequential, DropoutKeys]:
    network = nn.Sequential(*(nn.Dropout(p) for _ in range(layers)))
    draw = DropoutKeys(seed)
    use_sample_dropout(network, draw)
    return network.train(), draw


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    network, draw = dropout(p)
    draw.step(0, np.arange(400), CPU)
    out = network(torch.ones(400, 1000))
    kept = out != 0
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=0.003)  # 400,000 draws: 4 standard errors
    assert torch.unique(out).tolist() == pytest.approx([0.0, 1 / (1 - p)])
    # neither a sample nor an element is special
    for axis, count in ((0, 400), (1, 1000)):
        error = (p * (1 - p) / count) ** 0.5
        means = kept.double().mean(dim=axis)
        assert float(means.std()) == pytest.approx(error, rel=0.15)
        assert float((means - (1 - p)).abs().max()) < 5.5 * error


def test_dropout_masks_of_neighbours_are_uncorrelated() -> None:
    """Correlations of masks with those of the next sample, element, epoch and layer vanish."""
    network, draw = dropout(0.5, layers=2)

    def mask(epoch: int, first: int, layer: int = 0) -> torch.Tensor:
        draw.step(epoch, np.arange(first, first + 300), CPU)
        return (network[layer](torch.ones(300, 900)) != 0).double() * 2 - 1

    base = mask(0, 0)
    for other in (mask(0, 1), mask(1, 0), mask(0, 0, layer=1), base.roll(1, dims=1), base.flip(1)):
        assert abs(float((base * other).mean())) < 5 / (300 * 900) ** 0.5


def test_dropout_mask_depends_on_seed_epoch_and_sample() -> None:
    network, draw = dropout()
    values = torch.ones(6, 3, 4, 4)
    draw.step(2, np.arange(6), CPU)
    whole = network(values)
    torch.manual_seed(99)
    draw.step(2, np.array([4, 1]), CPU)
    assert torch.equal(network(values[:2]), whole[[4, 1]])
    draw.step(2, np.arange(6), CPU)
    assert torch.equal(network(values), whole)
    other, other_draw = dropout(seed=2)
    other_draw.step(2, np.arange(6), CPU)
    assert not torch.equal(other(values), whole)
    assert torch.equal(network.eval()(values), values)


def test_dropout_without_keys_raises() -> None:
    network, _ = dropout()
    with pytest.raises(RuntimeError, match=r"DropoutKeys\.step"):
        network(torch.ones(4, 2))


def test_dropout_of_another_first_axis_than_the_batch() -> None:
    """(positions, B, C), as in transformers: each value by itself, again with the same batch only."""
    network, draw = dropout(0.25)
    draw.step(0, np.arange(3), CPU)
    values = torch.ones(50, 3, 40)
    out = network(values)
    assert torch.unique(out).tolist() == pytest.approx([0.0, 1 / 0.75])
    for axis in range(3):  # six standard errors of 6,000 draws
        assert float((out.transpose(0, axis)[0] != 0).double().mean()) == pytest.approx(0.75, abs=0.16)
    assert float((out != 0).double().mean()) == pytest.approx(0.75, abs=0.034)
    assert torch.equal(network(values), out)
    draw.step(1, np.arange(3), CPU)
    assert not torch.equal(network(values), out)


def test_gradient_passes_where_values_pass() -> None:
    network, draw = dropout(0.25)
    draw.step(0, np.arange(5), CPU)
    values = torch.ones(5, 7, requires_grad=True)
    out = network(values)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert torch.equal(values.grad, out.detach())


@pytest.mark.parametrize(
    ("first", "plain_norm"),
    [
        (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)),
        (nn.Flatten(2), nn.BatchNorm1d(3)),
        (nn.Flatten(1), nn.BatchNorm1d(126)),
    ],
)
def test_global_batch_norm_of_one_process_is_batch_norm(
    monkeypatch: pytest.MonkeyPatch, first: nn.Module, plain_norm: nn.Module
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # the sum over one
    torch.manual_seed(0)
    plain = nn.Sequential(copy.deepcopy(first), copy.deepcopy(plain_norm))
    with torch.no_grad():
        for value in plain[1].parameters():
            value.uniform_(0.5, 2)
    other = copy.deepcopy(plain)
    use_global_batch_norm(other)
    assert type(other[1]) is GlobalBatchNorm
    for number in range(3):
        maps = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(number)) * 3 + 1
        left, right = plain(maps), other(maps)
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
        left.square().sum().backward()
        right.square().sum().backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    torch.testing.assert_close(other.eval()(maps), plain.eval()(maps))


def test_global_batch_norm_of_two_halves_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes played one after the other: what the other one would add is computed by hand."""
    maps = torch.randn(7, 2, 3, 3, generator=torch.Generator().manual_seed(4))
    mine, theirs = maps[:4], maps[4:]
    added: list[torch.Tensor] = [
        torch.cat([theirs.double().sum(dim=(0, 2, 3)), torch.tensor([27.0], dtype=torch.float64)]),
        (theirs - maps.mean(dim=(0, 2, 3))[:, None, None]).double().square().sum(dim=(0, 2, 3)),
    ]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(added.pop(0)))
    layer = nn.BatchNorm2d(2)
    expected = copy.deepcopy(layer)(maps)[:4]
    use_global_batch_norm(layer)
    torch.testing.assert_close(layer(mine), expected, rtol=1e-5, atol=1e-5)
    assert not added


def test_the_mixing_function_is_a_bijection_of_the_low_bits() -> None:
    values = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    assert len(torch.unique(reproducible._mix(values))) == 2**17
