"""Tables of labelled images: CSV, Parquet, and folders as Hugging Face `datasets` writes them."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kdcli.base.errors import KdError, UsageError
from kdcli.data.images import Splits
from tests.data.helpers import png, small_tree, write_folder

ROWS = [  # of small_tree()
    ("train/zebra/b.PNG", "zebra", "train"),
    ("train/zebra/a.png", "zebra", "train"),
    ("train/ape house/é.png", "ape house", "train"),
    ("test/zebra/1.png", "zebra", "test"),
    ("test/ape house/1.bmp", "ape house", "test"),
]


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_csv_gives_the_set_of_the_same_folders(tmp_path: Path, read: Callable[..., Splits]) -> None:
    folder = write_folder(tmp_path / "set", small_tree())
    listed = write_csv(folder / "all.csv", "path,label,split", *map(",".join, ROWS))
    found, expected = read(listed), read(folder)
    assert found.label == "all.csv" and found.notes == ()
    for part in ("train", "test"):
        assert getattr(found, part).fingerprint == getattr(expected, part).fingerprint
    (folder / "train/zebra/a.png").write_bytes(png((9, 0, 0)))
    assert read(listed).train.images[:, 0, 0, 0].tolist() == [1, 9, 3]
    forms = (
        (path, unicodedata.normalize(form, f"é{name}"), split)
        for form, (path, name, split) in zip(("NFC", "NFD", "NFC", "NFC", "NFD"), ROWS, strict=True)
    )
    assert read(write_csv(listed, "path,label,split", *map(",".join, forms))).train.classes == (
        "éape house",
        "ézebra",
    )


def test_a_csv_without_a_split_gets_one_by_content(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {f"{number}.png": png((number, 0, 0)) for number in range(40)}
    folder = write_folder(tmp_path / "set", files)
    lines = [f"{number}.png,{('a/x', 'a/y')[number % 2]}" for number in range(40)]
    found = read(write_csv(folder / "list.csv", "\ufeffPath,Label", *reversed(lines)))
    assert found.train.classes == ("a/x", "a/y") and found.test_fraction == 0.2
    assert set(found.test.images[:, 0, 0, 0]) == {1, 4, 26, 28, 35}  # see `is_test` in test_unsplit
    assert (found.train.images[:, 0, 0, 0] % 2 == found.train.labels).all()
    folders = write_folder(
        tmp_path / "photos", {f"{'xy'[number % 2]}/{number}.png": png((number, 0, 0)) for number in range(40)}
    )
    assert set(read(folders).test.images[:, 0, 0, 0]) == set(found.test.images[:, 0, 0, 0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,class", "1.png,a"], "no column label"),
        ([], "no column label"),
        (["path,label", "1.png,Canis lupus, grey"], "line 2: 3 cells for 2 columns"),
        (["path,a,b,c,d,e,label", "1.png,,,,,,a", "2.png"], "line 3: no label"),
        (["path,label", ",a"], "line 2: no image"),
        (["path,label", "1.png,a", "../0.png,b"], r"lists missing files \(1\): \.\./0\.png"),
        (["path,label", "1.png,a", "1.png,b"], "1.png twice"),
        (["path,label,split", "1.png,a,extra"], "line 2: unknown split 'extra'"),
        (["path,label,split", "1.png,a,train", "2.png,b,"], "unknown split ''"),
        (["path,label,split", "1.png,a,train", "2.png,b,test"], "classes without training images: b"),
        (["path,label,split", "1.png,a,val", "2.png,b,test"], "no train images"),
        (["path,label", "1.png,a", "2.png,a"], "only one class: a"),
        (["path,label", "1.png,a\x1b", "2.png,b"], "unusable class name"),
        (["path,label", "1.png,a", ".,b"], "missing files"),
        (["path,label", "1.png,a", "/dev/zero,b", "3.png,b"], r"\(2\): /dev/zero, 3.png"),
        (["path,label", "1.png,a", "1\0.png,b"], "missing files"),
        (["path,label", '"1.png,a' + "x" * 200_000], "cannot read .*list.csv: field larger"),
        (["path,label", "1.png,a", "list.csv,b"], "no (train|test) images|only one class"),
    ],
)
def test_mistakes_in_a_csv(
    lines: list[str], message: str, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    folder = write_folder(tmp_path / "set", {"1.png": png(), "2.png": png((1, 0, 0))})
    with pytest.raises(KdError, match=message) as caught:
        read(write_csv(folder / "list.csv", *lines))
    assert caught.value.hint


def arrow_table(
    rows: list[tuple[int, int]], bytes_inside: bool = True, names: Sequence[str] = ("dog", "cat")
) -> Any:
    """A table as `datasets` writes it: an image of one colour, and the number of its class."""
    pyarrow = pytest.importorskip("pyarrow")
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
    }
    images = [{"bytes": png((colour, 0, 0)), "path": f"{colour}.png"} for colour, _ in rows]
    if not bytes_inside:
        images = [{"bytes": None, "path": f"{colour}.png"} for colour, _ in rows]
    table = pyarrow.table(
        {
            "image": pyarrow.array(
                images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
            ),
            "label": pyarrow.array([label for _, label in rows], pyarrow.int64()),
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_arrow(path: Path, rows: list[tuple[int, int]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow_table(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


TRAIN, TEST = [(1, 0), (2, 1), (3, 1), (4, 0)], [(5, 1), (6, 0)]


@pytest.mark.parametrize(
    "kind", ["save_to_disk", "data/{}-0000{}-of-00001", "plain_text/{}-0000{}-of-1", "default/{}/000{}"]
)
def test_folders_of_hugging_face_datasets(kind: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "pets"
    if kind != "save_to_disk":  # layouts of the Hub
        for split, number, rows in (("train", 0, TRAIN[:2]), ("train", 1, TRAIN[2:]), ("test", 0, TEST)):
            file = folder / f"{kind.format(split, number)}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(arrow_table(rows), file)
    else:
        write_arrow(folder / "train/data-00000-of-00002.arrow", TRAIN[:2])
        write_arrow(folder / "train/data-00001-of-00002.arrow", TRAIN[2:])
        write_arrow(folder / "test/data-00000-of-00001.arrow", TEST)
        write_arrow(folder / "test/cache-0123456789abcdef.arrow", [(7, 0)])  # of Dataset.map
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    splits = read(folder)
    assert splits.train.classes == ("dog", "cat") and splits.label == "pets"  # in the table's order
    assert splits.train.images[:, 0, 0, 0].tolist() == [1, 4, 2, 3] and splits.train.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert splits.test.images[:, 0, 0, 0].tolist() == [6, 5]


def test_a_folder_of_several_tables_is_an_error(tmp_path: Path, read: Callable[..., Splits]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("small", "large"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        parquet.write_table(arrow_table(TRAIN), tmp_path / "pets" / name / "train.parquet")
    with pytest.raises(UsageError, match="holds several tables: large, small"):
        read(tmp_path / "pets")


def test_a_class_of_a_table_without_images_is_left_out_with_a_note(
    tmp_path: Path, read: Callable[..., Splits]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [(number, 2 * (number % 2)) for number in range(20)]
    parquet.write_table(arrow_table(rows, names=("dog", "ant", "cat")), tmp_path / "pets.parquet")
    splits = read(tmp_path / "pets.parquet")
    assert splits.train.classes == ("dog", "cat")
    assert "Classes of pets.parquet without images are left out: ant." in splits.notes


def test_a_parquet_file_beside_class_folders_is_ignored(tmp_path: Path, read: Callable[..., Splits]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = write_folder(tmp_path / "set", {**small_tree(), "features.parquet": b"of any content"})
    assert read(folder).train.classes == ("ape house", "zebra")
    (folder / "features.parquet").unlink()
    for split, rows in (("train", TRAIN), ("Test", TEST)):
        parquet.write_table(arrow_table(rows), folder / f"pets-{split}-00000-of-00001.parquet")
    splits = read(folder)
    assert splits.train.classes == ("dog", "cat") and (len(splits.train), len(splits.test)) == (4, 2)


def test_parquet_files_of_bytes_and_of_paths(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [(number, number % 2) for number in range(20)]
    parquet.write_table(arrow_table(rows), tmp_path / "pets.parquet")
    write_folder(tmp_path, {f"{number}.png": png((number, 0, 0)) for number in range(20)})
    parquet.write_table(arrow_table(rows, bytes_inside=False), tmp_path / "listed.parquet")
    inside, listed = read(tmp_path / "pets.parquet"), read(tmp_path / "listed.parquet")
    assert inside.train.classes == ("dog", "cat") and inside.test_fraction == 0.2
    for part in ("train", "test"):
        values = [set(getattr(splits, part).images[:, 0, 0, 0]) for splits in (inside, listed)]
        assert (
            values[0] == values[1]
            and (getattr(inside, part).images[:, 0, 0, 0] % 2 == getattr(inside, part).labels).all()
        )
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "pets.parquet").read_bytes()[:900])
    with pytest.raises(KdError, match=r"cannot read .*cut\.parquet"):
        read(tmp_path / "cut.parquet")
    parquet.write_table(arrow_table([(1, 0), (2, -1)]), tmp_path / "unlabelled.parquet")
    with pytest.raises(KdError, match="row 1: no label"):
        read(tmp_path / "unlabelled.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pyarrow, which is not installed") as caught:
        read(tmp_path / "pets.parquet")
    assert caught.value.hint == "pip install 'kdcli[hf]'"
