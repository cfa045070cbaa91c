"""Classifier → ONNX model, by torch's exporter, without traces of this machine."""

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
        if self.preprocess is not None:
            prepared = self.preprocess(images.permute(0, 3, 1, 2).float())
            probabilities: Tensor = self.network(prepared).softmax(dim=1)
            return probabilities
        logits: Tensor = self.network(images)
        return logits


def to_onnx(classifier: Classifier, *, opset: int, with_preprocessing: bool) -> onnx.ModelProto:
    """Translate a classifier to ONNX. Nodes are named `network/…` and `preprocess/…`.

    Raises:
        KdError: torch cannot translate the network.
    """
    height, width, channels = classifier.input_size
    example = torch.arange(2 * height * width * channels).reshape(2, height, width, channels) % 251
    example = example.to(torch.uint8)
    if not with_preprocessing:
        with torch.inference_mode():
            example = classifier.prepare(example).contiguous()
        example = example.clone()  # an inference tensor cannot be traced
    try:
        with silenced():
            program = torch.onnx.export(
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
            assert program is not None
            model = onnx.ModelProto()
            model.CopyFrom(program.model_proto)
    except Exception as error:  # the exporter raises many kinds
        cause = error.__cause__ or error  # the exporter's own message is about its steps
        raise KdError(
            f"network {classifier.arch} cannot be exported to ONNX: {first_line(cause, _MAX_REASON)}"
        ) from error
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise KdError(
            f"the exporter wrote operator set {written} instead of {opset}", f"Use --opset {written}."
        )
    network_seen = not with_preprocessing  # all nodes before the network's first are preprocessing
    for index, node in enumerate(model.graph.node):
        network_seen |= "'network'" in scopes_of(node)
        node.name = f"{'network/' if network_seen else PREPROCESSING}{index:03d}_{node.op_type}"
    return model


def fix_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy with a fixed batch size."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


def finish(model: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """A checked copy with this metadata, without stack traces, paths and inferable shapes.

    Raises:
        KdError: the model is not valid ONNX.
    """
    finished = onnx.ModelProto()
    finished.CopyFrom(model)
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
    return finished


def file_bytes(model: onnx.ModelProto, metadata: dict[str, str]) -> bytes:
    """Content of the ONNX file, see `finish`: the same bytes for the same model and metadata."""
    return finish(model, metadata).SerializeToString(deterministic=True)


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
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
