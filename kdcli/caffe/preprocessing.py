"""What a Caffe network's data layers do to pixels, and the `Preprocess` that does the same."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.text import dims
from kdcli.caffe.blobs import Array
from kdcli.caffe.network import transform_params
from kdcli.caffe.read import Network, read_mean
from kdcli.data.catalog import KnownNetwork
from kdcli.data.preprocess import Preprocess, ScaleShift, fit
from kdcli.data.rows import Images

FITTED = ("gcn-zca", "mean-std", "mean-image")  # kinds that are fitted on train images


@dataclass(frozen=True)
class Transform:
    """`(x − mean) · scale`, as a data layer declares it; means in the network's channel order.

    Attributes:
        mean_file: name of a mean image that is subtracted; `mean_image` is its content where it was found.
        channel_order: `rgb`, `bgr`, or empty where it is unknown.
    """

    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    mean_file: str = ""
    mean_image: Array | None = None
    channel_order: str = ""

    def is_identity(self) -> bool:
        """Whether pixels stay as they are."""
        return self.scale == 1.0 and not self.mean_values and not self.mean_file


def transform_of(network: Network, folders: list[Path]) -> Transform:
    """The transformation of the test phase's data layer, or of any other; a mean file is searched in `folders`.

    Raises:
        KdError: the mean file exists but is no mean image.
    """
    for source in network.sources:
        for name, param in transform_params(source):
            values = tuple(param.mean_value) if name == "transform_param" else ()
            file = Path(param.mean_file.replace("\\", "/")).name
            if param.scale != 1.0 or values or file:
                found = [folder / file for folder in folders if file and (folder / file).is_file()]
                return Transform(param.scale, values, file, read_mean(found[0]) if found else None)
    return Transform()


def choose_kind(option: str, known: KnownNetwork | None, transform: Transform) -> str:
    """The kind of preprocessing: `--preprocess`, else the known network's, else the transform's."""
    if option != "auto":
        return option
    if known is not None:
        return known.preprocess
    if transform.mean_file and transform.mean_image is None:
        return "mean-image"
    return "none" if transform.is_identity() else "scale-shift"


def make_preprocess(
    config: ConvertConfig,
    known: KnownNetwork | None,
    transform: Transform,
    *,
    size: tuple[int, int, int],
    images: Images | None,
    on_event: OnEvent,
) -> Preprocess:
    """The network's preprocessing.

    Args:
        size: (H, W, C) of the network's input.
        images: uint8 (N, H, W, C), to fit it on.

    Raises:
        KdError: it must be fitted and there are no images, or their size is not the network's.
    """
    automatic = config.preprocess == "auto"
    kind = choose_kind(config.preprocess, known, transform)
    order: str = config.channel_order
    if order == "auto":
        known_order = known.channel_order if known else transform.channel_order
        order = known_order or ("bgr" if size[2] == 3 else "rgb")
    if kind == "scale-shift":
        return _scale_shift(transform, size, order)
    if kind not in FITTED:
        if automatic:
            on_event(
                Note(
                    "this network's preprocessing is not known: it gets raw 0–255 pixels, "
                    f"{order.upper() if size[2] == 3 else 'grey'}; see --preprocess and --channel-order"
                )
            )
        return Preprocess(order)
    if images is None:
        raise KdError(
            f"preprocessing {kind} is fitted on train images; there are none", "Pass them with --data."
        )
    if images.shape[1:] != size:
        raise KdError(
            f"the network takes images of {dims(size)}, the data has {dims(images.shape[1:])} "
            "(height, width, channels)",
            "Choose other --data, or --image-size.",
        )
    if automatic and known is None:
        on_event(
            Note(f"{transform.mean_file} is not beside the model: the mean image of the data replaces it")
        )
    fitted = fit(kind, images, channel_order=order, on_event=on_event)
    if kind == "mean-image" and automatic and transform.scale != 1.0:
        return ScaleShift(fitted.get_buffer("mean"), transform.scale, order)
    return fitted


def _scale_shift(transform: Transform, size: tuple[int, int, int], order: str) -> ScaleShift:
    height, width, channels = size
    if transform.mean_image is not None:
        mean = _centre(transform.mean_image, height, width)
    else:
        mean = np.array(transform.mean_values or (0.0,), np.float32).reshape(-1, 1, 1)
    if mean.shape[0] == 1:
        mean = np.repeat(mean, channels, axis=0)
    if mean.shape[0] != channels:
        raise KdError(f"{mean.shape[0]} mean values for {channels} channels")
    if order == "bgr":
        mean = mean[::-1]
    return ScaleShift(torch.from_numpy(mean.copy()), transform.scale, order)


def _centre(mean: Array, height: int, width: int) -> Array:
    """The middle of a mean image: Caffe subtracts before it crops."""
    top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise KdError(
            f"the mean image is {dims(mean.shape[1:])}, smaller than the network's {dims((height, width))}"
        )
    return mean[:, top : top + height, left : left + width]
