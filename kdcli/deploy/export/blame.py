"""Where a file first gives something else than the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.deploy import onnx_model
from kdcli.deploy.export.parity import TOLERANCE

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter says which module a node came from
_QUOTED = re.compile(r"'([^']*)'")


def first_difference(
    interface: nn.Module,
    translated: onnx.ModelProto,
    path: Path,
    inputs: npt.NDArray[Any],
    level: str,
) -> str | None:
    """Name the first layer whose output in the file is not that of the checkpoint.

    Args:
        interface: the checkpoint's module, from `inputs` to what the file gives.
        translated: the file's model as the exporter made it, its nodes still saying where they came from.
        path: the file.
        inputs: images on which they differ.
        level: of onnxruntime's optimisation.

    Returns:
        `conv2`, or `features.0 and features.1` of layers that are one operation in the file; None where each layer by
        itself is right, or the file cannot be looked into.
    """
    wanted = _outputs(interface, inputs)
    places = _places(translated, set(wanted))
    if not places:
        return None
    try:
        found = _values(path, [value for _, value in places], inputs, level)
    except KdError:
        return None
    merged: list[str] = []  # layers without an operation of their own: they are part of the next
    value_of = dict(places)
    for name, expected in wanted.items():
        if name not in value_of:
            merged.append(name)
            continue
        got = found[value_of[name]]
        bound = TOLERANCE * expected.abs().max().item()
        if got.shape == expected.shape and not (got.double() - expected).abs().max().item() <= bound:
            return " and ".join(_shown(layer) for layer in (*merged, name))
        merged = []
    return None


def _outputs(interface: nn.Module, inputs: npt.NDArray[Any]) -> dict[str, Tensor]:
    """What each module without parts of its own gives, float64, in the order they run."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in interface.named_modules():
        if any(module.children()):
            continue

        def look(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
            found.pop(name, None)
            found[name] = output.double()

        handles.append(module.register_forward_hook(look))
    try:
        with torch.inference_mode():
            interface(torch.from_numpy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _places(translated: onnx.ModelProto, names: set[str]) -> list[tuple[str, str]]:
    """Module and the value that its last node gives."""
    last: dict[str, str] = {}
    for node in translated.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
        for name in names.intersection(_QUOTED.findall(scopes)):
            last[name] = node.output[0]
    return list(last.items())


def _values(path: Path, names: list[str], inputs: npt.NDArray[Any], level: str) -> dict[str, Tensor]:
    """Inner values of a file by name."""
    model, _ = onnx_model.read(path)
    given = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    runner = onnx_model.session(model.SerializeToString(), level=level)
    try:
        values = runner.run(names, {runner.get_inputs()[0].name: inputs})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError("the file cannot be looked into") from error
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _shown(name: str) -> str:
    return name.removeprefix("network.")
