"""One function for each reader: bytes in; a KdError or a value out; any other end is a find."""

from __future__ import annotations

import io
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.caffe.read import read_caffemodel, read_mean, read_prototxt
from kdcli.data import decode, load
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import checkpoint
from tests.hostile import archives, images, models

Target = Callable[[bytes], None]
FOLDER = Path(tempfile.mkdtemp(prefix="kd-fuzz-"))
warnings.simplefilter("ignore")
torch.set_num_threads(1)


def of_bytes(read: Callable[[bytes], object]) -> Target:
    """A target from a reader of bytes."""

    def target(data: bytes) -> None:
        with suppress(KdError):
            read(data)

    return target


def of_file(read: Callable[[Path], object], name: str) -> Target:
    """A target from a reader of files."""
    path = FOLDER / name

    def target(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(KdError):
            read(path)

    return target


def _load(path: Path) -> None:
    cache = FOLDER / "cache"
    try:
        load(str(path), cache_dir=cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


TARGETS: dict[str, Target] = {
    "pickle": of_bytes(pickles.load_pickle),
    "npy": of_file(pickles.load_npy, "x.npy"),
    "archive": of_file(_load, "x.tar"),
    "cifar": of_file(_load, "cifar-10-python.tar.gz"),
    "checkpoint": of_file(checkpoint.load, "x.pt"),
    "caffemodel": of_file(read_caffemodel, "x.caffemodel"),
    "mean": of_file(read_mean, "x.binaryproto"),
    "prototxt": of_file(read_prototxt, "x.prototxt"),
    "onnx": of_file(lambda path: OnnxClassifier.load(path, threads=1), "x.onnx"),
    "image": of_bytes(lambda data: decode.decode(data, "x")),
    "csv": of_file(_load, "x.csv"),
    "parquet": of_file(_load, "x.parquet"),
}


def seeds(name: str) -> list[bytes]:
    """Small good files to start from."""
    value = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"k": [1, 2.5, "é", None, (True,)], "s": {1}}
    if name == "pickle":
        return [pickle.dumps(value, protocol) for protocol in range(6)]
    if name == "npy":
        found = []
        for array in (
            np.arange(6.0).reshape(2, 3),
            np.array(value, dtype=object),
            np.zeros((3, 0), ">i2", "F"),
        ):
            stream = io.BytesIO()
            np.save(stream, array, allow_pickle=True)
            found.append(stream.getvalue())
        return found
    if name in ("archive", "cifar"):
        good = list(archives.acceptable().values())
        return [archives.cifar()] if name == "cifar" else [archives.tar(archives.good()), *good]
    if name == "checkpoint":
        return [models.checkpoint()]
    if name in ("caffemodel", "mean"):
        small = models.caffemodel(count=8)
        blob = models.caffemodel(count=8)[-40:]
        return [small, blob]
    if name == "prototxt":
        text = "name: 'n' input: 'd' input_dim: 1 layer { name: 'c' type: 'Convolution' bottom: 'd' top: 'c' "
        return [
            (
                text + "convolution_param { num_output: 2 kernel_size: 3 bias_filler { value: 0.5 } } }"
            ).encode()
        ]
    if name == "onnx":
        return [models.network().SerializeToString()]
    small = images.Image.new("RGB", (8, 8), (9, 8, 7))
    if name == "csv":
        return [b"path,label,split\n1.png,a,train\n2.png,b,test\n"]
    if name == "parquet":
        columns = {
            "image": [images.saved(small, "PNG")] * 4,
            "label": list("aabb"),
            "split": ["train", "test"] * 2,
        }
        stream = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), stream)
        return [stream.getvalue()]
    return [images.saved(small, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")] + [
        images.saved(small.convert("P"), "PNG"), images.saved(small, "JPEG", progressive=True)
    ]  # fmt: skip
