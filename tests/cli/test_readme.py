"""What the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli import models
from kdcli.base.config import ExportConfig, PredictConfig
from kdcli.data import Splits
from kdcli.data.preprocess import fit
from kdcli.deploy.export import export
from kdcli.deploy.load import load_model
from kdcli.deploy.predict import predict
from tests.helpers import image_set

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
EXPORT = "exports/kd-lenet-1-images.onnx"
SIDE = 9


def snippet() -> str:
    [found] = re.findall(
        r"<!-- onnxruntime -->\n```python\n(.*?)```\n<!-- /onnxruntime -->", README, re.DOTALL
    )
    return str(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Untrained networks for images in colour and in grey, with preprocessing, by the number of channels."""
    files = {}
    for channels in (3, 1):
        folder = tmp_path_factory.mktemp(f"exports-{channels}")
        train = image_set(20, (SIDE, SIDE, channels))
        model = models.Classifier(
            models.build("convnet-tiny", classes=3, input_size=train.input_size),
            fit("none", train.images),
            arch="convnet-tiny",
            arch_args={},
            classes=train.classes,
            input_size=train.input_size,
            resize={3: 10, 1: 0}[channels],
        ).eval()
        config = ExportConfig(output=folder / "model.onnx", with_preprocessing=True)
        files[channels] = export(model, config, Splits("", "", train, train)).path
    return files


def save_odd_images(folder: Path) -> list[Path]:
    """Files whose pixels are not simply those stored: turned, transparent, of other modes and odd sizes."""
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, dtype=np.uint8)

    turned = Image.Exif()
    turned[274] = 6
    image, alpha = Image.fromarray(noise(37, 22, 3)), Image.fromarray(noise(37, 22))
    palette = image.quantize(16)
    wide = random.integers(0, 65536, (37, 22)).astype(np.uint16)
    clear = Image.fromarray(noise(37, 22, 4))
    saved: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("turned.jpg", image, {"exif": turned}),
        ("turned.png", image, {"exif": turned}),
        ("alpha.png", clear, {}),
        ("alpha.webp", clear, {"lossless": True, "exact": True}),
        ("grey-alpha.png", Image.merge("LA", (alpha, alpha)), {}),
        ("palette.png", palette, {}),
        ("palette-clear.png", palette, {"transparency": bytes(range(0, 256, 16))}),
        ("colour-clear.png", image, {"transparency": image.getpixel((5, 5))}),
        ("grey.png", alpha, {}),
        ("grey-16.png", Image.fromarray(wide), {}),
        ("grey-16-clear.png", Image.fromarray(wide), {"transparency": int(wide[5, 5])}),
        ("grey-16.tif", Image.fromarray(wide), {}),
        ("palette.gif", palette, {}),
        ("bits.png", alpha.convert("1"), {}),
        ("print.jpg", image.convert("CMYK"), {}),
    ]
    for height, width in ((SIDE, SIDE), (1, 1), (3, 40), (SIDE, 11), (64, 64), (35, 36), (100, 101)):
        saved.append((f"{height}x{width}.png", Image.fromarray(noise(height, width, 3)), {}))
    for name, made, how in saved:
        made.save(folder / name, **how)
    return [folder / name for name, _, _ in saved]


@pytest.mark.parametrize("channels", [3, 1])
def test_readme_lines_give_the_pixels_of_predict(
    channels: int, exported: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = save_odd_images(tmp_path)
    model = load_model(exported[channels], 1)
    seen: list[np.ndarray] = []

    class Recorder:
        input_size, resize, classes = model.input_size, model.resize, model.classes

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            seen.extend(images.numpy())
            return model(images)

    expected = list(predict(Recorder(), paths, PredictConfig(top_k=1)))  # type: ignore[arg-type]
    code = snippet().replace(EXPORT, exported[channels].as_posix())
    for path, pixels, prediction in zip(paths, seen, expected, strict=True):
        variables: dict[str, Any] = {}
        exec(code.replace("photo.png", path.as_posix()), variables)
        assert variables["pixels"].dtype == np.uint8
        assert np.array_equal(variables["pixels"][0], pixels), path.name
        name, probability = capsys.readouterr().out.rsplit(" ", 1)
        assert name == prediction.classes[0]
        assert float(probability) == pytest.approx(prediction.probabilities[0], abs=1e-5)


def test_readme_lines_run_without_kd(exported: dict[int, Path], tmp_path: Path) -> None:
    code = snippet()
    assert "kdcli" not in code
    Image.new("RGB", (20, 30)).save(tmp_path / "photo.png")
    code = code.replace(EXPORT, exported[3].as_posix())
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("class ")
