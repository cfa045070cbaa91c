"""kd predict: decoding, preprocessing, order and errors."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli import models
from kdcli.base.config import ExportConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import info, predict, test
from kdcli.data import preprocess
from kdcli.deploy.export import export_classifier
from tests.helpers import command_line

CLASSES = ("ant", "bee", "[cat]", "dog")
PIXELS = np.random.default_rng(5).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, info, predict, test)


@pytest.fixture
def model(workplace: Path) -> models.Classifier:
    torch.manual_seed(0)
    made = models.Classifier(
        models.build("convnet-tiny", classes=4, input_size=(8, 8, 3)),
        preprocess.fit("mean-std", PIXELS),
        arch="convnet-tiny",
        arch_args={},
        classes=CLASSES,
        input_size=(8, 8, 3),
    ).eval()
    made.save(workplace / "m.pt")
    return made


def wanted(model: models.Classifier, pixels: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The first classes by numpy, from the module's own logits for these very pixels."""
    with torch.inference_mode():
        logits = model(torch.tensor(pixels[None])).numpy()[0].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-shares)[:count]
    return [{"class": CLASSES[i], "probability": pytest.approx(shares[i], rel=1e-4)} for i in order]


def top_classes(done: Any) -> dict[str, Any]:
    return {one["image"]: one["top"] for one in json.loads(done.stdout)["images"]}


def test_predict_knows_images_by_content_as_training_does(
    run: Any, workplace: Path, model: models.Classifier
) -> None:
    folder = workplace / "odd"
    folder.mkdir()
    for name, kind in (
        ("a.gif", "GIF"),
        ("b.tiff", "TIFF"),
        ("c.jpg", "GIF"),
        ("d.dat", "PNG"),
        ("e", "TIFF"),
    ):
        Image.fromarray(PIXELS[0]).convert("P" if kind == "GIF" else "RGB").save(folder / name, kind)
    found = top_classes(run("predict", "m.pt", "odd", "--json"))
    assert list(found) == ["odd/a.gif", "odd/b.tiff", "odd/c.jpg", "odd/d.dat", "odd/e"]
    assert found["odd/b.tiff"] == found["odd/d.dat"] == wanted(model, PIXELS[0], 3)
    assert run("predict", "m.pt", "odd/c.jpg", "--json").exit_code == 0


def test_predict_files_folders_and_archives(run: Any, workplace: Path, model: models.Classifier) -> None:
    """All 70 of a folder, by name; two batches; what is no image is passed over there."""
    folder = workplace / "photos" / "more"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{number:03}.{'PNG' if number % 2 else 'bmp'}")
    (folder / "notes.txt").write_text("no image")
    (folder / "README").write_text("no image")
    with (folder / "film.mp4").open("wb") as film:
        film.truncate(300 << 20)  # larger than any image may be
    for hidden in (".thumbnails", "__MACOSX"):
        (folder / hidden).mkdir()
        (folder / hidden / "000.png").write_bytes(b"what the system keeps there")
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.write(folder / "001.PNG", "deep/x.png")
    found = top_classes(run("predict", "m.pt", "some.zip", "photos", "photos/more/003.PNG", "--json"))
    assert list(found)[:3] == ["some.zip/deep/x.png", "photos/more/000.bmp", "photos/more/001.PNG"]
    assert len(found) == 71  # the last is one of the folder's, named again
    assert found["some.zip/deep/x.png"] == found["photos/more/001.PNG"]
    for number in (0, 1, 63, 64, 69):
        name = f"photos/more/{number:03}.{'PNG' if number % 2 else 'bmp'}"
        assert found[name] == wanted(model, PIXELS[number], 3)


@pytest.mark.parametrize("raw", [pytest.param(False, marks=pytest.mark.slow), True])
def test_predict_with_an_exported_file(
    run: Any, workplace: Path, model: models.Classifier, raw: bool
) -> None:
    Image.fromarray(PIXELS[0]).save("a.png")
    config = make(ExportConfig, {"output": Path("m.onnx"), "with_preprocessing": raw})
    export_classifier(model, config, PIXELS, "toy", lambda event: None)
    found = top_classes(run("predict", "m.onnx", "a.png", "--json", "--top-k", "9"))
    assert found["a.png"] == wanted(model, PIXELS[0], 4)


def test_predict_fits_images_to_the_model(run: Any, workplace: Path, model: models.Classifier) -> None:
    """The middle square of what is wider; grey where the model takes grey; only its size where that is no square."""
    wide = np.concatenate([PIXELS[1], PIXELS[0], PIXELS[2]], axis=1)  # 8×24
    Image.fromarray(wide).save("wide.png")
    assert top_classes(run("predict", "m.pt", "wide.png", "--json"))["wide.png"] == wanted(
        model, PIXELS[0], 3
    )
    torch.manual_seed(0)
    grey = models.Classifier(
        models.build("convnet-tiny", classes=4, input_size=(8, 8, 1)),
        preprocess.fit("none", PIXELS[..., :1]),
        arch="convnet-tiny",
        arch_args={},
        classes=CLASSES,
        input_size=(8, 8, 1),
    ).eval()
    grey.save(workplace / "grey.pt")
    luma = np.asarray(Image.fromarray(PIXELS[0]).convert("L"))[..., None]
    Image.fromarray(PIXELS[0]).save("a.png")
    assert top_classes(run("predict", "grey.pt", "a.png", "--json"))["a.png"] == wanted(grey, luma, 3)
    oblong = models.Classifier(
        models.build("convnet-tiny", classes=4, input_size=(8, 24, 3)),
        preprocess.fit("none", wide[None]),
        arch="convnet-tiny",
        arch_args={},
        classes=CLASSES,
        input_size=(8, 24, 3),
    ).eval()
    oblong.save(workplace / "oblong.pt")
    assert top_classes(run("predict", "oblong.pt", "wide.png", "--json"))["wide.png"] == wanted(
        oblong, wide, 3
    )
    with pytest.raises(KdError, match=r"image a\.png is 8×8×3, the model takes 8×24×3"):
        run("predict", "oblong.pt", "a.png")


@pytest.mark.parametrize("name", ["m.pt", pytest.param("m.onnx", marks=pytest.mark.slow)])
def test_predict_crops_as_the_model_records(
    run: Any, workplace: Path, model: models.Classifier, name: str
) -> None:
    model.resize = 10
    model.save(workplace / "m.pt")
    if name == "m.onnx":
        config = make(ExportConfig, {"output": Path(name)})
        export_classifier(model, config, PIXELS, "toy", lambda event: None)
    Image.fromarray(PIXELS[0]).resize((30, 30)).save("a.png")
    resized = Image.open("a.png").resize((10, 10), Image.Resampling.BILINEAR)
    assert top_classes(run("predict", name, "a.png", "--json", "--top-k", "9"))["a.png"] == wanted(
        model, np.asarray(resized)[1:9, 1:9], 4
    )
    assert json.loads(run("info", name, "--json").stdout)["resize"] == 10
    assert "8×8×3, --resize 10" in run("info", name).stdout


def test_predict_errors(run: Any, workplace: Path, model: models.Classifier) -> None:
    Path("photos").mkdir()
    with pytest.raises(KdError, match="no images in photos"):
        run("predict", "m.pt", "photos")
    Path("photos/a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.fromarray(PIXELS[0]).save("photos/b.png")
    with pytest.raises(KdError, match=r"cannot read image photos/a\.png"):
        run("predict", "m.pt", "photos")
    assert list(top_classes(run("predict", "m.pt", "photos", "--skip-broken", "--json"))) == ["photos/b.png"]
    assert (
        "left out: cannot read image photos/a.png" in run("predict", "m.pt", "photos", "--skip-broken").stderr
    )
    Path("words.txt").write_text("no image")
    with pytest.raises(KdError, match=r"words\.txt is neither an image"):
        run("predict", "m.pt", "words.txt")
    with pytest.raises(KdError, match=r"no such file: nothing\.png"):
        run("predict", "m.pt", "photos/b.png", "nothing.png")
    with pytest.raises(UsageError, match="--top-k 0"):
        run("predict", "m.pt", "photos/b.png", "--top-k", "0")


def test_predict_table_escapes_names(run: Any, workplace: Path, model: models.Classifier) -> None:
    Image.fromarray(PIXELS[0]).save("[bold]a.png")
    out = run("predict", "m.pt", "[bold]a.png", "--top-k", "4").stdout
    for name in ("[bold]a.png", *CLASSES):
        assert name in out
