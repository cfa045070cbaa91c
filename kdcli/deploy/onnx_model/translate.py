"""A classifier as an ONNX model: torch's own exporter, minus what it tells of this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import Tensor, nn

from kdcli import __version__
from kdcli.base.errors import KdError
from kdcli.deploy.onnx_model import PREPROCESSING
from kdcli.models import Classifier


class NetworkInterface(nn.Module):
    """Prepared float32 (N, C, H, W) → logits (N, classes)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.network

    def forward(self, prepared: Tensor) -> Tensor:
        logits: Tensor = self.network(prepared)
        return logits


class ImageInterface(nn.Module):
    """Raw images uint8 (N, H, W, C), RGB → probabilities (N, classes)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.preprocess = classifier.preprocess
        self.network = classifier.network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.preprocess(images.permute(0, 3, 1, 2).float()))
        return logits.softmax(dim=1)


def interface_of(classifier: Classifier, *, with_preprocessing: bool) -> nn.Module:
    """The module that a file stands for, in eval mode."""
    return (ImageInterface(classifier) if with_preprocessing else NetworkInterface(classifier)).eval()


def to_onnx(classifier: Classifier, *, opset: int, with_preprocessing: bool) -> onnx.ModelProto:
    """Translate a classifier to ONNX; the result names no file, path or line of this machine.

    Nodes are named `network/…` and `preprocess/…`.

    Raises:
        KdError: torch cannot translate the network.
    """
    height, width, channels = classifier.input_size
    example = torch.arange(2 * height * width * channels).reshape(2, height, width, channels) % 251
    example = example.to(torch.uint8)
    if with_preprocessing:
        inputs, names = example, ("images", "probabilities")
    else:
        with torch.inference_mode():
            inputs = classifier.prepare(example).contiguous().clone()
        names = ("input", "logits")
    try:
        with silence():
            program = torch.onnx.export(
                interface_of(classifier, with_preprocessing=with_preprocessing),
                (inputs,),
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            model = onnx.ModelProto()
            model.CopyFrom(program.model_proto)
    except Exception as error:  # the exporter raises many kinds
        cause = error.__cause__ or error  # the exporter's own message is about its steps
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
        raise KdError(f"network {classifier.arch} cannot be exported to ONNX: {reason}") from error
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise KdError(
            f"the exporter wrote operator set {written} instead of {opset}", f"Use --opset {written}."
        )
    _name_nodes(model, with_preprocessing)
    return model


def fix_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy that takes this many images at a time, no more and no fewer."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


def finish(model: onnx.ModelProto, remarks: dict[str, str]) -> onnx.ModelProto:
    """A copy with kd's metadata alone, checked in full."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.producer_name, whole.producer_version = "kd", __version__
    whole.ClearField("doc_string")
    del whole.metadata_props[:]
    _strip(whole.graph)
    for key, value in sorted(remarks.items()):
        whole.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(whole, full_check=True)
    except Exception as error:  # the checker and the shape inference raise different kinds
        raise KdError(f"the exported model is not valid ONNX: {str(error).splitlines()[0][:300]}") from error
    return whole


def _name_nodes(model: onnx.ModelProto, with_preprocessing: bool) -> None:
    """Name nodes by where they belong: all before the first of the network prepare pixels."""
    network_seen = not with_preprocessing
    for index, node in enumerate(model.graph.node):
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "")
        network_seen |= "'network'" in scopes
        room = "network/" if network_seen else PREPROCESSING
        node.name = f"{room}{index:03d}_{node.op_type}"


def _strip(graph: onnx.GraphProto) -> None:
    """Remove remarks of tools: stack traces with paths, and shapes that anyone can infer."""
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep exporter and quantiser, which talk on every channel they find, from being heard."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
