"""What the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli import data, models
from kdcli.base.config import ExportConfig, PredictConfig
from kdcli.data.preprocess import fit
from kdcli.deploy.export import export
from kdcli.deploy.load import load_model
from kdcli.deploy.predict import predict

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def snippet() -> str:
    [found] = re.findall(
        r"<!-- onnxruntime -->\n```python\n(.*?)```\n<!-- /onnxruntime -->", README, re.DOTALL
    )
    return str(found)


@pytest.fixture
def exported(workplace: Path) -> Path:
    """A network for images in colour that tells the digits apart a little: its fully connected layers are trained."""
    digits = data.load("digits", image_size=8)
    grey = digits.train.images
    colour = np.repeat(grey, 3, axis=3)
    train = data.ImageSet(colour, digits.train.labels, digits.train.classes, "colour")
    model = models.Classifier(
        models.build("convnet-tiny", classes=10, input_size=(8, 8, 3)),
        fit("mean-std", colour),
        arch="convnet-tiny",
        arch_args={},
        classes=digits.train.classes,
        input_size=(8, 8, 3),
        provenance={},
    ).eval()
    model.save(Path("model.pt"))
    config = ExportConfig(output=Path("exports/kd-lenet-1-images.onnx"), with_preprocessing=True)
    return export(Path("model.pt"), config, data.Splits("colour", "colour", train, train)).path


def test_readme_snippet_equals_predict(exported: Path) -> None:
    code = snippet()
    assert len(code.replace("\n\n", "\n").splitlines()) == 8
    assert "kdcli" not in code
    test = data.load("digits").test
    paths = []
    for number in range(10):
        path = Path(f"{number}.png")
        image = Image.fromarray(test.images[number, :, :, 0])
        sizes = {0: (8, 8), 8: (20, 20), 9: (31, 17)}  # the last two are made to fit
        image.convert("RGB").resize(sizes.get(number, (8, 8))).save(path)
        paths.append(path)
    expected = list(predict(load_model(exported, 1), paths, PredictConfig(top_k=1, threads=1)))
    for number, (path, seen) in enumerate(zip(paths, expected, strict=True)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("photo.png", str(path))],
            capture_output=True,
            text=True,
            check=True,
        )
        name, probability = done.stdout.split()
        assert name == seen.classes[0]
        off = 1e-5 if number < 9 else 1e-3  # Pillow's cut of the middle blends pixels beyond its edge in
        assert float(probability) == pytest.approx(seen.probabilities[0], abs=off)
