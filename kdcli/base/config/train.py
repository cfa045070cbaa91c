"""Settings of `kd train`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdcli.base.config.ramp import Ramp, read_weight
from kdcli.base.config.settings import (
    DATA,
    METHOD,
    OF_METHODS,
    OPTIMISER,
    RUN,
    DataSettings,
    FolderName,
    TeacherPath,
    Threads,
    about,
)

AUGMENT_STEPS = ("flip", "crop", "cutout", "mixup")
_SAVE_EVERY = re.compile(r"(\d{1,9}) ?(epochs?|steps?|min|)")


class TrainConfig(DataSettings):
    """`kd train`."""

    method: str = Field(
        "kd",
        description="How the student learns; several joined as in kd+at; or package.module:function, of your own.",
        json_schema_extra=about(METHOD),
    )
    student: str = Field(
        "lenet",
        description="The network that is trained: lenet, lenet-caffe, nin, nin-fc, convnet-tiny…large, "
        "resnet8…110, resnet8x4, resnet32x4, wrn-16-1…40-2, vgg8, vgg13, mobilenetv2-half, shufflenetv1 or "
        "shufflenetv2 (kd info NETWORK shows it); or a checkpoint (.pt), to go on from its weights.",
        json_schema_extra=about(METHOD),
    )
    teacher: tuple[Path, ...] = Field(
        (TeacherPath,),
        description="A checkpoint (.pt) or an ONNX file that the student learns from; several, each with a --teacher "
        "of its own, are averaged.",
        json_schema_extra=about(METHOD, metavar="FILE"),
    )
    teacher_weight: tuple[float, ...] = Field(
        (),
        description="Weight of each teacher's logits in their mean, in the order of --teacher; by default equal.",
        json_schema_extra=about(METHOD, metavar="WEIGHT"),
    )
    assistant: tuple[str, ...] = Field(
        (),
        description="A network between teacher and student: the teacher teaches it, and it the next one. Once for "
        "each, in this order; each is a run, NAME-assistant-1 and so on.",
        json_schema_extra=about(METHOD, metavar="NETWORK"),
    )
    generations: int = Field(
        1,
        ge=1,
        le=100,
        description="Train the student so many times, each time from the one before; the seed rises by 1.",
        json_schema_extra=about(METHOD),
    )
    tau: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Temperature of soft targets; by default the method's own: kd 3, dkd and dist 4, lskd 2, "
        "born-again 1.",
        json_schema_extra=about(OF_METHODS),
    )
    tau_end: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="The temperature moves in a straight line to this one; by default it stays.",
        json_schema_extra=about(OF_METHODS),
    )
    lamda: float = Field(
        0.3,
        ge=0,
        le=1,
        description="kd: share of cross-entropy; the soft term gets the rest.",
        json_schema_extra=about(OF_METHODS, "--lambda"),
    )
    noisy_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="noisy: probability that a sample's target is perturbed.",
        json_schema_extra=about(OF_METHODS),
    )
    noisy_sigma: float = Field(
        0.9,
        ge=0,
        le=100,
        description="noisy: standard deviation of the relative noise.",
        json_schema_extra=about(OF_METHODS),
    )
    noise_scope: Literal["sample", "logit"] = Field(
        "sample",
        description="noisy: one draw for all logits of a sample, or one for each.",
        json_schema_extra=about(OF_METHODS),
    )
    standardize: bool = Field(
        False,
        description="kd, dkd, born-again: standardize the logits of each image first (Sun et al. 2024).",
        json_schema_extra=about(OF_METHODS),
    )
    label_smoothing: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="ls: share of a label spread over all classes.",
        json_schema_extra=about(OF_METHODS),
    )
    dkd_alpha: float = Field(
        1.0, ge=0, description="dkd: weight of the target class's part.", json_schema_extra=about(OF_METHODS)
    )
    dkd_beta: float = Field(
        8.0, ge=0, description="dkd: weight of the other classes' part.", json_schema_extra=about(OF_METHODS)
    )
    dist_inter: float = Field(
        2.0,
        ge=0,
        description="dist: weight of the relation within an image.",
        json_schema_extra=about(OF_METHODS),
    )
    dist_intra: float = Field(
        2.0,
        ge=0,
        description="dist: weight of the relation within a class.",
        json_schema_extra=about(OF_METHODS),
    )
    hint_stage: int = Field(
        0,
        ge=0,
        le=1000,
        description="fitnet: the stage that is guided, from 1; 0: the middle one.",
        json_schema_extra=about(OF_METHODS),
    )
    rkd_distance: float = Field(
        25.0, ge=0, description="rkd: weight of distances.", json_schema_extra=about(OF_METHODS)
    )
    rkd_angle: float = Field(
        50.0, ge=0, description="rkd: weight of angles.", json_schema_extra=about(OF_METHODS)
    )
    crd_dim: int = Field(
        128,
        ge=1,
        le=65536,
        description="crd: width of the common space.",
        json_schema_extra=about(OF_METHODS),
    )
    crd_negatives: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="crd: images of other classes each image is told apart from.",
        json_schema_extra=about(OF_METHODS),
    )
    crd_temperature: float = Field(
        0.07,
        gt=0,
        le=100,
        description="crd: temperature of the similarities.",
        json_schema_extra=about(OF_METHODS),
    )
    student_stages: str = Field(
        "",
        description="Layers whose maps methods of features read, joined by commas; by default the network's stages.",
        json_schema_extra=about(OF_METHODS, metavar="LAYER,LAYER…"),
    )
    teacher_stages: str = Field(
        "",
        description="The same of the teacher; kd info lists layers.",
        json_schema_extra=about(OF_METHODS, metavar="LAYER,LAYER…"),
    )
    weight: tuple[str, ...] = Field(
        (),
        description="Weight of a term by its method's name, or ce; FIRST:LAST moves in a straight line, over all or "
        "so many EPOCHS. Once for each term.",
        json_schema_extra=about(METHOD, metavar="NAME=W|NAME=FIRST:LAST[:EPOCHS]"),
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
        description="Weight of the teacher's term, where there is one; by default the method's own.",
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
        description="auto: what is fastest here and gives 99.9 % of images the same class as float32; of a teacher "
        "that runs in each step, float32.",
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
    unlabelled: Path | None = Field(
        None,
        description="A folder or archive of further images to train on, without labels, at any depth; for methods "
        "that read none, as logits, or kd with --lamda 0.",
        json_schema_extra=about(DATA, metavar="FOLDER|ARCHIVE"),
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
    width: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Channels of the network that is trained, times this.",
        json_schema_extra=about(METHOD),
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
    name: FolderName = Field(
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

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_teacher_or_several(cls, value: Any) -> Any:
        found = (value,) if isinstance(value, str | Path) else value
        if not found:
            raise ValueError("must name a file")
        return found

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if self.teacher_weight:
            if len(self.teacher_weight) != len(self.teacher):
                raise ValueError(
                    f"--teacher-weight: {len(self.teacher_weight)} for {len(self.teacher)} teachers; give each one"
                )
            if min(self.teacher_weight) < 0 or not 0 < sum(self.teacher_weight) < math.inf:
                raise ValueError("--teacher-weight: must be 0 or more, and above 0 in all")
        file = next((name for name in self.assistant if name.lower().endswith(".pt")), None)
        if file is not None:
            raise ValueError(f"--assistant {file}: an assistant is trained anew; name a network")
        names = [name for name, _ in self._read_weights()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"--weight {twice}: given twice")
        return self

    def _read_weights(self) -> list[tuple[str, Ramp]]:
        found = []
        for text in self.weight:
            try:
                found.append(read_weight(text, self.epochs))
            except ValueError as error:
                raise ValueError(f"--weight {text}: {error}") from error
        return found

    @property
    def weights(self) -> dict[str, Ramp]:
        """What --weight says, by the term's name."""
        return dict(self._read_weights())

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
    def method_name(self) -> str:
        """The method as a run's name has it; of a function of one's own, what follows the module."""
        return "+".join(part.rpartition(":")[2] for part in self.method.split("+"))

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
