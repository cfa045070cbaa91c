"""Weights of other programs: a state_dict in a .pt, .pth or .safetensors file. Nothing in it is executed."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import dims, first_line
from kdcli.models.checkpoint import load_tensors

_PLACES = ("state_dict", "model_state_dict", "model", "net", "ema")  # of a state_dict in a checkpoint
_LISTED = 6  # differences in a message


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict by name; a KdError for other files."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}", "Name a .pt, .pth or .safetensors file with a state_dict.")
    try:
        document = _read(path)
    except ImportError as error:
        raise UsageError(f"{path}: safetensors is not installed", "pip install safetensors") from error
    except KdError:
        raise
    except Exception as error:  # readers raise whatever the bytes provoke
        raise KdError(
            f"{path} cannot be read safely: {first_line(error)}",
            "Save network.state_dict() alone, with torch.save.",
        ) from error
    while isinstance(document, dict):
        inner = next((document[key] for key in _PLACES if isinstance(document.get(key), dict)), None)
        if inner is None:
            break
        document = inner
    values = document.items() if isinstance(document, dict) else ()
    found = {str(name): value.detach() for name, value in values if isinstance(value, Tensor)}
    if not found:
        raise KdError(
            f"{path} holds no weights", "Save network.state_dict() with torch.save, or as safetensors."
        )
    return found


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]

        return load_file(path)
    return load_tensors(path, path.read_bytes(), legacy=True)


def _prefix(names: Iterable[str]) -> str:
    """Modules that all names begin with: "module." of "module.conv.weight" and "module.fc.weight"."""
    return re.sub(r"[^.]*$", "", os.path.commonprefix([*names]))  # noqa: RUF071


def match(
    network: nn.Module, state: Mapping[str, Tensor], owner: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The values of a state_dict under the network's names, and the names of a last layer for other classes.

    A prefix of all names, as of nn.DataParallel or a LightningModule, is removed; counters of batch norm may be
    missing. A KdError lists all other differences.
    """
    own = network.state_dict()
    found = {name: value for name, value in state.items() if name != "n_averaged"}  # of AveragedModel
    if not found.keys() <= own.keys():
        outer, inner = _prefix(found), _prefix(own)
        found = {inner + name.removeprefix(outer): value for name, value in found.items()}
    for name in own:
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.tensor(0))
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    is_head = len({found[name].shape[:1] for name in other}) == 1 and all(
        found[name].shape[1:] == own[name].shape[1:] for name in other
    )
    differences = [f"{name} is missing" for name in own if name not in found]
    differences += [f"{name} is unknown" for name in found if name not in own]
    if not is_head:
        differences += [f"{name} is {dims(found[name].shape)}, not {dims(own[name].shape)}" for name in other]
    if differences:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise KdError(
            f"{owner} does not fit the network: {listed}", "Name the network that the weights are of."
        )
    return found, tuple(other)
