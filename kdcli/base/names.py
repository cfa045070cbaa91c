"""Names that options take, known without the modules that they stand for: for help, completion and hints."""

import difflib
import shlex
from collections.abc import Iterable

DATA_SETS = ("cifar10", "cifar100", "svhn", "mnist", "fashion-mnist", "digits")
NETWORKS = (
    "lenet", "lenet-caffe", "nin", "nin-fc", "cifarnet", "convnet-tiny", "convnet-small", "convnet-large",
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "vgg8", "vgg13",
    "mobilenetv2-half", "shufflenetv1", "shufflenetv2",
)  # fmt: skip


def similar(word: str, names: Iterable[str]) -> str:
    """`Did you mean kd?`; empty where no name is similar."""
    found = difflib.get_close_matches(word.lower(), list(names), n=1)
    return f"Did you mean {shlex.quote(found[0])}?" if found else ""


def nearest(word: str, names: Iterable[str], more: str = "") -> str:
    """`Did you mean kd?`; where no name is similar, all of them and `more`."""
    return similar(word, names := list(names)) or f"Known are {', '.join(names)}{more}."
