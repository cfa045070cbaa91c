"""Facts: where files lie, what their bytes must hash to, class names, published figures."""

from __future__ import annotations

from dataclasses import dataclass

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: `sha256`, or git's blob SHA-1 where only that is known, decides if it is the right one.

    Attributes:
        name: path below the folder it goes to.
        urls: mirrors in the order to try.
        size_bytes: None where it is not known.
    """

    name: str
    folder: str
    urls: tuple[str, ...]
    sha256: str | None = None
    git_blob_sha1: str | None = None
    size_bytes: int | None = None


_RAI = "https://raw.githubusercontent.com/rai-project/go-caffe/master/_fixtures/"
_SEED = "https://raw.githubusercontent.com/chengshengchan/model_compression/master/"

DOWNLOADS: dict[str, tuple[RemoteFile, ...]] = {
    "cifar10": (
        RemoteFile(
            "cifar-10-python.tar.gz",
            "data",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            size_bytes=170_498_071,
        ),
    ),
    "nin": (
        RemoteFile(
            "cifar10_nin.caffemodel",
            "weights",
            (_RAI + "cifar10_nin.caffemodel",),
            sha256="d131ace82eeecbc14bfba817a99eaaef3ecf4fbfeac1d5da2bc2c3ef4d1fb3da",
            size_bytes=3_869_548,
        ),
        RemoteFile(
            "cifar10_nin_train_val.prototxt",
            "weights",
            (_RAI + "nin_model.prototxt",),
            sha256="feee57263f8bb2a00d07f3c9c9ae699279a92a9f7dece795a12dac44160ef49f",
        ),
    ),
    "seed-weights": (
        RemoteFile(
            "teacher.npy",
            "weights",
            (_SEED + "teacher.npy",),
            git_blob_sha1="3042e011631112005ef64ccc9678b3bb53806f0b",
        ),
        RemoteFile(
            "student.npy",
            "weights",
            (_SEED + "student.npy",),
            git_blob_sha1="dc40ba2569f16e11d3eede0b7f60cc3e20efa960",
        ),
    ),
}


@dataclass(frozen=True)
class KnownNetwork:
    """A Caffe network whose preprocessing and accuracy are on record."""

    name: str
    preprocess: str
    channel_order: str
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]  # (H, W, C)
    published: str
    measured: dict[str, float]  # dataset label -> test accuracy, per cent


CIFAR10_NIN = KnownNetwork(
    name="cifar10_nin",
    preprocess="gcn-zca",
    channel_order="rgb",
    classes=CIFAR10_CLASSES,
    input_size=(32, 32, 3),
    published="89.6 % on the original CIFAR-10 (Lin et al.)",
    measured={"CIFAR-10 (JPEG)": 80.54},
)
KNOWN_NETWORKS = {  # SHA-256 of the caffemodel -> what is known of it
    "d131ace82eeecbc14bfba817a99eaaef3ecf4fbfeac1d5da2bc2c3ef4d1fb3da": CIFAR10_NIN,
}
KNOWN_WEIGHTS = {  # SHA-256 of the weights themselves (kdcli.caffe.read.weights_sha256): survives re-encoding
    "08a010464a0f83c96cfc1bce182bd5b0a8a6618c9aa13f6b6234885cf38178bf": CIFAR10_NIN,
}

KNOWN_ARCHIVES = {  # SHA-256 of an archive -> label in tables
    "f3b2857085406949e481708d22b3da2269769e6343208246c7cf5a722c237a03": "CIFAR-10 (JPEG)",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce": "CIFAR-10",
}
