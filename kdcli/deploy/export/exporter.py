"""Checkpoint → ONNX file: translate, verify, quantise, measure, write."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcli import data
from kdcli.base.config import ExportConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.files import atomic_path
from kdcli.base.results import Result
from kdcli.data import ImageSet, Splits
from kdcli.data.decode import Pixels
from kdcli.deploy.export.job import AccuracyDrop, ExportJob, Quantisation, choose_samples
from kdcli.deploy.export.parity import Parity
from kdcli.deploy.int8 import RecipeTrial
from kdcli.deploy.onnx_model.metadata import make_metadata
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier

EXPORTS_DIR = Path("exports")


@dataclass(frozen=True)
class ExportResult(Result):
    """The file and its measurements."""

    path: Path
    size_bytes: int
    sha256: str  # of the file
    checkpoint: Path
    opset: int
    with_preprocessing: bool  # takes raw uint8 (N, H, W, C) images and gives probabilities
    data_label: str  # the data whose training images were used
    parity: Parity  # of the float32 network
    quantisation: Quantisation | None = None  # None for a float32 file
    trials: tuple[RecipeTrial, ...] = ()  # of `auto`; without a quantisation, none was faster than float32
    batch: int | None = None  # fixed batch size; None: any
    drop: AccuracyDrop | None = None  # measured for --max-drop


def export(
    classifier: Classifier, config: ExportConfig, images: Splits | None = None, on_event: OnEvent = ignore
) -> ExportResult:
    """Write a classifier in eval mode as one ONNX file whose outputs are verified against it.

    No file is written where it differs or loses more than `max_drop`, a KdError, and an earlier one is unchanged.

    Args:
        images: data whose *train* images verify parity, calibrate int8 and choose its recipe; by default what
            `config` or the classifier's provenance names.
    """
    # 1. Check the output's name; load the images.
    output = config.output
    if output is not None and (output.suffix.lower() != ".onnx" or output.is_dir()):
        raise UsageError(f"--output {output}: must be a file name that ends in .onnx")
    images = images or data.load(**data.source_for(classifier, config), on_event=on_event)
    if problem := data.incompatibility(classifier, images.train):
        raise KdError(f"the model {problem}", "Pass data that fits with --data.")
    samples = choose_samples(classifier.provenance, images.train, config)
    job = ExportJob(classifier, images.train, samples, config, on_event)

    # 2. Translate the float32 network and verify it.
    on_event(Progress("exporting", 0, 3, "steps"))
    raw = config.with_preprocessing
    model = to_onnx(classifier, opset=config.opset, with_preprocessing=raw)
    metadata = make_metadata(classifier, with_preprocessing=raw)
    on_event(Progress("exporting", 1, 3, "steps"))
    content, outputs, parity = job.verify(model, metadata)
    on_event(Progress("exporting", 2, 3, "steps"))

    # 3. Quantise; `auto` keeps float32 where int8 is no faster.
    quantisation: Quantisation | None = None
    trials: tuple[RecipeTrial, ...] = ()
    if config.recipe:
        content, quantisation, trials = job.quantise(model, metadata, content, outputs)

    # 4. Measure the loss of accuracy, and write.
    drop = None if config.max_drop is None else job.measure_drop(content, config.max_drop)
    output = output or default_output(classifier.path, config, int8=quantisation is not None)
    with atomic_path(output) as temporary:
        temporary.write_bytes(content)
    on_event(Progress("exporting", 3, 3, "steps"))
    return ExportResult(
        path=output,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        checkpoint=classifier.path,
        opset=config.opset,
        with_preprocessing=raw,
        data_label=images.label,
        parity=parity,
        quantisation=quantisation,
        trials=trials,
        batch=config.batch,
        drop=drop,
    )


def export_classifier(
    classifier: Classifier, config: ExportConfig, images: Pixels, label: str, on_event: OnEvent = ignore
) -> ExportResult:
    """`export`, verified on images uint8 (N, H, W, C); `label` is their name."""
    split = ImageSet(images, np.zeros(len(images), np.int64), classifier.classes, fingerprint="")
    return export(classifier, config, Splits(label, label, split, split), on_event)


def default_output(checkpoint: Path, config: ExportConfig, *, int8: bool = False) -> Path:
    """`exports/<run>.onnx` for `runs/<run>/student.pt`, else `exports/<file name>.onnx`; or with a suffix."""
    folder = checkpoint.parent
    is_run = folder.parent.name == "runs" or (folder / "config.toml").is_file()
    stem = folder.name if is_run and checkpoint.name == "student.pt" else checkpoint.stem
    suffix = ("-images" if config.with_preprocessing else "") + ("-int8" if int8 else "")
    if config.batch is not None:
        suffix += f"-batch{config.batch}"
    if config.opset != ExportConfig.model_fields["opset"].default:
        suffix += f"-opset{config.opset}"
    return EXPORTS_DIR / f"{stem}{suffix}.onnx"
