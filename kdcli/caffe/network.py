"""A Caffe network and its weights → the arguments of a `kdcli.models.graph` and its state."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.text import dims
from kdcli.caffe.blobs import Weights
from kdcli.caffe.layer_types import check_type, operation_of, state_of
from kdcli.caffe.read import Layer, Network
from kdcli.models.graph import INPUT, GraphNet, safe_name
from kdcli.models.operations.shapes import Shape, is_vector

_AFTER_LOGITS = ("Softmax", "ArgMax")  # cut off where they end the network


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of the converted network.

    Attributes:
        name, type: Caffe's.
        output_shape: for one image.
        weight_shapes: state entry → shape in the network.
        parameters: number of trainable values.
    """

    name: str
    type: str
    output_shape: Shape
    weight_shapes: dict[str, Shape]
    parameters: int


@dataclass(frozen=True)
class ConvertedNetwork:
    """A network with its weights: `arch` and `arch_args` build it, `state` is its state dict."""

    arch: str
    arch_args: dict[str, Any]
    state: dict[str, Tensor]
    classes: int
    input_size: tuple[int, int, int]  # (H, W, C)
    layers: tuple[ConvertedLayer, ...]


@dataclass(frozen=True)
class Step:
    """One output of a layer as a node of the graph, with the nodes it reads."""

    layer: Layer
    node: str
    inputs: tuple[str, ...]
    output: int = 0  # number of the layer's output


@dataclass(frozen=True)
class LogitsGraph:
    """The steps that compute the logits, in order, from one input."""

    steps: tuple[Step, ...]
    input_blob: str
    output: str  # node of the logits


def logits_graph(network: Network, on_event: OnEvent = ignore) -> LogitsGraph:
    """Find what computes the logits: without data, losses, the last softmax, and branches of no effect on them.

    Raises:
        KdError: not exactly one input, or no layer that computes.
    """
    # 1. The node of the logits: the last that no other reads, before softmax and argmax
    steps, external = _bind(network)
    if not steps:
        raise KdError("the network has no layer that computes anything")
    read = {source for step in steps.values() for source in step.inputs}
    output = [node for node in steps if node not in read][-1]
    while steps[output].layer.type in _AFTER_LOGITS and len(steps[output].inputs) == 1:
        output = steps[output].inputs[0]
        if output in external:
            raise KdError("the network is only a softmax")
    # 2. The nodes it depends on
    needed = {output}
    for node in reversed(steps):
        if node in needed:
            needed.update(steps[node].inputs)
    kept = [step for node, step in steps.items() if node in needed]
    names = {step.layer.name for step in kept}
    unused = [
        step.layer.name
        for step in steps.values()
        if step.layer.name not in names and step.layer.type not in _AFTER_LOGITS
    ]
    if unused:
        logits = steps[output].layer.name
        on_event(Note(f"left out, as the logits ({logits}) do not need them: {', '.join(unused)}"))
    # 3. One input: the images
    inputs = [node for node in external if node in needed]
    if len(inputs) != 1:
        for step in kept:  # an unknown type is the better error: a detector's, or a user-defined one
            check_type(step.layer)
        listed = ", ".join(external[node] for node in inputs[:5])
        raise KdError(
            f"the network reads {len(inputs)} inputs ({listed}); kd takes one: the images",
            "Pass a deploy prototxt with --prototxt, which has no input for labels.",
        )
    kept = [replace(step, inputs=tuple(INPUT if n in external else n for n in step.inputs)) for step in kept]
    return LogitsGraph(tuple(kept), external[inputs[0]], output)


def _bind(network: Network) -> tuple[dict[str, Step], dict[str, str]]:
    """Resolve blobs to nodes; an in-place layer binds its blob to a new node.

    Returns:
        steps by node, in order; and the nodes that stand for blobs that no layer writes, with those blobs.
    """
    nodes: dict[str, str] = {}  # blob → node that wrote it last
    steps: dict[str, Step] = {}
    external: dict[str, str] = {}
    for layer in network.layers:
        if layer.is_data or layer.is_loss:
            continue
        for bottom in layer.bottoms:
            if bottom not in nodes:
                nodes[bottom] = f"{INPUT}/{len(external)}"  # a layer's node has no slash
                external[nodes[bottom]] = bottom
        sources = tuple(nodes[bottom] for bottom in layer.bottoms)
        if layer.type == "Split":
            if len(sources) != 1:
                raise KdError(f"layer {layer.name} (Split): it has {len(sources)} inputs instead of one")
            nodes.update(dict.fromkeys(layer.tops, sources[0]))
            continue
        if len(layer.tops) != 1 and (layer.type != "Slice" or not layer.tops):
            check_type(layer)
            raise KdError(
                f"layer {layer.name} ({layer.type}): it has {len(layer.tops)} outputs, kd knows one"
            )
        for number, top in enumerate(layer.tops):
            name = layer.name if len(layer.tops) == 1 else f"{layer.name}_{number}"
            nodes[top] = safe_name(name, steps)
            steps[nodes[top]] = Step(layer, nodes[top], sources, number)
    return steps, external


def declared_size(network: Network, channels: int) -> tuple[int, int, int] | None:
    """(H, W, C) as the network declares it, or as its data layers crop to; None if neither is given."""
    declared = network.inputs.get(logits_graph(network).input_blob)
    if declared is not None and len(declared) == 3:
        return (declared[1], declared[2], declared[0])
    params = [param for source in network.sources for _, param in transform_params(source)]
    crops = [int(param.crop_size) for param in params if param.crop_size]
    return (crops[0], crops[0], channels) if crops else None


def transform_params(source: Layer) -> list[tuple[str, Any]]:
    """A data layer's messages that may hold crop size, scale and mean, by name; those that are set."""
    names = ("transform_param", "data_param", "image_data_param", "window_data_param")
    fields = source.param.DESCRIPTOR.fields_by_name
    return [(n, getattr(source.param, n)) for n in names if n in fields and source.param.HasField(n)]


def input_channels(network: Network, weights: Weights) -> int:
    """Channels of the images, from the weights of a convolution that reads them; 3 if there is none."""
    for step in logits_graph(network).steps:
        blobs = weights.get(step.layer.name)
        if INPUT in step.inputs and step.layer.type == "Convolution" and blobs and blobs[0].ndim == 4:
            return int(blobs[0].shape[1]) * int(step.layer.param.convolution_param.group)
    return 3


def assemble(
    network: Network, weights: Weights, shape: Shape, on_event: OnEvent = ignore
) -> ConvertedNetwork:
    """Build the graph for images of (C, H, W) and assign weights by layer name.

    Raises:
        KdError: an unknown layer, shapes that do not fit, weights missing or of another shape.
    """
    # 1. Layers to nodes
    found = logits_graph(network, on_event)
    operations = {step.node: operation_of(step.layer, step.output) for step in found.steps}
    nodes: list[dict[str, Any]] = [
        {"name": step.node, "op": operation, "inputs": list(step.inputs), "args": args}
        for step, (operation, args) in zip(found.steps, operations.values(), strict=True)
    ]
    with torch.device("meta"):  # only shapes: no memory is allocated before they are known to match the file
        skeleton = GraphNet(shape, nodes, found.output)
    # 2. Blobs to state
    state: dict[str, Tensor] = {}
    layers = []
    for step in found.steps:
        module = skeleton.get_submodule(step.node)
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        blobs = weights.get(step.layer.name, ())
        arrays = state_of(step.layer, operations[step.node][0], shapes, blobs)
        state.update(
            {f"{step.node}.{name}": torch.from_numpy(value.copy()) for name, value in arrays.items()}
        )
        layers.append(converted_layer(step.layer.name, step.layer.type, module, skeleton.shapes[step.node]))
    unused = [name for name in weights if name not in {step.layer.name for step in found.steps}]
    if unused:
        on_event(Note(f"weights of layers that the network does not use: {', '.join(unused)}"))
    # 3. One logit for each class
    output = skeleton.shapes[found.output]
    if not output or not is_vector(output, output[0]):
        raise KdError(
            f"layer {found.output}: its output is {dims(output)} instead of one value for each class",
            "kd distils image classifiers; is the image size right (--image-size)?",
        )
    channels, height, width = shape
    arch_args = {"input": list(shape), "nodes": nodes, "output": found.output}
    return ConvertedNetwork("graph", arch_args, state, output[0], (height, width, channels), tuple(layers))


def converted_layer(name: str, kind: str, module: nn.Module, output_shape: Shape) -> ConvertedLayer:
    """The summary of a module: shapes of its state without scalars, number of its parameters."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if value.ndim}
    parameters = sum(math.prod(value.shape) for value in module.parameters())
    return ConvertedLayer(name, kind, output_shape, shapes, parameters)
