"""Teachers of other classes than the data's: matched by name, or by a CSV file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli.base.config import TeacherInputs
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note
from kdcli.deploy.load import teachers_of
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.engine import fit
from kdcli.engine.identity import input_hashes, recorded_inputs
from kdcli.models import checkpoint
from kdcli.models.class_map import ClassMap, find
from kdcli.teacher import Teacher
from tests.helpers import config, image_set, make_splits
from tests.teacher.test_teacher import expected_of, make_teacher

ANIMALS = ("tabby", "tiger cat", "beagle", "pug", "crane", "crane")


def softmax(logits: Any) -> Any:
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_probabilities_are_summed_and_renormalised() -> None:
    logits = 8 * np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    given = softmax(logits)
    sums = np.stack([given[:, [0, 1, 4]].sum(1), given[:, 2], given[:, [5, 3]].sum(1) * 1], axis=1)
    found = ClassMap(((0, 1, 4), (2,), (5, 3)))(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(softmax(found), sums / sums.sum(1, keepdims=True), rtol=1e-5)
    chosen = ClassMap(((3,), (0,)))(torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(chosen, logits[:, [3, 0]])


def test_classes_are_matched_by_name() -> None:
    found = find(ANIMALS, ("pug", "Tiger_Cat", "tabby"))
    assert found is not None
    assert found.groups == ((3,), (1,), (0,))
    assert found.text == "3 of its 6 classes matched with the data's 3 by name"
    for classes in (("pug", "dog"), ("pug", "crane"), ("pug", "Pug")):  # none, two, one for both
        assert find(ANIMALS, classes) is None


def test_a_file_groups_classes(workplace: Path) -> None:
    file = Path("map.csv")
    file.write_text(
        '\ufeffteacher,data\ntabby, cat\n\n"tiger cat",cat\n5,bird\nbeagle,dog\n', encoding="utf-8"
    )
    found = find(ANIMALS, ("bird", "cat", "dog"), file)
    assert found is not None
    assert found.groups == ((5,), (0, 1), (2,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tabby,cat", "map.csv has no class of the teacher for dog"),
        ("tabby,cat\nbeagle,dgo", "line 2: the data has no class 'dgo'"),
        ("tabby,cat\nbeagel,dog", "line 2: the teacher has no classes 'beagel'"),
        ("tabby,cat\n6,dog", "line 2: the teacher has no classes '6'"),
        ("crane,cat\npug,dog", "line 1: the teacher has 2 classes 'crane'"),
        ("tabby,cat\ntabby,dog", "line 2: class 'tabby' is there twice"),
        ("tabby,cat\npug,dog,1", "line 2: 3 values instead of 2"),
        ('tabby,cat\n"pug,dog', "cannot read"),
    ],
)
def test_a_wrong_file_is_refused(workplace: Path, text: str, message: str) -> None:
    Path("map.csv").write_text(text, encoding="utf-8")
    with pytest.raises(KdError, match=message) as caught:
        find(ANIMALS, ("cat", "dog"), Path("map.csv"))
    assert caught.value.hint


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_teacher_of_more_classes(workplace: Path, suffix: str) -> None:
    """Also live; its cached logits depend on the content of the file."""
    images, path, file = image_set(30), Path(f"t{suffix}"), Path("map.csv")
    model = make_teacher(Path("t.pt"), classes=5)
    if suffix == ".onnx":
        path.write_bytes(to_onnx(model, opset=18, with_preprocessing=True).SerializeToString())
        Path("labels.txt").write_text("\n".join(model.classes), encoding="utf-8")
    images = replace(images, classes=("class 3", "class 0", "class 4"), fingerprint="f" * 64)
    given = softmax(expected_of(model, images))
    notes: list[Event] = []

    def probabilities(computed: int, class_map: Path | None) -> Any:
        opened = Teacher.open(path, Path("cache"), assumed=TeacherInputs(class_map=class_map), data=images)
        [found] = opened.logits(images, on_event=notes.append)
        assert opened.views_computed == computed
        live, _ = opened.live()(torch.from_numpy(images.images), 0, np.arange(30))
        np.testing.assert_allclose(softmax(live.numpy()), softmax(found.logits().numpy()), atol=2e-3)
        return softmax(live.numpy())

    part = given[:, [3, 0, 4]]
    np.testing.assert_allclose(probabilities(1, None), part / part.sum(1, keepdims=True), rtol=1e-4)
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert f"teacher {path}: 3 of its 5 classes matched with the data's 3 by name" in texts
    file.write_text("class 1,class 0\nclass 2,class 0\nclass 3,class 3\nclass 4,class 4", encoding="utf-8")
    part = np.stack([given[:, 3], given[:, 1] + given[:, 2], given[:, 4]], axis=1)
    for computed in (1, 0):
        np.testing.assert_allclose(
            probabilities(computed, file), part / part.sum(1, keepdims=True), rtol=1e-4
        )
    file.write_text(file.read_text().replace("class 1", "class 0"), encoding="utf-8")
    probabilities(1, file)


@pytest.mark.parametrize("method", ["kd", "at"])
def test_a_class_map_belongs_to_the_run(workplace: Path, method: str) -> None:
    make_teacher(Path("t.pt"), classes=5)
    Path("map.csv").write_text("".join(f"{number},class {number % 3}\n" for number in range(5)))
    splits = make_splits()
    result = fit(config(method=method, teacher=Path("t.pt"), teacher_class_map="map.csv", epochs=1), splits)
    assert result.evaluation.agreement is not None
    provenance = checkpoint.load(result.run.student).provenance
    recorded = recorded_inputs(provenance)
    assert recorded == input_hashes(result.run.read_config(), splits)
    assert "class map" in recorded
    assert teachers_of(provenance)[0].inputs.class_map == Path("map.csv")
