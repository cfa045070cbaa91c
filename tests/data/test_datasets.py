"""Named data sets: MNIST, Fashion-MNIST, SVHN and CIFAR from small files in their own formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from kdcli.base import pickles
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.caffe.read import read_caffemodel
from kdcli.data import Splits, catalog, decode, load, pack
from kdcli.data.sets import mnist, svhn
from kdcli.deploy.load import load_model
from tests.data.helpers import Files, write_folder, write_tar

COUNTS = {"train": 12, "t10k": 5}


def idx_bytes(kind: int, *sizes: int, content: bytes) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, len(sizes), *sizes) + content


def pixel(number: int, row: int, column: int) -> int:
    return (number * 50 + row * 7 + column) % 256


def write_mnist(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        pixels = bytes(pixel(n, y, x) for n in range(count) for y in range(28) for x in range(28))
        labels = bytes((3 * n + (split == "t10k")) % 10 for n in range(count))
        images = idx_bytes(8, count, 28, 28, content=pixels)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(idx_bytes(8, count, content=labels), mtime=0)
        )


def write_svhn(folder: Path, compressed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in (("train", [10, 1, 2, 9]), ("test", [5, 10])):
        images = np.zeros((32, 32, 3, len(labels)), np.uint8)
        for number in range(len(labels)):
            images[3, 4, :, number] = [number, 100, 200]  # row 3, column 4
        content = {"X": images, "y": np.array(labels, np.uint8)[:, None]}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=compressed)


def cifar100_files(**changes: Any) -> dict[str, bytes]:
    files: dict[str, Any] = {}
    for split, count in (("train", 6), ("test", 3)):
        data = np.zeros((count, 3, 32, 32), np.uint8)
        data[:, 0, 3, 4], data[:, 1, 3, 4], data[:, 2, 3, 4] = np.arange(count), 100, 200
        files[split] = {
            b"filenames": [b"a.png"] * count,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": [(n * 33) % 100 for n in range(count)],
            b"coarse_labels": [n % 20 for n in range(count)],
            b"data": data.reshape(count, 3072),
        }
    files["meta"] = {
        b"fine_label_names": [f"fine{n}".encode() for n in range(100)],
        b"coarse_label_names": [f"coarse{n}".encode() for n in range(20)],
    }
    for name, change in changes.items():
        files[name] = {**files[name], **change} if isinstance(change, dict) else change
    return {name: pickle.dumps(value, protocol=2) for name, value in files.items() if value is not None}


def write_cifar100(data_dir: Path, unpacked: bool = False, **changes: Any) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    files = cifar100_files(**changes)
    if unpacked:
        (data_dir / "cifar-100-python").mkdir()
        for name, data in files.items():
            (data_dir / "cifar-100-python" / name).write_bytes(data)
        return
    with tarfile.open(data_dir / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, data in {"file.txt~": b"?", **files}.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


Read = Callable[..., Splits]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`load` from `tmp_path / "data"`."""

    def call(spec: str, **options: Any) -> Splits:
        return load(spec, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", **options)

    return call


@pytest.mark.parametrize(
    ("name", "label", "classes"),
    [
        ("mnist", "MNIST", tuple("0123456789")),
        ("fashion-mnist", "Fashion-MNIST", mnist.FASHION_CLASSES),
    ],
)
def test_mnist(name: str, label: str, classes: tuple[str, ...], tmp_path: Path, read: Read) -> None:
    write_mnist(tmp_path / "data" / name)
    seen: list[Event] = []
    for _ in range(2):  # from the files, then from the cache
        splits = read(name, on_event=seen.append)
        assert splits.label == label and splits.train.classes == splits.test.classes == classes
        assert splits.train.images.shape == (12, 28, 28, 1) and splits.test.images.shape == (5, 28, 28, 1)
        assert splits.train.images.dtype == np.uint8
        assert splits.train.images[7, 3, 20, 0] == pixel(7, 3, 20) != pixel(7, 20, 3)
        assert splits.train.labels.tolist() == [0, 3, 6, 9, 2, 5, 8, 1, 4, 7, 0, 3]
        assert splits.test.labels.tolist() == [1, 4, 7, 0, 3]
    assert len([event for event in seen if isinstance(event, Progress) and event.total]) == 1  # packed once
    assert len([event for event in seen if isinstance(event, Note) and "not the official" in event.text]) == 8
    assert len(mnist.FASHION_CLASSES) == 10 and mnist.FASHION_CLASSES[9] == "Ankle boot"


def test_the_official_files_go_without_a_note(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "data/mnist")
    files = tuple(
        catalog.RemoteFile(
            f"mnist/{path.name}", "data", (), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in (tmp_path / "data/mnist").iterdir()
    )
    monkeypatch.setitem(catalog.DOWNLOADS, "mnist", files)
    assert read("mnist").notes == ()


def test_grey_images_get_the_requested_size_and_channels(tmp_path: Path, read: Read) -> None:
    write_mnist(tmp_path / "data/mnist")
    plain = read("mnist", grey=True)
    assert plain.train.fingerprint == read("mnist").train.fingerprint
    assert plain.train.fingerprint == read("mnist", image_size=28).train.fingerprint
    colour = read("mnist", fit_to=(28, 28, 3)).train.images
    assert colour.shape == (12, 28, 28, 3)
    assert np.array_equal(colour[..., 0], plain.train.images[..., 0])
    assert np.array_equal(colour[..., 2], plain.train.images[..., 0])
    assert read("mnist", image_size=32).train.images.shape == (12, 32, 32, 1)
    assert read("mnist", fit_to=(14, 14, 1)).test.images.shape == (5, 14, 14, 1)


@pytest.mark.parametrize("name", ["MNIST/raw", "mnist", "FashionMNIST/raw", "files"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_idx_files_are_known_by_path(unpacked: bool, name: str, tmp_path: Path, read: Read) -> None:
    folder = tmp_path / name
    write_mnist(folder)
    if unpacked:
        for path in list(folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    for place in {folder, folder.parent if folder.name == "raw" else folder}:
        splits = read(str(place))
        fashion = name.startswith("Fashion")
        assert splits.label == ("Fashion-MNIST" if fashion else "MNIST")
        assert splits.train.classes[0] == ("T-shirt/top" if fashion else "0")
        assert splits.train.images.shape == (12, 28, 28, 1) and splits.test.labels.tolist() == [1, 4, 7, 0, 3]
        assert any("of Fashion-MNIST have the same names" in note for note in splits.notes) is (
            name == "files"
        )
        assert any("not the official file" in note for note in splits.notes) is not unpacked


def test_unpacked_sets_are_known_by_their_files(tmp_path: Path, read: Read) -> None:
    write_cifar100(tmp_path / "a", unpacked=True)
    (tmp_path / "a/cifar-100-python").rename(tmp_path / "hundred")
    assert read(str(tmp_path / "hundred")).label == "CIFAR-100"
    write_folder(tmp_path / "b", cifar_files())
    (tmp_path / "b/cifar-10-batches-py").rename(tmp_path / "ten")
    assert read(str(tmp_path / "ten")).label == "CIFAR-10"
    write_svhn(tmp_path / "numbers")
    assert read(str(tmp_path / "numbers")).label == "SVHN"


def test_labels_may_be_numpy_arrays(tmp_path: Path, read: Read) -> None:
    write_cifar100(tmp_path / "data", train={b"fine_labels": np.array([5, 4, 3, 2, 1, 0], np.uint8)})
    assert read("cifar100").train.labels.tolist() == [5, 4, 3, 2, 1, 0]
    write_cifar100(tmp_path / "data", train={b"fine_labels": np.array([5, 4, 3, 2, 1, 0.5])})
    with pytest.raises(KdError, match="train labels float64"):
        read("cifar100")


def test_batches_of_two_folders_are_refused(tmp_path: Path, read: Read) -> None:
    files = cifar_files()
    write_tar(
        tmp_path / "cifar-10-python.tar.gz",
        {**files, "copy/test_batch": files["cifar-10-batches-py/test_batch"]},
    )
    with pytest.raises(KdError, match="holds both cifar-10-batches-py/test_batch and copy/test_batch"):
        read(str(tmp_path / "cifar-10-python.tar.gz"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "file",
    ["mnist/train-labels-idx1-ubyte.gz", "svhn/test_32x32.mat", "cifar-10-batches-py/test_batch", "x.tar", "x.onnx",
     "x.pt", "x.caffemodel", "x.npy", "x.png"],
)  # fmt: skip
def test_git_lfs_pointers_are_named_as_such(file: str, tmp_path: Path, workplace: Path) -> None:
    write_mnist(tmp_path / "mnist")
    write_svhn(tmp_path / "svhn")
    write_folder(tmp_path, cifar_files())
    path = tmp_path / file
    path.write_bytes(POINTER)
    with pytest.raises(KdError, match=f"{path.name}.* is a Git LFS pointer, not the file itself") as caught:
        if path.suffix in (".onnx", ".pt"):
            load_model(path)
        elif path.suffix == ".caffemodel":
            read_caffemodel(path)
        elif path.suffix == ".npy":
            pickles.load_npy(path)
        elif path.suffix == ".png":
            decode.decode(path.read_bytes(), path.name)
        else:
            load(str(path if path.suffix == ".tar" else path.parent), cache_dir=tmp_path / "cache")
    assert caught.value.hint == "Fetch the file: git lfs pull"


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn(compressed: bool, tmp_path: Path, read: Read) -> None:
    write_svhn(tmp_path / "data/svhn", compressed)
    splits = read("svhn")
    assert splits.label == "SVHN" and splits.train.classes == tuple("0123456789")
    assert splits.train.images.shape == (4, 32, 32, 3) and splits.test.images.shape == (2, 32, 32, 3)
    assert splits.train.images[2, 3, 4].tolist() == [2, 100, 200]
    assert splits.train.images[2].sum() == 302  # nowhere else
    assert splits.train.labels.tolist() == [0, 1, 2, 9] and splits.test.labels.tolist() == [5, 0]
    assert read("svhn", grey=True).train.images.shape == (4, 32, 32, 1)
    assert read("svhn", image_size=16).train.images.shape == (4, 16, 16, 3)


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar100(unpacked: bool, tmp_path: Path, read: Read) -> None:
    write_cifar100(tmp_path / "data", unpacked)
    for _ in range(2):
        splits = read("cifar100")
        assert splits.label == "CIFAR-100" and splits.train.classes == tuple(f"fine{n}" for n in range(100))
        assert splits.train.images.shape == (6, 32, 32, 3) and splits.test.images.shape == (3, 32, 32, 3)
        assert splits.train.images[5, 3, 4].tolist() == [5, 100, 200] and splits.train.images[5].sum() == 305
        assert splits.train.labels.tolist() == [0, 33, 66, 99, 32, 65]
        assert len(splits.notes) == (0 if unpacked else 1)


@pytest.mark.parametrize(
    ("name", "label", "what"),
    [
        ("cifar100", "CIFAR-100", "cifar-100-python.tar.gz"),
        ("svhn", "SVHN", "train_32x32.mat, test_32x32.mat"),
        ("mnist", "MNIST", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k"),
        ("fashion-mnist", "Fashion-MNIST", "train-images-idx3-ubyte.gz"),
    ],
)
def test_absent_files_are_named_with_the_download_command(
    name: str, label: str, what: str, read: Read
) -> None:
    with pytest.raises(KdError, match=f"^{label} not found in .*: no {what}") as caught:
        read(name)
    assert f": kd download {name} --data-dir " in caught.value.hint


def damaged(content: bytes) -> bytes:
    """A gzip file whose own sum is wrong."""
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[-6] ^= 1
    return bytes(packed)


GOOD = idx_bytes(8, 12, content=bytes(12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"!" + GOOD, "Not a gzipped file"),
        (b"", "not an IDX file"),
        (gzip.compress(b"", mtime=0), "not an IDX file"),
        (gzip.compress(GOOD[:6], mtime=0), "cannot read"),
        (gzip.compress(GOOD, mtime=0)[:-12], "ended before"),
        (damaged(GOOD), "CRC"),
        (gzip.compress(GOOD[:-1], mtime=0), "damaged"),
        (gzip.compress(GOOD + b"!", mtime=0), "damaged"),
        (gzip.compress(idx_bytes(9, 12, content=bytes(12)), mtime=0), "not an IDX file of bytes"),
        (
            gzip.compress(idx_bytes(8, 12, 1, content=bytes(12)), mtime=0),
            "not an IDX file of bytes in 1 dimensions",
        ),
        (gzip.compress(idx_bytes(8, 2**32 - 1, content=b""), mtime=0), "at most 268,435,456 are read"),
        (
            gzip.compress(idx_bytes(8, 11, content=bytes(11)), mtime=0),
            r"labels int64 \(11,\) instead of int64 \(12,\)",
        ),
        (
            gzip.compress(idx_bytes(8, 12, content=bytes(11) + b"\x0a"), mtime=0),
            "labels 0 … 10 instead of 0 … 9",
        ),
    ],
)
def test_bad_idx_files(content: bytes, message: str, tmp_path: Path, read: Read) -> None:
    write_mnist(tmp_path / "data/mnist")
    (tmp_path / "data/mnist/train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(KdError, match=message) as caught:
        read("mnist")
    assert "kd download mnist" in caught.value.hint
    assert not list((tmp_path / "cache").glob("**/*"))


@pytest.mark.parametrize("sizes", [(0, 28, 28), (12, 28, 27), (12, 32, 32)])
def test_other_images_than_expected(sizes: tuple[int, ...], tmp_path: Path, read: Read) -> None:
    write_mnist(tmp_path / "data/mnist")
    content = idx_bytes(8, *sizes, content=bytes(int(np.prod(sizes))))
    (tmp_path / "data/mnist/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
    with pytest.raises(
        KdError, match=r"MNIST has test images uint8 .* instead of uint8 \(N, \*\(28, 28, 1\)\)"
    ):
        read("mnist")


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "MAX_BYTES", 1000)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx_bytes(8, 1001, content=bytes(1001)), mtime=0))
    with pytest.raises(KdError, match="holds 1,001 bytes; at most 1,000"):
        mnist.read_idx(path, 1)
    path.write_bytes(gzip.compress(idx_bytes(8, 1000, content=bytes(1000)), mtime=0))
    assert mnist.read_idx(path, 1).shape == (1000,)


X, Y = np.zeros((32, 32, 3, 2), np.uint8), np.array([[1], [2]], np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": X}, "holds no X uint8"),
        ({"y": Y}, "holds no X uint8"),
        ({"X": X.astype(np.float64), "y": Y}, "holds no X uint8"),
        ({"X": X[..., 0], "y": Y}, "holds no X uint8"),
        ({"X": X.transpose(3, 0, 1, 2), "y": Y}, "holds no X uint8"),
        ({"X": X, "y": Y[:1]}, "holds no X uint8"),
        ({"X": X, "y": Y - 1}, "labels that are not 1 to 10"),
        ({"X": X, "y": Y + 9}, "labels that are not 1 to 10"),
        ({"X": X, "y": Y + 0.5}, "labels that are not 1 to 10"),
        ({"X": X, "y": np.array([["a"], ["b"]])}, "labels that are not 1 to 10"),
    ],
)
def test_bad_mat_files(content: dict[str, Any], message: str, tmp_path: Path, read: Read) -> None:
    write_svhn(tmp_path / "data/svhn")
    savemat(tmp_path / "data/svhn/test_32x32.mat", content)
    with pytest.raises(KdError, match=message) as caught:
        read("svhn")
    assert "kd download svhn" in caught.value.hint


def test_labels_may_be_written_as_floats(tmp_path: Path) -> None:
    savemat(tmp_path / "x.mat", {"X": X, "y": np.array([[10.0], [3.0]])})
    assert svhn.read_mat(tmp_path / "x.mat").labels.tolist() == [0, 3]


def test_damaged_mat_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:200], whole[:-40], whole[:160] + b"????" + whole[164:]):
        path.write_bytes(content)
        with pytest.raises(KdError, match=r"cannot read .*|holds no X"):
            svhn.read_mat(path)
    path.write_bytes(whole)
    assert len(svhn.read_mat(path).labels) == 4
    monkeypatch.setattr(svhn, "MAX_FILE_BYTES", len(whole) - 1)
    with pytest.raises(KdError, match="is larger than"):
        svhn.read_mat(path)
    monkeypatch.undo()
    monkeypatch.setattr(svhn, "MAX_IMAGES", 3)
    with pytest.raises(KdError, match="holds no X"):
        svhn.read_mat(path)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": None}, "lacks meta"),
        ({"train": None, "test": None}, "lacks train, test"),
        ({"train": [1]}, "train: holds no dictionary"),
        ({"train": Evil()}, "train: refuses"),
        (
            {"train": {b"data": np.zeros((6, 3071), np.uint8)}},
            r"train is not a CIFAR batch: no data \(N, 3072\)",
        ),
        ({"test": {b"data": np.zeros((3, 3072))}}, r"test images float64 .* instead of uint8"),
        ({"test": {b"fine_labels": [0, 1, 100]}}, "test labels 0 … 100 instead of 0 … 99"),
        ({"test": {b"fine_labels": [0, 1, -1]}}, "test labels -1 … 1 instead of 0 … 99"),
        ({"test": {b"fine_labels": [0, 1]}}, r"test labels int64 \(2,\) instead of int64 \(3,\)"),
        ({"test": {b"fine_labels": [0, 1, "2"]}}, "test labels <U"),
        ({"test": {b"fine_labels": [0, 1, 10**30]}}, "test labels object"),
        ({"test": {b"fine_labels": "abc"}}, "test is not a CIFAR batch: no data .* no list of fine_labels"),
        ({"meta": {b"fine_label_names": [b"x"] * 99}}, "no 100 fine_label_names"),
        ({"meta": {b"fine_label_names": [1] * 100}}, "no 100 fine_label_names"),
    ],
)
def test_bad_cifar100_files(
    changes: dict[str, Any], message: str, workplace: Path, tmp_path: Path, read: Read
) -> None:
    write_cifar100(tmp_path / "data", **changes)
    with pytest.raises(KdError, match=message) as caught:
        read("cifar100")
    assert caught.value.hint
    assert not (workplace / "canary").exists()


def test_a_full_or_closed_cache_is_one_error(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "data/mnist")
    (tmp_path / "cache").write_text("")
    with pytest.raises(KdError, match="cannot write to"):
        read("mnist")
    (tmp_path / "cache").unlink()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.Packer, "put", full)
    with pytest.raises(KdError, match=r"cannot write to .*: No space left") as caught:
        read("mnist")
    assert "--cache-dir" in caught.value.hint
    assert list((tmp_path / "cache/data").iterdir()) == []


def test_a_changed_file_is_packed_anew(tmp_path: Path, read: Read) -> None:
    write_mnist(tmp_path / "data/mnist")
    before = read("mnist")
    labels = gzip.compress(idx_bytes(8, 5, content=bytes(5)), mtime=0)
    (tmp_path / "data/mnist/t10k-labels-idx1-ubyte.gz").write_bytes(labels)
    after = read("mnist")
    assert after.test.labels.tolist() == [0] * 5 != before.test.labels.tolist()
    assert after.train.fingerprint == before.train.fingerprint


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="digts") as caught:
        load("digts")
    assert caught.value.hint == "Did you mean digits?"
    with pytest.raises(UsageError):
        load("")


def test_digits() -> None:
    """Pixel sums are those of scikit-learn's own copy: 0–16 becomes 0–255."""
    splits = load("digits")
    assert (len(splits.train), len(splits.test)) == (1437, 360) and splits.train.input_size == (8, 8, 1)
    assert splits.train.images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0
    assert splits.train.images.max() == 255 and splits.label == "digits"
    assert splits.train.labels[:5].tolist() == [0, 1, 2, 3, 4] and splits.train.classes == tuple("0123456789")
    assert splits.train.fingerprint != splits.test.fingerprint


def cifar_files(count: int = 3, protocol: int = 2) -> Files:
    """Batches as the official archive has them; image n of batch b is red b, green n, blue 7."""
    files: Files = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = np.zeros((count, 3, 32, 32), np.uint8)
        data[:, 0], data[:, 2] = number, 7
        data[:, 1] = np.arange(count)[:, None, None]
        data[:, :, 0, 31] = 255  # top right, to tell rows from columns
        batch = {b"data": data.reshape(count, 3072), b"labels": [(number + n) % 10 for n in range(count)]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=protocol)
    meta = {b"label_names": [f"name{n}".encode() for n in range(10)]}
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps(meta, protocol=protocol)
    return files


@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar10(unpacked: bool, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    if unpacked:
        write_folder(data_dir, cifar_files())
    else:
        write_tar(data_dir / "cifar-10-python.tar.gz", cifar_files())
    for _ in range(2):
        splits = load("cifar10", data_dir=data_dir, cache_dir=tmp_path / "cache")
        assert splits.label == "CIFAR-10" and splits.train.classes[3] == "name3"
        assert splits.train.images.shape == (15, 32, 32, 3) and splits.test.images.shape == (3, 32, 32, 3)
        assert splits.train.images[7, 5, 5].tolist() == [2, 1, 7]
        assert (
            splits.train.images[7, 0, 31].tolist() == [255] * 3
            and splits.train.images[7, 31, 0].tolist() != [255] * 3
        )
        assert splits.train.labels[7] == 3 and splits.test.labels.tolist() == [5, 6, 7]
        assert any("not the official" in note for note in splits.notes) is not unpacked
    if unpacked:
        assert load(str(data_dir), cache_dir=tmp_path / "cache").label == "CIFAR-10"


def test_cifar10_that_is_absent_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(KdError, match="CIFAR-10 not found in") as caught:
        load("cifar10", data_dir=tmp_path, cache_dir=tmp_path)
    assert "kd download cifar10" in caught.value.hint and "--data" in caught.value.hint

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/canary",)

    good = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    for message, batch in {
        "refuses .*system": Evil(),
        "no dictionary": [1],
        "test images float64": {**good, "data": np.zeros((2, 3072))},
        "test labels 0 … 10 instead of 0 … 9": {**good, "labels": [0, 10]},
    }.items():
        write_folder(tmp_path, {**cifar_files(), "cifar-10-batches-py/test_batch": pickle.dumps(batch)})
        with pytest.raises(KdError, match=message):
            load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    write_folder(tmp_path, {"cifar-10-batches-py/test_batch": pickle.dumps(good)})
    with pytest.raises(KdError, match="lacks data_batch_4"):
        load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "canary").exists()
