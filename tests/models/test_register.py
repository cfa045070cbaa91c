"""A network from a single new file: registered by a decorator, trained, stored and shown like kd's own."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from kdcli import models
from kdcli.base.config import InfoConfig
from kdcli.base.errors import UsageError
from kdcli.deploy.info import info
from kdcli.engine import fit
from tests.helpers import config, make_splits

NETWORK = '''
from torch import Tensor, nn

from kdcli.models import register


@register("perceptron", hidden=5)
class Perceptron(nn.Module):
    """One hidden layer."""

    head_name = "last"

    def __init__(self, classes: int, input_size: tuple[int, int, int], hidden: int, width: float = 1.0) -> None:
        super().__init__()
        height, columns, channels = input_size
        self.first = nn.Linear(height * columns * channels, int(hidden * width))
        self.last = nn.Linear(int(hidden * width), classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(pixels.flatten(1)).relu())
        return logits
'''


@pytest.fixture
def perceptron(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file, imported."""
    Path("perceptron_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setattr(models.registry, "MODELS", dict(models.MODELS))
    importlib.import_module("perceptron_network")


@pytest.mark.usefixtures("perceptron")
def test_registered_network_trains_and_appears_in_info() -> None:
    splits = make_splits(train=32, test=8)
    result = fit(config(method="ce", student="perceptron", width=2.0, epochs=1, val_fraction=0), splits)
    student = models.load(result.run.student)
    assert (student.arch, student.arch_args) == ("perceptron", {"width": 2.0})
    assert isinstance(student.network.first, torch.nn.Linear) and student.network.first.out_features == 10
    shown = info("perceptron", InfoConfig(classes=3, image_size=8, grey=True))
    assert [layer.name for layer in shown.layers] == ["first", "last"]
    assert shown.parameters == 64 * 5 + 5 + 5 * 3 + 3
    assert "perceptron" in models.names()
    with pytest.raises(UsageError, match="does not take these arguments"):
        models.build("perceptron", classes=3, input_size=(8, 8, 1), hidden=7)
