"""CIFAR-10 and CIFAR-100 in their official python form: pickled batches in a tarball or its unpacked folder.

The fine labels of CIFAR-100 are its classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.data import catalog
from kdcli.data.datasets import Content, LabelledImages, dataset
from kdcli.data.sources import open_source

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


@dataset(
    "cifar10",
    label="CIFAR-10",
    input_size=(32, 32, 3),
    folder="cifar-10-batches-py",
    members=(*CIFAR10_TRAIN, "test_batch"),
)
def read_cifar10(paths: Mapping[str, Path]) -> Content:
    """Five batches of training images, one of test images, and the class names, which may be absent."""
    batches = _batches(paths, (*CIFAR10_TRAIN, "test_batch"), ("batches.meta",))
    train = _images(batches, CIFAR10_TRAIN, "labels")
    test = _images(batches, ["test_batch"], "labels")
    if "batches.meta" not in batches:
        return Content(train, test, catalog.CIFAR10_CLASSES)
    return Content(train, test, _class_names(batches["batches.meta"], "label_names", 10))


@dataset(
    "cifar100",
    label="CIFAR-100",
    input_size=(32, 32, 3),
    folder="cifar-100-python",
    members=("train", "test", "meta"),
)
def read_cifar100(paths: Mapping[str, Path]) -> Content:
    batches = _batches(paths, ("train", "test", "meta"))
    train, test = (_images(batches, [name], "fine_labels") for name in ("train", "test"))
    return Content(train, test, _class_names(batches["meta"], "fine_label_names", 100))


def _batches(
    paths: Mapping[str, Path], required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, dict[str, object]]:
    """The unpickled members of the archive or folder, by file name; KdError if one is absent or no dictionary."""
    [path] = paths.values()
    found: dict[str, dict[str, object]] = {}
    places: dict[str, str] = {}
    for member, data in open_source(path).read(lambda name: name.split("/")[-1] in (*required, *optional)):
        name = member.split("/")[-1]
        if places.setdefault(name, member) != member:
            raise KdError(f"{path} holds both {places[name]} and {member}", "Give the folder of one of them.")
        check_pointer(data, f"{member} in {path}")
        try:
            found[name] = pickles.load_pickle(data)
        except KdError as error:
            raise KdError(f"{member}: {error.message}", error.hint) from error
    absent = [name for name in required if name not in found]
    if absent:
        raise KdError(f"{path} lacks {', '.join(absent)}")
    return found


def _images(batches: Mapping[str, Mapping[str, object]], names: Sequence[str], key: str) -> LabelledImages:
    """The named batches as one; each stores its pixels (N, 3072) as planes R, G, B."""
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[object] = []
    for name in names:
        data, numbers = batches[name].get("data"), batches[name].get(key)
        numbers = numbers.tolist() if isinstance(numbers, np.ndarray) else numbers
        if not isinstance(data, np.ndarray) or data.shape[1:] != (3072,) or not isinstance(numbers, list):
            raise KdError(f"{name} is not a CIFAR batch: no data (N, 3072), or no list of {key}")
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return LabelledImages(np.ascontiguousarray(np.concatenate(images)), np.array(labels))


def _class_names(meta: Mapping[str, object], key: str, count: int) -> tuple[str, ...]:
    names = meta.get(key)
    names = names if isinstance(names, list) else []
    texts = [n.decode("latin-1") if isinstance(n, bytes) else n for n in names]  # Python 2 wrote bytes
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise KdError(f"the CIFAR archive has no {count} {key}")
    return tuple(texts)
