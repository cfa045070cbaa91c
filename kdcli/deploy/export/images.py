"""Which images an export is proved on, calibrated with, chosen by and held to account by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcli.base.config import ExportConfig
from kdcli.base.errors import KdError
from kdcli.data import ImageSet
from kdcli.data.split import split
from kdcli.deploy.export.parity import BATCHES

_Indices = npt.NDArray[np.int64]
_SELECTION = 1024  # that choose an int8 recipe
_MOST_HELD_OUT = 5000  # for --max-drop, where no validation split is known


@dataclass(frozen=True)
class Chosen:
    """Numbers of train images, in order; no image has two uses.

    Attributes:
        parity: on which the file must equal the checkpoint, and int8 is judged.
        calibration: set the ranges of int8 activations.
        selection: choose between int8 recipes.
        held_out: judge `--max-drop`.
        held_out_name: what `held_out` is.
    """

    parity: _Indices
    calibration: _Indices
    selection: _Indices
    held_out: _Indices
    held_out_name: str


def choose(provenance: dict[str, Any], train: ImageSet, config: ExportConfig) -> Chosen:
    """Choose images: always the same ones for the same numbers; the validation split serves `--max-drop` alone.

    Raises:
        KdError: too few images.
    """
    pool, held_out, name = np.arange(len(train)), np.arange(0), "validation split"
    fraction = _validation_fraction(provenance, train)
    if fraction:
        pool, held_out = split(train.labels, fraction)
    elif config.max_drop is not None:
        count = min(_MOST_HELD_OUT, len(train) // 4)
        order = np.random.default_rng(1).permutation(len(train))
        pool, held_out, name = np.sort(order[count:]), np.sort(order[:count]), "train images kept apart"
    if len(pool) < max(BATCHES) + 1:
        raise KdError(f"the data has {len(pool)} train images; at least {max(BATCHES) + 1} are needed")
    if config.max_drop is not None and not len(held_out):
        raise KdError("there are no images to measure --max-drop on", "Name more with --data.")
    parity, calibration, selection = choose_images(
        len(pool),
        config.parity_images,
        config.calibration_images if config.recipe else 0,
        _SELECTION if config.recipe == "auto" else 0,
    )
    return Chosen(pool[parity], pool[calibration], pool[selection], held_out, name)


def _validation_fraction(provenance: dict[str, Any], train: ImageSet) -> float:
    """What a model's own training kept apart of this data; 0 where that is not known."""
    recorded = provenance.get("data")
    if not isinstance(recorded, dict) or recorded.get("fingerprint_train") != train.fingerprint:
        return 0.0
    fraction = recorded.get("val_fraction")
    return float(fraction) if isinstance(fraction, int | float) and 0 < fraction < 1 else 0.0


def choose_images(
    available: int, parity: int, calibration: int, selection: int = 0
) -> tuple[_Indices, _Indices, _Indices]:
    """Disjoint images: always the same ones for the same numbers.

    Returns:
        Sorted indices (≤ parity,), (≤ calibration,), (≤ selection,). If there are too few, all shrink in proportion.
    """
    wanted = parity + calibration + selection
    if wanted > available:
        parity = min(max(*BATCHES, available * parity // wanted), available)
        rest = available - parity
        selection = rest * selection // max(1, calibration + selection)
        calibration = rest - selection if calibration else 0
    order = np.random.default_rng(0).permutation(available)
    ends = np.cumsum([parity, calibration, selection])
    return np.sort(order[: ends[0]]), np.sort(order[ends[0] : ends[1]]), np.sort(order[ends[1] : ends[2]])
