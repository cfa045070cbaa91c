"""What a Caffe network's data layers do to pixels, and what kd does in their place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.caffe.read import Array, Network, read_mean
from kdcli.data.catalog import KnownNetwork
from kdcli.data.preprocess import Preprocess, ScaleShift, UInt8Images, fit

_FITTED = ("gcn-zca", "mean-std", "mean-image")


@dataclass(frozen=True)
class Transform:
    """`(x − mean) · scale`, as a data layer declares it; means in the network's channel order.

    Attributes:
        mean_file: name of a mean image that is subtracted; `mean_image` is its content if it was found.
        channel_order: where it is known; otherwise empty.
    """

    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    mean_file: str = ""
    mean_image: Array | None = None
    channel_order: str = ""

    def is_identity(self) -> bool:
        """Nothing is done to the pixels."""
        return self.scale == 1.0 and not self.mean_values and not self.mean_file


def transform_of(network: Network, folders: list[Path]) -> Transform:
    """The transformation of the test phase's data layer, or of any; a mean file is looked for in `folders`.

    Raises:
        KdError: the mean file is there but no mean image.
    """
    for source in network.sources:
        for name in ("transform_param", "data_param", "image_data_param", "window_data_param"):
            param = getattr(source.param, name, None)
            if param is None or not source.param.HasField(name):
                continue
            values = tuple(float(value) for value in getattr(param, "mean_value", ()))
            file = Path(param.mean_file.replace("\\", "/")).name
            if param.scale == 1.0 and not values and not file:
                continue
            found = next((folder / file for folder in folders if file and (folder / file).is_file()), None)
            return Transform(float(param.scale), values, file, read_mean(found) if found else None)
    return Transform()


def needs_images(asked: str, known: KnownNetwork | None, transform: Transform) -> bool:
    """Whether the preprocessing is fitted on train images."""
    return _choice(asked, known, transform) in _FITTED


def _choice(asked: str, known: KnownNetwork | None, transform: Transform) -> str:
    if asked != "auto":
        return asked
    if known is not None:
        return known.preprocess
    if transform.mean_file and transform.mean_image is None:
        return "mean-image"
    return "none" if transform.is_identity() else "scale-shift"


def settle(
    config: ConvertConfig,
    known: KnownNetwork | None,
    transform: Transform,
    *,
    size: tuple[int, int, int],
    images: UInt8Images | None,
    on_event: OnEvent,
) -> tuple[Preprocess, bool]:
    """The network's preprocessing, and whether it was fitted on the images.

    Raises:
        KdError: it must be fitted and there are no images, or they are of another size than the network's.
    """
    order = _channel_order(config, known, transform, size)
    choice = _choice(config.preprocess, known, transform)
    if choice in _FITTED:
        if images is None:
            raise KdError(
                f"preprocessing {choice} is fitted on train images; there are none", "Name them with --data."
            )
        if images.shape[1:] != size:
            raise KdError(
                f"the network takes images of {'×'.join(map(str, size))}, the data has "
                f"{'×'.join(map(str, images.shape[1:]))} (height, width, channels)",
                "Choose other --data, or --image-size.",
            )
        if config.preprocess == "auto" and known is None:
            on_event(Note(f"{transform.mean_file} is not beside the model: the data's mean image stands in"))
        prepared = fit(choice, images, channel_order=order, on_event=on_event)
        if choice == "mean-image" and config.preprocess == "auto" and transform.scale != 1.0:
            mean = prepared.get_buffer("mean")
            return ScaleShift(mean, transform.scale, order), True
        return prepared, True
    if choice == "scale-shift":
        return _scale_shift(transform, size, order), False
    if config.preprocess == "auto":
        on_event(
            Note(
                "nothing is known of this network's preprocessing: raw 0–255 pixels go in, "
                f"{order.upper() if size[2] == 3 else 'grey'}; see --preprocess and --channel-order"
            )
        )
    return Preprocess(order), False


def _channel_order(
    config: ConvertConfig, known: KnownNetwork | None, transform: Transform, size: tuple[int, int, int]
) -> str:
    if config.channel_order != "auto":
        return config.channel_order
    if known is not None:
        return known.channel_order
    return transform.channel_order or ("bgr" if size[2] == 3 else "rgb")


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
    """Caffe subtracts before it crops the middle."""
    top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise KdError(
            f"the mean image is {mean.shape[1]}×{mean.shape[2]}, smaller than the network's {height}×{width}"
        )
    return mean[:, top : top + height, left : left + width]
