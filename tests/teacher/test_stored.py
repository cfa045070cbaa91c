"""Teachers that are stored outputs: packs of logits, and CSV files of probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli import data as data_sets
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event, Note
from kdcli.data import Splits
from kdcli.engine import RunResult, fit
from kdcli.engine.packing import pack_logits
from kdcli.models import checkpoint
from kdcli.teacher import Teacher
from tests.helpers import config, image_folder, make_splits
from tests.teacher.test_teacher import make_teacher

PACK = Path("pack/pack.json")


def tensors(result: RunResult) -> str:
    return checkpoint.digest(checkpoint.load(result.run.student).state_dict)


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": "none"},
        {"augment": "flip-mixup", "views": 2, "view_seed": 3},
        {"augment": "flip", "cache_top_k": 1},
    ],
)
def test_a_student_of_a_pack_equals_one_of_the_teacher(workplace: Path, settings: dict[str, Any]) -> None:
    """Bit by bit, without the teacher's file and with no cache; also its agreement on the test images."""
    make_teacher(Path("t.pt"))
    splits = make_splits()
    expected = fit(config(teacher=Path("t.pt"), name="a", cache_dir="own", **settings), splits)
    pack_logits(config(teacher=Path("t.pt"), **settings), splits, Path("pack"))
    Path("t.pt").unlink()
    result = fit(config(teacher=PACK, name="b", **settings), splits)
    assert tensors(result) == tensors(expected)
    assert result.evaluation == expected.evaluation
    assert result.teacher_passes == 0
    assert not list(Path("cache").rglob("view-*"))


def other_label(splits: Splits) -> Splits:
    labels = splits.train.labels.copy()
    labels[0] = 2
    return replace(splits, train=replace(splits.train, labels=labels, fingerprint="f" * 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "flip-crop-mixup"}, "other --augment: flip-mixup there, flip-crop-mixup here"),
        ({"augment": "flip-crop-mixup", "seed": 1}, "other --augment"),  # the first difference
        ({"seed": 1}, "other --view-seed: 0 there, 1 here"),
        ({"val_fraction": 0.3}, "other --val-fraction"),
        ({"views": 3}, "other --views: 2 there, 3 here"),
        ({"data": "other"}, "other images, labels or names of classes"),
    ],
)
def test_a_pack_of_other_views_is_refused(workplace: Path, settings: dict[str, Any], message: str) -> None:
    make_teacher(Path("t.pt"))
    splits, made = make_splits(), {"augment": "flip-mixup", "views": 2, "data": "toy"}
    pack_logits(config(teacher=Path("t.pt"), **made), splits, Path("pack"))
    if "data" in settings:
        splits = other_label(splits)
    with pytest.raises(KdError, match=f"pack was made with {message}") as caught:
        fit(config(teacher=PACK, **{**made, **settings}), splits)
    assert "--data toy" in caught.value.hint
    assert "--augment flip-mixup --views 2" in caught.value.hint
    assert caught.value.hint.endswith("--view-seed 0")
    assert not Path("runs").exists()


def test_a_pack_of_views_of_another_torchvision_is_refused(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(Path("t.pt"))
    splits, made = make_splits(), {"augment": "resized-crop", "views": 1, "data": "toy"}
    pack_logits(config(teacher=Path("t.pt"), **made), splits, Path("pack"))
    monkeypatch.setattr("kdcli.teacher.teacher.version", lambda name: "9.9")
    with pytest.raises(KdError, match=r"other version of torchvision, .*, 9\.9 here"):
        fit(config(teacher=PACK, **made), splits)


def test_a_damaged_pack_is_refused(workplace: Path) -> None:
    make_teacher(Path("t.pt"))
    splits = make_splits()
    pack_logits(config(teacher=Path("t.pt")), splits, Path("pack"))
    with pytest.raises(UsageError, match="pack is a pack already"):
        pack_logits(config(teacher=Path("t.pt")), splits, Path("pack"))
    with pytest.raises(KdError, match="no model"):
        fit(config(teacher=PACK, teacher_cache="off"), splits)
    with pytest.raises(UsageError, match="mixes stored logits and models"):
        fit(config(teacher=(PACK, Path("t.pt"))), splits)
    [file] = (path for path in Path("pack").rglob("view-0000.npy") if len(np.load(path)) == 90)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(KdError, match=r"view-0000\.npy is missing or damaged"):
        fit(config(teacher=PACK), splits)
    for text in ("{}", "{", '{"format": "kd-logits-1", "manifests": ["0"]}'):
        PACK.write_text(text, encoding="utf-8")
        with pytest.raises(KdError):
            fit(config(teacher=PACK), splits)
    assert not Path("runs").exists()


# --- probabilities --------------------------------------------------------------------------------------------


def write_probabilities(splits: Splits, parts: tuple[str, ...] = ("train", "test")) -> dict[str, Any]:
    """probs.csv with the classes in reverse order; probabilities by file name."""
    random = np.random.default_rng(0)
    known: dict[str, Any] = {}
    for part in parts:
        images = getattr(splits, part)
        values = random.dirichlet(np.ones(3), len(images)).round(4)
        for row, label in zip(values[: len(images) * 3 // 4], images.labels, strict=False):  # right
            best = int(row.argmax())
            row[[best, label]] = row[[label, best]]
        values[0] = (0.75, 0.25, 0)
        known |= dict(zip(images.names, values, strict=True))
    lines = [f'"{name}",' + ",".join(map(str, values[::-1])) for name, values in known.items()]
    random.shuffle(lines)
    header = ",".join(("file", *splits.train.classes[::-1]))
    Path("probs.csv").write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return known


@pytest.fixture
def folder(workplace: Path) -> Splits:
    image_folder(workplace / "photos")
    return data_sets.load("photos")


def test_probabilities_by_file_name(folder: Splits) -> None:
    assert folder.train.names[:2] == ["train/class-0/0.png", "train/class-0/1.png"]
    known = write_probabilities(folder)
    for data in (folder.train, folder.test):
        [found] = Teacher.open(Path("probs.csv"), Path("cache")).logits(data)
        exact = np.log(np.maximum([known[name] for name in data.names], 1e-7))
        np.testing.assert_allclose(found.logits().numpy(), exact, rtol=1e-6)
    result = fit(config(teacher=Path("probs.csv"), epochs=1), folder)
    right = [
        np.argmax(known[name]) == label
        for name, label in zip(folder.test.names, folder.test.labels, strict=True)
    ]
    assert result.evaluation.teacher_accuracy == pytest.approx(100 * np.mean(right))
    fit(config(teacher=Path("probs.csv"), epochs=1, augment="flip", teacher_cache="fixed"), folder)


def test_probabilities_of_other_images_and_views_are_refused(folder: Splits) -> None:
    notes: list[Event] = []
    write_probabilities(folder, ("train",))
    result = fit(config(teacher=Path("probs.csv"), epochs=1, name="a"), folder, on_event=notes.append)
    assert result.evaluation.agreement is None
    assert any("has no row for 30 of 30 images" in note.text for note in notes if isinstance(note, Note))
    for settings, message in (
        ({"augment": "flip"}, "plain images, not of --augment flip"),
        ({"method": "logits"}, "gives probabilities"),
        ({"method": "at"}, "no model"),
    ):
        with pytest.raises(KdError, match=message):
            fit(config(teacher=Path("probs.csv"), **settings), folder)
    content = Path("probs.csv").read_text(encoding="utf-8").splitlines()
    Path("probs.csv").write_text("\n".join(content[:-1]), encoding="utf-8")
    with pytest.raises(KdError, match="has no row for 1 of 240 images, as "):
        fit(config(teacher=Path("probs.csv")), folder)
    with pytest.raises(KdError, match=r"no row for 240 of 240 images, as \(not a file\)"):
        fit(config(teacher=Path("probs.csv")), replace(folder, train=replace(folder.train, name_bytes=None)))


def test_probabilities_that_may_be_guesses_are_refused(folder: Splits) -> None:
    """Of 240 training images a third is right."""
    rows = [f"{name},1,0,0" for name in folder.train.names]
    Path("probs.csv").write_text("\n".join(("file,class-0,class-1,class-2", *rows)), encoding="utf-8")
    with pytest.raises(KdError, match=r"probs\.csv: accuracy 33\.3 % on 240 labelled images") as caught:
        fit(config(teacher=Path("probs.csv")), folder)
    assert "order of classes" in caught.value.hint
    assert not Path("runs").exists()


def test_a_file_name_that_no_other_image_has_is_enough(folder: Splits) -> None:
    names = [f"{number}.png" for number in range(240)]
    text = "".join(f"{name}\0" for name in names).encode()
    unique = replace(folder.train, name_bytes=np.frombuffer(text, np.uint8), other_names=None)
    rows = [f"{name},1,0,0" for name in names]
    Path("probs.csv").write_text("\n".join(("file,class-0,class-1,class-2", *rows)), encoding="utf-8")
    Teacher.open(Path("probs.csv"), Path("cache")).logits(unique)
    deeper = "".join(f"a/b/{name}\0" for name in names).encode()
    Teacher.open(Path("probs.csv"), Path("cache")).logits(
        replace(unique, name_bytes=np.frombuffer(deeper, np.uint8))
    )
    with pytest.raises(KdError, match="no row for 2"):  # two images of one name
        Teacher.open(Path("probs.csv"), Path("cache")).logits(
            replace(unique, name_bytes=np.frombuffer(deeper.replace(b"/1.png", b"/0.png"), np.uint8))
        )
    with pytest.raises(KdError, match="no row for 10 of 240"):  # a test image has the name, as of each class
        Teacher.open(Path("probs.csv"), Path("cache")).logits(
            replace(unique, name_bytes=np.frombuffer(deeper, np.uint8), other_names=folder.test.name_bytes)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class-0", "names no classes"),
        ("file,a,b\nx.png,1,0", "has other classes than the data: a, b"),
        ("file,class-0,class-1,class-2\nx.png,1,0,0\ny.png,1,0", "line 3: 2 values for 3 classes"),
        ("file,class-0,class-1,class-2\nx.png,1,0,zero", "line 2: could not convert"),
        ("file,class-0,class-1,class-2\nx.png,0.5,0.3,0.1", r"line 2: probabilities must .*, these to 0\.9"),
        ("file,class-0,class-1,class-2\nx.png,1.5,-0.5,0", "line 2: probabilities must be 0 or more"),
        ("file,class-0,class-1,class-2\nx.png,nan,0,1", "line 2: probabilities must be 0 or more"),
        ("file,class-0,class-1,class-2\nx.png,1,0,0\n./x.png,1,0,0", "line 3: x.png is there twice"),
        ('file,class-0,class-1,class-2\n"x.png,1,0,0', "cannot read"),
    ],
)
def test_a_wrong_file_of_probabilities_is_refused(folder: Splits, text: str, message: str) -> None:
    Path("probs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(KdError, match=message) as caught:
        fit(config(teacher=Path("probs.csv")), folder)
    assert caught.value.hint
    assert not Path("runs").exists()
