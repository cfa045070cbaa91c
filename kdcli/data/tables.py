"""Labelled images in tables: a CSV file, Parquet files, or a folder written by Hugging Face `datasets`."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import read_bytes, regular_size, sha256_file
from kdcli.base.tables import csv_lines
from kdcli.data.decode import SUFFIXES
from kdcli.data.sources import MAX_MEMBER_BYTES, FolderSource, Source, Wanted, reader_errors
from kdcli.data.split import SPLIT_NAMES, split_of

LABELS = ("label", "labels", "fine_label")  # names of the column of labels, the first that is there
TABLE_HINT = (
    "A table has the columns path (or, in Parquet, image), label and optionally split: train, test, val; "
    "paths are relative to its folder."
)
_BATCH_ROWS = 64


class Row(NamedTuple):
    """An image and its label."""

    name: str
    split: str  # train, test or val; "" without a split
    label: str
    image: Path | bytes
    classes: Sequence[str] = ()  # the order of the classes, where the table states one


@dataclass
class TableSource(Source):
    """Images that a table lists: files, or bytes in the table itself."""

    layout_hint: str = TABLE_HINT
    rows: Callable[[], Iterator[Row]] = lambda: iter(())
    # split and label of each image read so far
    labels: dict[str, tuple[str, str]] = field(default_factory=dict)

    def key(self) -> str:
        """SHA-256 of the table, and of sizes and change times of the files it lists; KdError if some are missing."""
        table = FolderSource(self.path).key() if self.path.is_dir() else sha256_file(self.path)
        digest = hashlib.sha256(table.encode())
        missing: list[str] = []
        for row in self.rows():
            if isinstance(row.image, bytes):  # part of the table
                break
            if "\0" in row.name or regular_size(row.image) < 0:
                missing.append(row.name)
                continue
            status = row.image.stat()
            changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
            digest.update(f"{row.image}\0{status.st_size}\0{changed_ns}\0".encode("utf-8", "surrogateescape"))
            self.total += 1
        if missing:
            listed = ", ".join(missing[:10]) + ", …" * (len(missing) > 10)
            raise KdError(f"{self.path} lists missing files ({len(missing):,}): {listed}", TABLE_HINT)
        return digest.hexdigest()

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Images in the order of the rows."""
        self.labels.clear()
        for row in self.rows():
            if row.name in self.labels:
                raise KdError(f"{self.path} lists {row.name} twice", "Remove one of its rows.")
            self.labels[row.name] = (row.split, row.label)
            self.classes = self.classes or row.classes
            if wanted(row.name):
                image = row.image
                if isinstance(image, Path):
                    image = read_bytes(image, MAX_MEMBER_BYTES, "Leave it out.")
                yield row.name, image
            self.done += 1


def table_source(path: Path) -> TableSource | None:
    """The source for a table or a folder of tables, by suffix or content; None for anything else."""
    if path.suffix.lower() == ".csv" and path.is_file():
        return TableSource(path, rows=lambda: _csv_rows(path))
    files: list[tuple[str, Path]] = []
    if path.suffix.lower() == ".parquet" and path.is_file():
        files = [("", path)]
    elif (path / "dataset_dict.json").is_file():  # d…: beside the cache-….arrow of its map()
        files = [(file.parent.name, file) for file in sorted(path.glob("*/d*.arrow"))]
    elif (path / "state.json").is_file():
        files = [("", file) for file in sorted(path.glob("d*.arrow"))]
    elif path.is_dir():  # train-00000-of-00001.parquet, plain_text/train/0000.parquet
        globbed = sorted(file for folders in ("", "*/", "*/*/") for file in path.glob(f"{folders}*.parquet"))
        found = [file for file in globbed if "/." not in f"/{file.relative_to(path)}"]
        words = [re.split("[^a-z]", str(file.relative_to(path).with_suffix("")).lower()) for file in found]
        files = [
            (next(filter(None, map(split_of, each)), ""), file)
            for each, file in zip(words, found, strict=True)
        ]
        if not all(split for split, _ in files):
            folders = {file.parent for file in path.rglob("*") if file.suffix.lower() in SUFFIXES}
            files = [] if len(folders) > 1 else files  # a table beside class folders
        tables = {file.parent.parent if split_of(file.parent.name) else file.parent for _, file in files}
        if len(tables) > 1:
            names = [str(table.relative_to(path)) for table in sorted(tables)]
            raise UsageError(
                f"{path} holds several tables: {', '.join(names)}", "Pass the folder of one of them."
            )
    if not files:
        return None
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{path} is read by pyarrow, which is not installed", "pip install 'kdcli[hf]'"
        ) from error
    return TableSource(path, rows=lambda: _arrow_rows(path, files))


def _unreadable(file: Path, detail: str) -> KdError:
    return KdError(f"cannot read {file}: {detail}", TABLE_HINT)


def _row(table: Path, where: str, split: Any, label: Any, image: Any) -> Row:
    """A row; a KdError for values that are missing or unknown. A path is relative to the folder of `table`."""
    stored, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, image)
    missing = "label" if label is None or not str(label).strip() else "" if stored or path else "image"
    if missing:
        raise KdError(f"{where}: no {missing}", TABLE_HINT)
    part = split_of(str(split).strip()) if split is not None else ""
    if part is None:
        raise KdError(f"{where}: unknown split {str(split)!r}", f"Known: {', '.join(SPLIT_NAMES)}.")
    if isinstance(stored, bytes):
        return Row(where, part, _class_name(label), stored)
    return Row(str(path), part, _class_name(label), table.parent / str(path))


def _class_name(label: Any) -> str:
    return unicodedata.normalize("NFC", str(label).strip())


def _csv_rows(path: Path) -> Iterator[Row]:
    lines = csv_lines(path, TABLE_HINT)
    names = [name.lower() for name in next(lines, ("", []))[1]]
    if absent := {"path", "label"}.difference(names):
        raise KdError(f"{path} has no column {min(absent)} in its first line", TABLE_HINT)
    for where, cells in lines:
        if any(cells[len(names) :]):
            raise KdError(f"{where}: {len(cells)} cells for {len(names)} columns", TABLE_HINT)
        found = dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))
        yield _row(path, where, found.get("split"), found["label"], found["path"])


def _arrow_rows(path: Path, files: list[tuple[str, Path]]) -> Iterator[Row]:
    """Rows of Parquet and Arrow files, each with the split that its name or folder gives, or its column `split`."""
    for split, file in files:
        count = 0
        with reader_errors(partial(_unreadable, file)):
            for schema, batch in _record_batches(file):
                image, label, names = _columns(schema, file)
                splits = [split or None] * len(batch)
                if "split" in schema.names:
                    splits = batch.column("split").to_pylist()
                values = zip(
                    splits, batch.column(label).to_pylist(), batch.column(image).to_pylist(), strict=True
                )
                for part, value, cell in values:
                    text = value if not names or value is None else names[value] if value >= 0 else None
                    row = _row(file, f"{split}/{file.name} row {count}".lstrip("/"), part, text, cell)
                    yield row._replace(classes=names)
                    count += 1


def _record_batches(file: Path) -> Iterator[tuple[Any, Any]]:
    """Schema and rows of a Parquet file, or of a stream as `datasets` writes it."""
    import pyarrow
    from pyarrow import parquet

    if file.suffix.lower() == ".parquet":
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH_ROWS):
                yield table.schema_arrow, batch
    else:
        with pyarrow.memory_map(str(file)) as memory, pyarrow.ipc.open_stream(memory) as stream:
            for batch in stream:
                for start in range(0, len(batch), _BATCH_ROWS):
                    yield stream.schema, batch.slice(start, _BATCH_ROWS)


def _columns(schema: Any, file: Path) -> tuple[str, str, list[str]]:
    """Names of the columns of images and labels, and of the classes in order, where labels are their numbers."""
    features = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    marked = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    image = next((name for name in (*marked, "image", "img", "path") if name in schema.names), None)
    label = next((name for name in LABELS if name in schema.names), None)
    if image is None or label is None:
        raise KdError(f"{file} has no column of {'labels' if image else 'images'}", TABLE_HINT)
    return image, label, [*map(_class_name, features.get(label, {}).get("names") or ())]
