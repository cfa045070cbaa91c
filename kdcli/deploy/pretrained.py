"""External networks as kd checkpoints: published preprocessing and weights, or weights from a file."""

import ast
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcli import models
from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError, UsageError, is_out_of_memory
from kdcli.base.files import sha256_file
from kdcli.base.text import first_line
from kdcli.data import Splits
from kdcli.data.preprocess import MeanStd, Photo, Preprocess
from kdcli.models import Classifier, checkpoint, external, weights
from kdcli.models.checkpoint import Checkpoint

_SIDE = 32  # of images for a network that names no size


def keep(model: Classifier, folder: Path) -> Path:
    """Save a model in a folder, named by its content; return the path."""
    left_out = ("provenance", "file_sha256")
    content = [value for name, value in vars(model.to_checkpoint()).items() if name not in left_out]
    content.append(model.provenance.get("outputs", ""))
    path = folder / f"{model.arch.rpartition(':')[2]}-{checkpoint.digest(content)[:8]}.pt"
    if not path.is_file():
        model.save(path)
    return path


def of_module(network: nn.Module, data: Splits, assumed: InputSettings) -> Classifier:
    """A copy of a user's module as a classifier of a data set's images and classes, see `external.own`.

    Its input is (pixel 0–255 · scale − mean) / std, as assumed.
    """
    arch, train = external.own(network), data.train
    made = models.build(arch, classes=len(train.classes), input_size=train.input_size)
    order, scaling = assumed.channel_order or "rgb", assumed.mean_std
    preprocess = MeanStd.described(scaling, train.input_size[2], order) if scaling else Preprocess(order)
    settings = {name: value for name, value in data.settings.items() if isinstance(value, str | int | float)}
    model = Classifier(
        made, preprocess, arch=arch, arch_args={}, classes=train.classes, input_size=train.input_size,
        resize=train.resize, provenance={"kind": "pretrained", "name": arch, "data": {"spec": data.spec, **settings}},
    ).eval()  # fmt: skip
    # its code and attributes are not among the weights: they show in its outputs
    images = np.random.default_rng(0).integers(0, 256, (2, *train.input_size), dtype=np.uint8)
    model.provenance["outputs"] = checkpoint.digest(models.predict_logits(model, images))
    return model


def load_pretrained(
    spec: str,
    args: Sequence[str] = (),
    assumed: InputSettings = NO_ASSUMPTIONS,
    image_size: int | None = None,
) -> Classifier:
    """The classifier `source:name[:weights]`: weights are a file, or named by the source, which by default has some.

    The size of the last layer gives the number of classes; ImageNet's have their names. A KdError for weights that
    do not fit, and without network access for those of a source.

    Args:
        args: `key=value` for a function of the user.
        assumed: scale, mean, deviation, order of channels and names of classes, where the published ones do not hold.
        image_size: of images that a network without a published size takes.
    """
    source, name, of = (*spec.split(":", 2), "")[:3]
    arch, file = f"{source}:{name}", Path(of) if Path(of).suffix or Path(of).is_file() else None
    state = None if file is None else weights.read(file)
    sha256 = "" if file is None else sha256_file(file)
    arguments = dict(map(_argument, args))
    side = image_size or _SIDE
    known = external.published(arch, "" if file else of, sha256, arguments, side)
    for measured in ("classes", "input_size"):
        arguments.pop(measured, None)
    side = known.preprocess.side or side
    preprocess = _adjusted(known.preprocess, assumed)
    with torch.device("meta" if source in external.SOURCES else "cpu"), torch.random.fork_rng(devices=[]):
        size = preprocess.output_size((side, side, 3))
        draft: Any = models.build(arch, classes=0, input_size=size, **arguments)
    if state is None:
        state = _published_weights(spec, known)
    found, head = weights.match(draft, state, spec)
    count = len(found[head[0]]) if head else draft.class_count
    classes, provenance = tuple(map(str, range(count))), {"kind": "pretrained", "name": spec}
    if assumed.class_names is not None:
        from kdcli.deploy.onnx_model.metadata import class_names

        classes, provenance["class_names"] = class_names(Path(spec), {}, count, assumed)
    elif count == len(external.imagenet_classes()):
        classes, provenance["class_names"] = external.imagenet_classes(), "ImageNet"
    provenance |= {"preprocessing": known.label, **({"weights_sha256": sha256} if sha256 else {})}
    stored = Checkpoint(arch, arguments, found, preprocess.spec(), classes, (side, side, 3), provenance)
    return models.from_checkpoint(stored, spec)


def _published_weights(spec: str, known: external.Published) -> dict[str, torch.Tensor]:
    try:
        return dict(known.weights())
    except Exception as error:  # of the network, of the file's hash, of the package's reader
        if is_out_of_memory(error):
            raise
        raise KdError(
            f"the weights of {spec} cannot be fetched: {first_line(error)}",
            f"Name a file behind the network: {':'.join(spec.split(':')[:2])}:FILE.pth",
        ) from error


def _adjusted(photo: Photo, assumed: InputSettings) -> Photo:
    """The preprocessing with scale, mean, deviation and channel order as assumed."""
    order = assumed.channel_order or photo.channel_order
    given: Any = photo
    if assumed.mean_std is not None:
        given = MeanStd.described(assumed.mean_std, 3, order)
    return Photo(given.mean, given.std, **{**photo.args(), "channel_order": order})


def _argument(text: str) -> tuple[str, Any]:
    """`key=value`: a number, true, false, None or another literal of Python, else a text."""
    key, found, value = text.partition("=")
    if not found or not key.isidentifier():
        raise UsageError(f"--teacher-args {text}: must be KEY=VALUE")
    with suppress(ValueError, SyntaxError):
        return key, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    return key, value
