"""Settings of `kd train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from kdcli.config.base import DATA, METHOD, OPTIMISER, RUN, DataSettings, TeacherPath, Threads, about

AUGMENT_STEPS = ("flip", "crop", "cutout", "mixup")
_SAVE_EVERY = re.compile(r"(\d{1,9}) ?(epochs?|steps?|min|)")


class TrainConfig(DataSettings):
    """`kd train`."""

    method: str = Field("kd", description="How the student learns.", json_schema_extra=about(METHOD))
    student: str = Field(
        "lenet",
        description="The network that is trained: lenet, lenet-caffe, nin, nin-fc, "
        "convnet-tiny, convnet-small or convnet-large; or a checkpoint (.pt), to go on from its weights.",
        json_schema_extra=about(METHOD),
    )
    teacher: Path = Field(
        TeacherPath,
        description="A checkpoint (.pt) or an ONNX file whose logits the student learns from.",
        json_schema_extra=about(METHOD),
    )
    tau: float = Field(
        3.0,
        gt=0,
        le=1000,
        description="kd: temperature of the soft targets.",
        json_schema_extra=about(METHOD),
    )
    lamda: float = Field(
        0.3,
        ge=0,
        le=1,
        description="kd: share of cross-entropy; the soft term gets the rest.",
        json_schema_extra=about(METHOD, "--lambda"),
    )
    noisy_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="noisy: probability that a sample's target is perturbed.",
        json_schema_extra=about(METHOD),
    )
    noisy_sigma: float = Field(
        0.9,
        ge=0,
        le=100,
        description="noisy: standard deviation of the relative noise.",
        json_schema_extra=about(METHOD),
    )
    noise_scope: Literal["sample", "logit"] = Field(
        "sample",
        description="noisy: one draw for all logits of a sample, or one for each.",
        json_schema_extra=about(METHOD),
    )
    ce_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of cross-entropy on the labels; by default the method's own.",
        json_schema_extra=about(METHOD),
    )
    kd_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the teacher's term; by default the method's own.",
        json_schema_extra=about(METHOD),
    )
    teacher_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout left on in the teacher; above 0 it runs live at each step.",
        json_schema_extra=about(METHOD),
    )
    teacher_cache: Literal["views", "fixed", "off"] = Field(
        "views",
        description="views: the teacher is run once on each of --views variants; fixed: once on the plain images, "
        "while the student sees a fresh variant each epoch; off: in each step.",
        json_schema_extra=about(METHOD),
    )
    cache_top_k: int = Field(
        0,
        ge=0,
        le=65535,
        description="Keep only the K largest of the teacher's logits, for many classes; 0: all.",
        json_schema_extra=about(METHOD),
    )
    teacher_precision: Literal["auto", "32", "bf16"] = Field(
        "auto",
        description="auto: what is fastest here and gives 99.9 % of images the same class as float32.",
        json_schema_extra=about(METHOD),
    )

    grey: bool = Field(
        False, description="Turn colour images to grey, one channel.", json_schema_extra=about(DATA)
    )
    augment: str = Field(
        "none",
        description="How training images are varied: any of flip, crop, cutout and mixup, joined by hyphens.",
        json_schema_extra=about(DATA, metavar="none|flip|flip-crop|…"),
    )
    views: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Distinct variants of each image, cycled over the epochs; 0: as many as make sense.",
        json_schema_extra=about(DATA),
    )
    preprocess: Literal["mean-std", "mean-image", "gcn-zca", "none"] = Field(
        "mean-std", description="What the student does to its pixels.", json_schema_extra=about(DATA)
    )
    val_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the training data kept for validation.",
        json_schema_extra=about(DATA),
    )

    epochs: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Passes over the training data.",
        json_schema_extra=about(OPTIMISER),
    )
    batch_size: int = Field(
        256, ge=1, le=1_000_000, description="Images a step.", json_schema_extra=about(OPTIMISER)
    )
    lr: float = Field(
        1e-3, gt=0, le=100, description="Learning rate at its highest.", json_schema_extra=about(OPTIMISER)
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="sgd has Nesterov momentum 0.9.", json_schema_extra=about(OPTIMISER)
    )
    schedule: Literal["step", "cosine", "onecycle"] = Field(
        "onecycle",
        description="step: ÷10 at 80 % of the epochs; cosine: to 0; onecycle: up for 30 %, then to 0.",
        json_schema_extra=about(OPTIMISER),
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="L2 penalty (adamw: decoupled).", json_schema_extra=about(OPTIMISER)
    )
    dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Dropout of the network that is trained, where it has any.",
        json_schema_extra=about(OPTIMISER),
    )

    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Initial weights, order, views and noise all follow from it.",
        json_schema_extra=about(RUN),
    )
    view_seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of the views alone, so that runs of several seeds share what is kept of the teacher; "
        "by default that of the run.",
        json_schema_extra=about(RUN),
    )
    precision: Literal["auto", "32", "bf16"] = Field(
        "auto", description="auto measures which is faster here.", json_schema_extra=about(RUN)
    )
    compile: bool = Field(
        False, description="Compile the student's step (torch.compile).", json_schema_extra=about(RUN)
    )
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="What to train on; auto: a GPU if there is one.", json_schema_extra=about(RUN)
    )
    devices: int = Field(
        1,
        ge=1,
        le=1024,
        description="GPUs, or on a CPU processes, that share each batch. Under torchrun it decides.",
        json_schema_extra=about(RUN),
    )
    threads: Threads = 0
    name: str = Field(
        "",
        description="Name of the run; by default method, student and a number.",
        json_schema_extra=about(RUN),
    )
    runs_dir: Path = Field(Path("runs"), description="Runs are written here.", json_schema_extra=about(RUN))
    save_every: str = Field(
        "1",
        description="How often last.pt is written: N epochs, or as in 500steps or 10min; 0: only at the end.",
        json_schema_extra=about(RUN, metavar="N|Nsteps|Nmin"),
    )
    keep: int = Field(
        2,
        ge=1,
        le=10_000,
        description="Saved states to keep: last.pt and those before it.",
        json_schema_extra=about(RUN),
    )
    log_every: int = Field(
        50,
        ge=0,
        description="Steps between lines of metrics.jsonl; 0: a line an epoch only.",
        json_schema_extra=about(RUN),
    )
    tensorboard: bool = Field(
        False,
        description="Also write metrics for TensorBoard (pip install 'kdcli[tensorboard]').",
        json_schema_extra=about(RUN),
    )

    @field_validator("augment")
    @classmethod
    def _augment_of_known_steps(cls, value: str) -> str:
        steps = value.split("-")
        if value != "none" and (len(set(steps)) < len(steps) or not set(steps) <= set(AUGMENT_STEPS)):
            raise ValueError(f"must be none, or some of {', '.join(AUGMENT_STEPS)} joined by hyphens")
        return value if value == "none" else "-".join(step for step in AUGMENT_STEPS if step in steps)

    @field_validator("save_every", mode="before")
    @classmethod
    def _save_every_in_known_units(cls, value: Any) -> str:
        found = _SAVE_EVERY.fullmatch(str(value).strip())
        if found is None:
            raise ValueError("must be a number of epochs, or as in 500steps or 10min")
        unit = found[2].rstrip("s")
        return found[1] + {"epoch": "", "step": "steps"}.get(unit, unit)

    @property
    def augment_seed(self) -> int:
        """What views are drawn by."""
        return self.seed if self.view_seed is None else self.view_seed

    @property
    def saving(self) -> tuple[int, str]:
        """How often the state is saved: a number, and `epochs`, `steps` or `min`; number 0: only at the end."""
        found = _SAVE_EVERY.fullmatch(self.save_every)
        assert found is not None
        return int(found[1]), found[2] or "epochs"

    @property
    def student_file(self) -> Path | None:
        """The checkpoint that the student goes on from; None for a network's name."""
        return Path(self.student) if self.student.lower().endswith(".pt") else None

    @property
    def student_name(self) -> str:
        """The network's name, or what its file is called; a run's student by the run's name."""
        path = self.student_file
        if path is None:
            return self.student
        own = path.resolve()
        return (
            re.sub(r'[\\:*?"<>|]', "_", own.parent.name if own.stem == "student" else own.stem) or "student"
        )

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, value: str) -> str:
        if value in (".", "..") or any(mark in value for mark in '/\\\0:*?"<>|') or value.startswith("-"):
            raise ValueError("must be a plain folder name")
        return value
