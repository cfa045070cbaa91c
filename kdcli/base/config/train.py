"""Settings of `kd train`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdcli.base.config.settings import (
    DATA,
    METHOD,
    OF_METHODS,
    OPTIMISER,
    RUN,
    DataSettings,
    FolderName,
    Resize,
    Seed,
    Share,
    TeacherInputSettings,
    TeacherPath,
    Threads,
    rare,
    setting,
)
from kdcli.base.text import printable

Temperature = Annotated[float | None, Field(gt=0, le=1000)]
AUGMENT_STEPS = (
    "flip", "crop", "resized-crop", "randaugment", "jitter", "cutout", "mixup", "cutmix",
)  # fmt: skip
_SAVE_EVERY = re.compile(r"(\d{1,9}) ?(epochs?|steps?|min|)")


def augment_steps(name: str) -> list[str]:
    """`flip-resized-crop` → [flip, resized-crop]."""
    return re.findall("resized-crop|[^-]+", name)


@dataclass(frozen=True)
class Ramp:
    """Linear from `first` to `last` over a share of the training, 0 < `over` ≤ 1; then constant."""

    first: float
    last: float
    over: float = 1.0

    def to(self, weight: float) -> Self:
        """The same ramp to another value; a rise from 0 stays one."""
        return type(self)(0.0 if self.first == 0 < self.last else weight, weight, self.over)

    def at(self, done: float) -> float:
        """The value when a share of the training is done, 0 … 1."""
        return self.first + (self.last - self.first) * min(1.0, done / self.over)


def read_weight(text: str, epochs: int) -> tuple[str, Ramp]:
    """Name and weight of a term from `at=1000`, `at=0:1000` or `at=0:1000:20`, the last over 20 epochs."""
    name, _, value = text.partition("=")
    try:
        numbers = [float(word) for word in value.split(":")]
    except ValueError:
        numbers = []
    if not name.strip() or not 1 <= len(numbers) <= 3:
        raise ValueError("must be NAME=WEIGHT, NAME=FIRST:LAST or NAME=FIRST:LAST:EPOCHS")
    first, last = numbers[0], numbers[:2][-1]
    over = numbers[2] if len(numbers) == 3 else epochs
    if not all(math.isfinite(number) and number >= 0 for number in (first, last)):
        raise ValueError("must have weights of 0 or more")
    if not 0 < over <= epochs:
        raise ValueError(f"must have 1 to {epochs} epochs")
    return name.strip(), Ramp(first, last, over / epochs)


class TrainSettings(DataSettings, TeacherInputSettings):
    """`kd train`."""

    method: str = setting(
        "kd", "Method, or a custom one, package.module:function.", METHOD, metavar="NAME[+NAME…]"
    )
    student: str = setting(
        "lenet",
        "Network: lenet, nin, resnet20, wrn-16-2, mobilenetv2-half, torchvision:NAME, timm:NAME, … (all: "
        "docs/networks.md); or a checkpoint (.pt) to start from.",
        METHOD,
        metavar="NETWORK",
    )
    student_weights: Path | None = rare(
        None,
        "Initial weights of the student: a state_dict (.pt, .pth, .safetensors).",
        METHOD,
        metavar="FILE",
    )
    teacher: tuple[Path, ...] = setting(
        (TeacherPath,),
        "Teacher: .pt or ONNX file, torchvision:NAME, timm:NAME, pack of logits, … (docs/teachers.md); repeat to "
        "average several; if the default is absent, the only one in weights/ and runs/.",
        METHOD,
        metavar="FILE",
    )
    teacher_weights: tuple[Path, ...] = rare(
        (),
        "Weights of a torchvision, timm or custom teacher: a state_dict; by default published ones.",
        METHOD,
        metavar="FILE",
    )
    teacher_args: tuple[str, ...] = rare(
        (), "Arguments of a teacher's package.module:function. Repeatable.", METHOD, metavar="KEY=VALUE"
    )
    teacher_weight: tuple[float, ...] = rare(
        (), "Weight of each teacher in the mean logits; by default equal.", METHOD, metavar="WEIGHT"
    )
    assistant: tuple[str, ...] = rare(
        (),
        "Network trained between teacher and student, as run NAME-assistant-1; repeat for a chain.",
        METHOD,
        metavar="NETWORK",
    )
    generations: int = rare(
        1, "Number of generations, each taught by the previous one.", METHOD, ge=1, le=100
    )
    tau: Temperature = setting(
        None, "Temperature; by default the method's: kd 3, dkd and dist 4, lskd 2, born-again 1.", OF_METHODS
    )
    tau_end: Temperature = rare(
        None, "Temperature at the end, reached linearly; by default constant.", OF_METHODS
    )
    standardize: bool = rare(
        False, "kd, dkd, born-again: standardize the logits of each image (Sun et al. 2024).", OF_METHODS
    )
    student_stages: str = rare(
        "", "Student layers of the matched maps; by default its stages.", OF_METHODS, metavar="LAYER,LAYER…"
    )
    teacher_stages: str = rare(
        "", "Teacher layers of the matched maps; see kd info.", OF_METHODS, metavar="LAYER,LAYER…"
    )
    weight: tuple[str, ...] = rare(
        (),
        "Weight of a loss term, named by its method or ce; FIRST:LAST changes linearly. Repeatable.",
        METHOD,
        metavar="NAME=W|NAME=FIRST:LAST[:EPOCHS]",
    )
    ce_weight: float | None = rare(
        None, "Weight of cross-entropy on the labels; by default the method's own.", METHOD, ge=0
    )
    kd_weight: float | None = rare(
        None, "Weight of the distillation term; by default the method's own.", METHOD, ge=0
    )
    teacher_dropout: Share = rare(
        0.0, "Dropout rate of the teacher; above 0 its logits are computed in each step.", METHOD
    )
    teacher_cache: Literal["views", "fixed", "off"] = rare(
        "views",
        "Teacher logits; views: cached for each view; fixed: cached without augmentation, while the student sees "
        "new views; off: computed in each step.",
        METHOD,
    )
    cache_top_k: int = rare(
        0, "Cache only the K largest logits of each image; 0: all.", METHOD, ge=0, le=65535
    )
    teacher_precision: Literal["auto", "32", "bf16"] = rare(
        "auto",
        "Precision of cached teacher logits; auto: the fastest that agrees with float32 on 99.9 % of images.",
        METHOD,
    )

    resize: Resize = None
    grey: bool = rare(False, "Convert colour images to grey, one channel.", DATA)
    augment: str = setting(
        "none",
        "Transforms, joined by -: flip, crop, cutout, mixup, cutmix; for photos resized-crop, randaugment, jitter.",
        DATA,
        metavar="none|flip-crop|…",
    )
    unlabelled: Path | None = rare(
        None,
        "Additional training images without labels, for methods that read none, such as logits, or kd with "
        "--lamda 0.",
        DATA,
        metavar="FOLDER|ARCHIVE",
    )
    views: int = rare(
        0, "Views (augmented copies) per image, cycled over epochs; 0: automatic.", DATA, ge=0, le=100_000
    )
    preprocess: Literal["mean-std", "mean-image", "gcn-zca", "none"] = rare(
        "mean-std", "Preprocessing of the student's input.", DATA
    )
    student_size: int | None = rare(
        None,
        "Size to which the student resizes images of --image-size in its preprocessing; by default equal.",
        DATA,
        ge=1,
        le=1024,
    )
    val_fraction: Share = setting(
        0.05, "Fraction of training images for validation, at least one of each class; 0: none.", DATA
    )

    epochs: int = setting(100, "Passes over the training data.", OPTIMISER, ge=1, le=1_000_000)
    batch_size: Annotated[int, Field(ge=0, le=1_000_000)] = setting(
        0, "Images per step; 0: a power of two from 4 to 256 with 20 or more steps an epoch.", OPTIMISER
    )
    lr: float = setting(1e-3, "Maximum learning rate.", OPTIMISER, gt=0, le=100)
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "sgd: Nesterov momentum 0.9.", OPTIMISER)
    schedule: Literal["step", "cosine", "onecycle"] = setting(
        "onecycle", "step: ÷10 at 80 % of epochs; cosine: to 0; onecycle: 30 % warm-up, then to 0.", OPTIMISER
    )
    weight_decay: float = rare(0.0, "L2 penalty (adamw: decoupled).", OPTIMISER, ge=0, le=1)
    ema: Share = rare(0.0, "Decay of the moving average (EMA) of the weights; 0: none.", OPTIMISER)
    width: float = setting(1.0, "Width multiplier of the student's channels.", METHOD, gt=0, le=64)
    dropout: Share = rare(0.5, "Dropout rate of the student's dropout layers.", OPTIMISER)

    seed: Seed = setting(0, "Seed of initial weights, order, views and noise.", RUN)
    view_seed: Annotated[int | None, Field(ge=0, lt=2**63)] = rare(
        None, "Seed of the views alone, so that runs share cached logits; by default --seed.", RUN
    )
    precision: Literal["auto", "32", "bf16"] = rare("auto", "auto: bf16 where clearly faster, measured.", RUN)
    compile: bool = rare(False, "Compile the student's step (torch.compile).", RUN)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: a GPU if available.", RUN)
    devices: int = rare(
        1, "GPUs, or processes on a CPU, that share each batch; torchrun overrides it.", RUN, ge=1, le=1024
    )
    threads: Threads = 0
    name: FolderName = setting("", "Name of the run; by default method, student and a number.", RUN)
    runs_dir: Path = rare(Path("runs"), "Folder of the runs.", RUN)
    save_every: str = rare(
        "1",
        "Interval between saved states (last.pt): epochs, 500steps or 10min; 0: only at the end.",
        RUN,
        metavar="N|Nsteps|Nmin",
    )
    keep: int = rare(2, "Number of saved states to keep.", RUN, ge=1, le=10_000)
    log_every: int = rare(50, "Steps between lines of metrics.jsonl; 0: one line per epoch.", RUN, ge=0)
    tensorboard: bool = rare(False, "Write metrics for TensorBoard (pip install 'kdcli[tensorboard]').", RUN)

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
                raise ValueError("--teacher-weight: must be 0 or more, with a sum above 0")
        file = next((name for name in self.assistant if name.lower().endswith(".pt")), None)
        if file is not None:
            raise ValueError(f"--assistant {file}: an assistant is trained anew; name a network")
        if self.student_size and self.preprocess != "mean-std":
            raise ValueError("--student-size requires --preprocess mean-std")
        _ = self.weights
        return self

    @property
    def weights(self) -> dict[str, Ramp]:
        found: dict[str, Ramp] = {}
        for text in self.weight:
            try:
                name, ramp = read_weight(text, self.epochs)
            except ValueError as error:
                raise ValueError(f"--weight {text}: {error}") from error
            if name in found:
                raise ValueError(f"--weight {name}: given twice")
            found[name] = ramp
        return found

    @field_validator("augment")
    @classmethod
    def _augment_of_known_steps(cls, value: str) -> str:
        if value == "none":
            return value
        steps = augment_steps(value)
        ordered = [step for step in AUGMENT_STEPS if step in steps]
        once = len(steps) == len(ordered) > 0 and not {"mixup", "cutmix"} <= set(steps)
        if "-".join(steps) != value or not once:
            known = f"{', '.join(AUGMENT_STEPS[:-1])} or {AUGMENT_STEPS[-1]}"
            raise ValueError(f"must be none, or some of {known}, each once, joined by hyphens")
        return "-".join(ordered)

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
        return self.seed if self.view_seed is None else self.view_seed

    @property
    def saving(self) -> tuple[int, str]:
        """How often the state is saved: a number, and `epochs`, `steps` or `min`; number 0: only at the end."""
        found = _SAVE_EVERY.fullmatch(self.save_every)
        assert found is not None
        return int(found[1]), found[2] or "epochs"

    @property
    def student_file(self) -> Path | None:
        """The checkpoint whose weights the student starts from; None for a network's name."""
        return Path(self.student) if self.student.lower().endswith(".pt") else None

    @property
    def method_name(self) -> str:
        """The method's part of the run's name; of a custom function, its name without the module."""
        return "+".join(part.rpartition(":")[2] for part in self.method.split("+"))

    @property
    def student_name(self) -> str:
        """The network's name, or that of its file; for a run's student.pt that of the run."""
        path = self.student_file
        if path is None:
            return self.student.rpartition(":")[2]
        own = path.resolve()
        name = printable(own.parent.name if own.stem == "student" else own.stem)
        return re.sub(r'[\\:*?"<>|\n]', "_", name) or "student"
