"""Runs for tests of the page: trained once, copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kdcli.base.config import make
from kdcli.cli import output
from kdcli.data import ImageSet, Splits, load
from kdcli.data.images import fingerprint_of
from kdcli.engine import fit
from kdcli.methods import TrainConfig
from tests.helpers import make_splits
from tests.report.helpers import EVIL_NAME, HOSTILE


def hostile_splits() -> Splits:
    plain = make_splits(160, 80, (12, 12, 3), classes=len(HOSTILE))

    def renamed(images: ImageSet) -> ImageSet:
        return ImageSet(
            images.images,
            images.labels,
            HOSTILE,
            fingerprint_of(images.images, images.labels, HOSTILE),
        )

    return Splits("toy", "toy <b>", renamed(plain.train), renamed(plain.test))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Splits]:
    """A teacher and three runs, one of a hostile name, one without a teacher."""
    folder = tmp_path_factory.mktemp("project")
    splits = hostile_splits()
    common = {"data": "toy", "batch_size": 32, "lr": 1e-2, "val_fraction": 0.2, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teacher = {**common, "method": "ce", "student": "convnet-small", "epochs": 3, "name": "base"}
        first = fit(make(TrainConfig, teacher), splits)
        Path("weights").mkdir()
        shutil.copyfile(first.run.student, "weights/teacher.pt")
        for method, name, epochs in (("kd", "kd-1", 2), ("logits", "logits-1", 1), ("ce", "ce-1", 1)):
            values = {**common, "method": method, "student": "convnet-tiny", "epochs": epochs, "name": name}
            if method != "ce":
                values["teacher"] = "weights/teacher.pt"
            fit(make(TrainConfig, values), splits)
        Path("runs/logits-1").rename(Path("runs") / EVIL_NAME)
        config = Path("runs") / EVIL_NAME / "config.toml"
        config.write_text(config.read_text().replace('"toy"', '"<script>alert(3)</script>\\u202e"'))
        Path("runs/unfinished").mkdir()
        shutil.copyfile("runs/kd-1/config.toml", "runs/unfinished/config.toml")
    return folder, splits


@pytest.fixture
def project(made: tuple[Path, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, as the current directory; the data has the name that the runs recorded."""
    source, splits = made
    shutil.copytree(source, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.setitem(load.__globals__["DATASETS"], "toy", lambda request: splits)
    monkeypatch.setattr(output.settings, "quiet", False)
    return tmp_path / "p"
