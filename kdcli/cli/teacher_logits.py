"""`kd teacher-logits`."""

from __future__ import annotations

from typing import Any

from kdcli.base import units
from kdcli.base.config import DataSettings, LogitsConfig, TeacherInputSettings, make, shell_command
from kdcli.cli import output
from kdcli.cli.defaults import with_defaults
from kdcli.cli.options import command, examples
from kdcli.methods import TrainConfig

_TAKEN = {
    *DataSettings.model_fields, *TeacherInputSettings.model_fields, "teacher", "teacher_weights", "teacher_args",
    "teacher_precision", "augment", "views", "view_seed", "unlabelled", "resize", "grey",
    "val_fraction", "accelerator", "threads",
}  # fmt: skip
EPILOG = examples(
    "kd teacher-logits --teacher big.onnx --data photos --augment flip -o pack",
    "kd teacher-logits --data photos --top-k 20",
)


@command(LogitsConfig, TrainConfig, without=set(TrainConfig.model_fields) - _TAKEN)
def teacher_logits(config: LogitsConfig, **options: Any) -> None:
    """Write a teacher's logits to a folder, for kd train without the teacher.

    Logits of each view of the training images, of these images without augmentation, and of the test images.
    """
    # of a run that reads no labels, with an epoch for each view
    run = {"cache_top_k": config.top_k, "lamda": 0.0, "epochs": options.get("views") or 100}
    train = make(TrainConfig, {**options, **run})
    train = with_defaults(train, needs_teacher=True, tuned={"student"})
    from kdcli.engine.packing import pack_logits
    from kdcli.engine.plan import load_data

    splits = load_data(train, output.on_event)
    made_with = pack_logits(train, splits, config.output, output.on_event)
    size = sum(file.stat().st_size for file in (config.output / "teacher").rglob("*.*"))
    output.json({"pack": config.output, "bytes": size, "made_with": made_with})
    output.text(
        f"wrote {config.output}: {made_with['views']} views of {len(splits.trained_on):,} images, {units.size(size)}"
    )
    output.next_command(shell_command("train", {"teacher": config.output, **train.places}))
