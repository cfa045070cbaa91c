"""A Caffe network and its weights → the arguments of a `kdcli.models.graph` and its state."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.text import dims
from kdcli.caffe.layer_types import check_type, operation_of, state_of
from kdcli.caffe.read import Layer, Network, Weights
from kdcli.models.graph import INPUT, GraphNet, safe_name
from kdcli.models.operations.shapes import Shape, is_vector

_AFTER_LOGITS = ("Softmax", "ArgMax")  # cut off where they end the network


@dataclass(frozen=True)
class ConvertedNetwork:
    """A network with its weights: `arch` and `arch_args` build it, `state` is its state dict."""

    arch: str
    arch_args: dict[str, Any]
    state: dict[str, Tensor]
    classes: int


@dataclass(frozen=True)
class Step:
    """One output of a layer as a node of the graph, with the nodes it reads."""

    layer: Layer
    node: str
    inputs: tuple[str, ...]
    output: int = 0  # number of the layer's output


def logits_graph(network: Network, on_event: OnEvent = ignore) -> tuple[list[Step], str]:
    """The steps that compute the logits, in order, and the blob of the images; KdError without exactly one input.

    Data, losses, the last softmax and branches of no effect on the logits are left out.
    """
    # 1. The node of the logits: the last, before softmax and argmax
    steps, external = _bind(network)
    output = next(reversed(steps), "")
    while output in steps and steps[output].layer.type in _AFTER_LOGITS and len(steps[output].inputs) == 1:
        output = steps[output].inputs[0]
    if output not in steps:
        raise KdError("the network has no layer that computes logits")
    # 2. The nodes it depends on
    needed = {output}
    for node in reversed(steps):
        if node in needed:
            needed.update(steps[node].inputs)
    kept = [step for node, step in steps.items() if node in needed]
    used = {step.layer.name for step in kept}
    types = {step.layer.name: step.layer.type for step in steps.values()}
    unused = [name for name, kind in types.items() if name not in used and kind not in _AFTER_LOGITS]
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
    return kept, external[inputs[0]]


def _bind(network: Network) -> tuple[dict[str, Step], dict[str, str]]:
    """Resolve blobs to nodes; an in-place layer binds its blob to a new node.

    Returns steps by node, in order, and nodes → blobs that no layer writes.
    """
    nodes: dict[str, str] = {}  # blob → node that wrote it last
    steps: dict[str, Step] = {}
    external: dict[str, str] = {}
    repeats: Counter[str] = Counter()
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
                f"layer {layer.name} ({layer.type}): it has {len(layer.tops)} outputs, one is supported"
            )
        for number, top in enumerate(layer.tops):
            node = name = safe_name(layer.name if len(layer.tops) == 1 else f"{layer.name}_{number}")
            while node in steps:
                repeats[name] += 1
                node = f"{name}_{repeats[name] + 1}"
            nodes[top] = node
            steps[node] = Step(layer, node, sources, number)
    return steps, external


def input_of(network: Network, weights: Weights) -> tuple[tuple[int, int, int] | None, int]:
    """The size (H, W, C) of the images, as declared or as data layers crop to it, or None; and their channels.

    The channels are those of the first convolution's weights, or 3.
    """
    steps, blob = logits_graph(network)
    channels = 3
    for step in steps:
        blobs = weights.get(step.layer.name)
        if INPUT in step.inputs and step.layer.type == "Convolution" and blobs and blobs[0].ndim == 4:
            channels = int(blobs[0].shape[1]) * int(step.layer.param.convolution_param.group)
            break
    if (declared := network.inputs.get(blob)) is not None:
        return (declared[1], declared[2], declared[0]), channels
    params = [param for source in network.sources for _, param in transform_params(source)]
    crops = [int(param.crop_size) for param in params if param.crop_size]
    return (crops[0], crops[0], channels) if crops else None, channels


def transform_params(source: Layer) -> list[tuple[str, Any]]:
    """A data layer's messages that may hold crop size, scale and mean, by name; those that are set."""
    names = ("transform_param", "data_param", "image_data_param", "window_data_param")
    fields = source.param.DESCRIPTOR.fields_by_name
    return [(n, getattr(source.param, n)) for n in names if n in fields and source.param.HasField(n)]


def assemble(
    network: Network, weights: Weights, shape: Shape, on_event: OnEvent = ignore
) -> ConvertedNetwork:
    """Build the graph for images of (C, H, W) and assign weights by layer name; KdError where they do not fit."""
    # 1. Layers to nodes
    steps, _ = logits_graph(network, on_event)
    last = steps[-1].node
    nodes: list[dict[str, Any]] = []
    for step in steps:
        operation, args = operation_of(step.layer, step.output)
        nodes.append({"name": step.node, "op": operation, "inputs": list(step.inputs), "args": args})
    with torch.device("meta"):  # only shapes: no memory is allocated before they are known to match the file
        skeleton = GraphNet(shape, nodes, last)
    # 2. Blobs to state
    state: dict[str, Tensor] = {}
    owners: dict[str, str] = {}  # layer name → the node with its weights
    for step, node in zip(steps, nodes, strict=True):
        module = skeleton.get_submodule(step.node)
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        arrays = state_of(step.layer, node["op"], shapes, weights.get(step.layer.name, ()))
        if arrays and owners.setdefault(step.layer.name, step.node) != step.node:
            raise KdError(
                f"two layers named {step.layer.name} take weights",
                "Caffe assigns weights by name. Rename one in a prototxt, and pass it with --prototxt.",
            )
        state |= {f"{step.node}.{name}": torch.from_numpy(value.copy()) for name, value in arrays.items()}
    used = {step.layer.name for step in steps}
    if unused := [name for name in weights if name not in used]:
        on_event(Note(f"weights of layers that the network does not use: {', '.join(unused)}"))
    # 3. One logit for each class
    output = skeleton.shapes[last]
    if not output or not is_vector(output, output[0]):
        raise KdError(
            f"layer {last}: its output is {dims(output)} instead of one value for each class",
            "Check the image size: --image-size, or the input of the prototxt.",
        )
    arch_args = {"input": list(shape), "nodes": nodes, "output": last}
    return ConvertedNetwork("graph", arch_args, state, output[0])
