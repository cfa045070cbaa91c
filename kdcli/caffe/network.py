"""`Network` and weights → the plain description of a `kdcli.models.graph` and its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.text import dims
from kdcli.caffe.layers import check_type, node_of, state_of
from kdcli.caffe.read import Layer, Network, Weights
from kdcli.models.graph import INPUT, GraphNet, safe_name
from kdcli.models.operations.shapes import Shape, is_vector

_AFTER_LOGITS = ("Softmax", "ArgMax")  # what may follow the logits, and is cut off


@dataclass(frozen=True)
class LayerRow:
    """One line of what was converted.

    Attributes:
        name, type: Caffe's.
        output_shape: of one image.
        weight_shapes: parameter → shape, as the network holds it.
        parameters: number of learned values.
    """

    name: str
    type: str
    output_shape: Shape
    weight_shapes: dict[str, Shape]
    parameters: int


@dataclass(frozen=True)
class Built:
    """A network with its weights: `arch` and `arch_args` rebuild it, `state` fills it, `rows` tell it."""

    arch: str
    arch_args: dict[str, Any]
    state: dict[str, Tensor]
    classes: int
    input_size: tuple[int, int, int]  # (H, W, C)
    rows: tuple[LayerRow, ...]


@dataclass(frozen=True)
class _Step:
    layer: Layer
    node: str
    inputs: tuple[str, ...]
    part: int = 0  # which of the layer's outputs


@dataclass(frozen=True)
class Wiring:
    """The computing layers in order, each reading nodes instead of blobs, up to the one of the logits."""

    steps: tuple[_Step, ...]
    input_blob: str
    output: str


def wire(network: Network, on_event: OnEvent = ignore) -> Wiring:
    """Find what computes the logits: strip data, losses and the last softmax; rebind in-place blobs.

    Raises:
        KdError: not exactly one input, or nothing that computes.
    """
    blobs: dict[str, str] = {}
    outside: dict[str, str] = {}  # node standing for a blob that no layer makes → the blob
    steps: dict[str, _Step] = {}
    losses: list[tuple[Layer, tuple[str, ...]]] = []  # with the nodes they read
    for layer in network.layers:
        if layer.is_data:
            continue
        if layer.is_loss:
            losses.append((layer, tuple(blobs[bottom] for bottom in layer.bottoms if bottom in blobs)))
            continue
        for bottom in layer.bottoms:
            if bottom not in blobs:
                blobs[bottom] = f"{INPUT}/{len(outside)}"  # a layer's node has no slash
                outside[blobs[bottom]] = bottom
        sources = tuple(blobs[bottom] for bottom in layer.bottoms)
        if layer.type == "Split":
            if len(sources) != 1:
                raise KdError(f"layer {layer.name} (Split): it has {len(sources)} inputs, one is right")
            blobs.update(dict.fromkeys(layer.tops, sources[0]))
            continue
        if len(layer.tops) != 1 and (layer.type != "Slice" or not layer.tops):
            check_type(layer)
            raise KdError(
                f"layer {layer.name} ({layer.type}): it has {len(layer.tops)} outputs, kd knows one"
            )
        for part, top in enumerate(layer.tops):
            node = safe_name(layer.name if len(layer.tops) == 1 else f"{layer.name}_{part}", steps)
            steps[node] = _Step(layer, node, sources, part)
            blobs[top] = node
    if not steps:
        raise KdError("the network has no layer that computes anything")
    read = {source for step in steps.values() for source in step.inputs}
    ends = [node for node in steps if node not in read]
    output = ends[-1]
    while steps[output].layer.type in _AFTER_LOGITS and len(steps[output].inputs) == 1:
        output = steps[output].inputs[0]
        if output in outside:
            raise KdError("the network is nothing but a softmax")
    needed = {output}
    for node in reversed(steps):
        if node in needed:
            needed.update(steps[node].inputs)
    kept = [step for node, step in steps.items() if node in needed]
    names = {step.layer.name for step in kept}
    dropped = [
        step.layer.name
        for step in steps.values()
        if step.layer.name not in names and step.layer.type not in _AFTER_LOGITS
    ]
    if dropped:
        on_event(
            Note(
                f"left out, as the logits ({steps[output].layer.name}) do not need them: {', '.join(dropped)}"
            )
        )
    inputs = [node for node in outside if node in needed]
    if len(inputs) != 1:
        for step in kept:  # says more: a detector's regions, a layer of someone's own that reads labels
            check_type(step.layer)
        listed = ", ".join(outside[node] for node in inputs[:5])
        raise KdError(
            f"the network reads {len(inputs)} inputs ({listed}); kd takes one: the images",
            "Give a deploy prototxt with --prototxt, in which labels are no input.",
        )
    _check_labelled(output, losses, steps, inputs[0])
    return Wiring(
        tuple(
            replace(step, inputs=tuple(INPUT if n in outside else n for n in step.inputs)) for step in kept
        ),
        outside[inputs[0]],
        output,
    )


def _check_labelled(
    output: str, losses: list[tuple[Layer, tuple[str, ...]]], steps: dict[str, _Step], images: str
) -> None:
    """Refuse logits that were trained to be like another thing made of the images, and on no label."""
    seen = {images}
    for node, step in steps.items():
        if not seen.isdisjoint(step.inputs):
            seen.add(node)
    reading = [(layer, [node for node in read if node in seen]) for layer, read in losses if output in read]
    if reading and all(len(read) > 1 for _, read in reading):
        layer, _ = reading[0]
        raise KdError(
            f"layer {layer.name} ({layer.type}) compares {' with '.join(layer.bottoms[:2])}, "
            "both made of the images: no classifier",
            "kd distils image classifiers; give a deploy prototxt of one with --prototxt.",
        )


def declared_input(network: Network, weights: Weights) -> Shape | None:
    """(C, H, W) as the network declares it, or as its data layers crop to; None if it says nothing."""
    wiring = wire(network)
    declared = network.inputs.get(wiring.input_blob)
    if declared is not None and len(declared) == 3:
        return declared
    for source in network.sources:
        crop = crop_size(source)
        if crop:
            return (input_channels(network, weights), crop, crop)
    return None


def crop_size(source: Layer) -> int:
    """The side a data layer crops images to; 0 if it does not."""
    for name in ("transform_param", "data_param", "image_data_param", "window_data_param"):
        crop = getattr(getattr(source.param, name, None), "crop_size", 0)
        if crop:
            return int(crop)
    return 0


def input_channels(network: Network, weights: Weights) -> int:
    """Channels of the images, from the weights of a convolution that reads them; 3 if there is none."""
    for step in wire(network).steps:
        blobs = weights.get(step.layer.name)
        if INPUT in step.inputs and step.layer.type == "Convolution" and blobs and blobs[0].ndim == 4:
            return int(blobs[0].shape[1]) * int(step.layer.param.convolution_param.group)
    return 3


def assemble(network: Network, weights: Weights, shape: Shape, on_event: OnEvent = ignore) -> Built:
    """Build the graph for images of (C, H, W) and match weights by layer name.

    Raises:
        KdError: an unknown layer, shapes that do not fit, weights missing or of another shape.
    """
    wiring = wire(network, on_event)
    nodes: list[dict[str, Any]] = []
    operations: dict[str, str] = {}
    for step in wiring.steps:
        operation, args = node_of(step.layer, step.part)
        operations[step.node] = operation
        nodes.append({"name": step.node, "op": operation, "inputs": list(step.inputs), "args": args})
    with torch.device("meta"):  # shapes alone: nothing is allocated before they are known to fit the file
        skeleton = GraphNet(shape, nodes, wiring.output, None)
    state: dict[str, Tensor] = {}
    rows = []
    for step in wiring.steps:
        module = skeleton.get_submodule(step.node)
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = state_of(step.layer, operations[step.node], wanted, weights.get(step.layer.name, ()))
        state.update({f"{step.node}.{name}": torch.from_numpy(value.copy()) for name, value in found.items()})
        learned = {name: tuple(value.shape) for name, value in module.named_parameters()}
        kept = {name: size for name, size in wanted.items() if size}
        parameters = sum(math.prod(size) for size in learned.values())
        rows.append(LayerRow(step.layer.name, step.layer.type, skeleton.shapes[step.node], kept, parameters))
    ignored = [name for name in weights if name not in {step.layer.name for step in wiring.steps}]
    if ignored:
        on_event(Note(f"weights of layers that the network does not use: {', '.join(ignored)}"))
    output = skeleton.shapes[wiring.output]
    if not output or not is_vector(output, output[0]):
        raise KdError(
            f"layer {wiring.output}: its output is {dims(output)}, not one value a class",
            "kd distils image classifiers; is the image size right (--image-size)?",
        )
    channels, height, width = shape
    arch_args = {"input": list(shape), "nodes": nodes, "output": wiring.output}
    return Built("graph", arch_args, state, output[0], (height, width, channels), tuple(rows))
