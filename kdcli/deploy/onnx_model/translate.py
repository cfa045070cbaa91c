"""Classifier → ONNX model, by torch's exporter, without traces of this machine."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from kdcli import __version__
from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.deploy.onnx_model.counts import PREPROCESSING
from kdcli.models import Classifier

_MAX_REASON = 300


class ExportedModule(nn.Module):
    """The module that a file stands for, in eval mode.

    With preprocessing: raw images uint8 (N, H, W, C), RGB → probabilities (N, classes). Without: prepared float32
    (N, C, H, W) → logits (N, classes).
    """

    def __init__(self, classifier: Classifier, *, with_preprocessing: bool) -> None:
        super().__init__()
        self.preprocess = classifier.preprocess if with_preprocessing else None
        self.network = classifier.network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocess is None:
            logits: Tensor = self.network(images)
            return logits
        return self.network(self.preprocess(images.permute(0, 3, 1, 2).float())).softmax(dim=1)


def to_onnx(classifier: Classifier, *, opset: int, with_preprocessing: bool) -> onnx.ModelProto:
    """Translate a classifier to ONNX, nodes named `network/…` and `preprocess/…`; a KdError if torch cannot."""
    example = torch.zeros((2, *classifier.input_size), dtype=torch.uint8)
    if not with_preprocessing:
        with torch.no_grad():
            example = classifier.prepare(example).contiguous()
    try:
        with silenced():
            program: Any = torch.onnx.export(
                ExportedModule(classifier, with_preprocessing=with_preprocessing),
                (example,),
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=["images" if with_preprocessing else "input"],
                output_names=["probabilities" if with_preprocessing else "logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            model: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporter raises many kinds
        cause = error.__cause__ or error  # the exporter's own message is about its steps
        raise KdError(
            f"network {classifier.arch} cannot be exported to ONNX: {first_line(cause, _MAX_REASON)}"
        ) from error
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise KdError(f"the exporter wrote opset {written} instead of {opset}", f"Use --opset {written}.")
    network_seen = not with_preprocessing  # all nodes before the network's first are preprocessing
    for index, node in enumerate(model.graph.node):
        network_seen |= "'network'" in scopes_of(node)
        node.name = f"{'network/' if network_seen else PREPROCESSING}{index:03d}_{node.op_type}"
    return model


def fix_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy with a fixed batch size."""
    fixed = copy.deepcopy(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


def file_bytes(model: onnx.ModelProto, metadata: dict[str, str]) -> bytes:
    """Content of the ONNX file, without stack traces, paths and inferable shapes; a KdError if it is invalid."""
    finished = copy.deepcopy(model)
    finished.producer_name, finished.producer_version = "kd", __version__
    finished.ClearField("doc_string")
    del finished.metadata_props[:]
    graph = finished.graph
    graph.ClearField("value_info")
    for item in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for key, value in sorted(metadata.items()):
        finished.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(finished, full_check=True)
    except Exception as error:  # checker and shape inference raise different kinds
        raise KdError(f"the exported model is not valid ONNX: {first_line(error, _MAX_REASON)}") from error
    return finished.SerializeToString(deterministic=True)


def scopes_of(node: onnx.NodeProto) -> str:
    """Modules that a freshly translated node came from, as torch's exporter wrote them."""
    entries = (item for item in node.metadata_props if item.key == "pkg.torch.onnx.name_scopes")
    return next((item.value for item in entries), "")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress log records, warnings and prints of torch's exporter and onnxruntime's quantiser."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(level)
