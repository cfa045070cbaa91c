"""Settings of `kd train`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

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
    setting,
)

AUGMENT_STEPS = ("flip", "crop", "cutout", "mixup")
_SAVE_EVERY = re.compile(r"(\d{1,9}) ?(epochs?|steps?|min|)")


class TrainSettings(DataSettings):
    """`kd train`."""

    method: str = setting(
        "kd",
        "How the student learns; several joined as in kd+at; or package.module:function, of your own.",
        METHOD,
    )
    student: str = setting(
        "lenet",
        "The network that is trained: lenet, lenet-caffe, nin, nin-fc, convnet-tiny…large, "
        "resnet8…110, resnet8x4, resnet32x4, wrn-16-1…40-2, vgg8, vgg13, mobilenetv2-half, shufflenetv1 or "
        "shufflenetv2 (kd info NETWORK shows it); or a checkpoint (.pt), to go on from its weights.",
        METHOD,
    )
    teacher: tuple[Path, ...] = setting(
        (TeacherPath,),
        "A checkpoint (.pt) or an ONNX file that the student learns from; several, each with a --teacher "
        "of its own, are averaged.",
        METHOD,
        metavar="FILE",
    )
    teacher_weight: tuple[float, ...] = setting(
        (),
        "Weight of each teacher's logits in their mean, in the order of --teacher; by default equal.",
        METHOD,
        metavar="WEIGHT",
    )
    assistant: tuple[str, ...] = setting(
        (),
        "A network between teacher and student: the teacher teaches it, and it the next one. Once for "
        "each, in this order; each is a run, NAME-assistant-1 and so on.",
        METHOD,
        metavar="NETWORK",
    )
    generations: int = setting(
        1,
        "Train the student so many times, each time from the one before; the seed rises by 1.",
        METHOD,
        ge=1,
        le=100,
    )
    tau: float | None = setting(
        None,
        "Temperature of soft targets; by default the method's own: kd 3, dkd and dist 4, lskd 2, "
        "born-again 1.",
        OF_METHODS,
        gt=0,
        le=1000,
    )
    tau_end: float | None = setting(
        None,
        "The temperature moves in a straight line to this one; by default it stays.",
        OF_METHODS,
        gt=0,
        le=1000,
    )
    standardize: bool = setting(
        False,
        "kd, dkd, born-again: standardize the logits of each image first (Sun et al. 2024).",
        OF_METHODS,
    )
    student_stages: str = setting(
        "",
        "Layers whose maps methods of features read, joined by commas; by default the network's stages.",
        OF_METHODS,
        metavar="LAYER,LAYER…",
    )
    teacher_stages: str = setting(
        "", "The same of the teacher; kd info lists layers.", OF_METHODS, metavar="LAYER,LAYER…"
    )
    weight: tuple[str, ...] = setting(
        (),
        "Weight of a term by its method's name, or ce; FIRST:LAST moves in a straight line, over all or "
        "so many EPOCHS. Once for each term.",
        METHOD,
        metavar="NAME=W|NAME=FIRST:LAST[:EPOCHS]",
    )
    ce_weight: float | None = setting(
        None, "Weight of cross-entropy on the labels; by default the method's own.", METHOD, ge=0
    )
    kd_weight: float | None = setting(
        None, "Weight of the teacher's term, where there is one; by default the method's own.", METHOD, ge=0
    )
    teacher_dropout: float = setting(
        0.0, "Dropout left on in the teacher; above 0 it runs live at each step.", METHOD, ge=0, lt=1
    )
    teacher_cache: Literal["views", "fixed", "off"] = setting(
        "views",
        "views: the teacher is run once on each of --views variants; fixed: once on the plain images, "
        "while the student sees a fresh variant each epoch; off: in each step.",
        METHOD,
    )
    cache_top_k: int = setting(
        0,
        "Keep only the K largest of the teacher's logits, for many classes; 0: all.",
        METHOD,
        ge=0,
        le=65535,
    )
    teacher_precision: Literal["auto", "32", "bf16"] = setting(
        "auto",
        "auto: what is fastest here and gives 99.9 % of images the same class as float32; of a teacher "
        "that runs in each step, float32.",
        METHOD,
    )

    grey: bool = setting(False, "Turn colour images to grey, one channel.", DATA)
    augment: str = setting(
        "none",
        "How training images are varied: any of flip, crop, cutout and mixup, joined by hyphens.",
        DATA,
        metavar="none|flip|flip-crop|…",
    )
    unlabelled: Path | None = setting(
        None,
        "A folder or archive of further images to train on, without labels, at any depth; for methods "
        "that read none, as logits, or kd with --lamda 0.",
        DATA,
        metavar="FOLDER|ARCHIVE",
    )
    views: int = setting(
        0,
        "Distinct variants of each image, cycled over the epochs; 0: as many as make sense.",
        DATA,
        ge=0,
        le=100_000,
    )
    preprocess: Literal["mean-std", "mean-image", "gcn-zca", "none"] = setting(
        "mean-std", "What the student does to its pixels.", DATA
    )
    val_fraction: float = setting(0.05, "Share of the training data kept for validation.", DATA, ge=0, lt=1)

    epochs: int = setting(100, "Passes over the training data.", OPTIMISER, ge=1, le=1_000_000)
    batch_size: int = setting(256, "Images a step.", OPTIMISER, ge=1, le=1_000_000)
    lr: float = setting(1e-3, "Learning rate at its highest.", OPTIMISER, gt=0, le=100)
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "sgd has Nesterov momentum 0.9.", OPTIMISER)
    schedule: Literal["step", "cosine", "onecycle"] = setting(
        "onecycle",
        "step: ÷10 at 80 % of the epochs; cosine: to 0; onecycle: up for 30 %, then to 0.",
        OPTIMISER,
    )
    weight_decay: float = setting(0.0, "L2 penalty (adamw: decoupled).", OPTIMISER, ge=0, le=1)
    width: float = setting(1.0, "Channels of the network that is trained, times this.", METHOD, gt=0, le=100)
    dropout: float = setting(
        0.5, "Dropout of the network that is trained, where it has any.", OPTIMISER, ge=0, lt=1
    )

    seed: int = setting(0, "Initial weights, order, views and noise all follow from it.", RUN, ge=0, lt=2**63)
    view_seed: int | None = setting(
        None,
        "Seed of the views alone, so that runs of several seeds share what is kept of the teacher; "
        "by default that of the run.",
        RUN,
        ge=0,
        lt=2**63,
    )
    precision: Literal["auto", "32", "bf16"] = setting("auto", "auto measures which is faster here.", RUN)
    compile: bool = setting(False, "Compile the student's step (torch.compile).", RUN)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "What to train on; auto: a GPU if there is one.", RUN
    )
    devices: int = setting(
        1,
        "GPUs, or on a CPU processes, that share each batch. Under torchrun it decides.",
        RUN,
        ge=1,
        le=1024,
    )
    threads: Threads = 0
    name: FolderName = setting("", "Name of the run; by default method, student and a number.", RUN)
    runs_dir: Path = setting(Path("runs"), "Runs are written here.", RUN)
    save_every: str = setting(
        "1",
        "How often last.pt is written: N epochs, or as in 500steps or 10min; 0: only at the end.",
        RUN,
        metavar="N|Nsteps|Nmin",
    )
    keep: int = setting(2, "Saved states to keep: last.pt and those before it.", RUN, ge=1, le=10_000)
    log_every: int = setting(50, "Steps between lines of metrics.jsonl; 0: a line an epoch only.", RUN, ge=0)
    tensorboard: bool = setting(
        False, "Also write metrics for TensorBoard (pip install 'kdcli[tensorboard]').", RUN
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
