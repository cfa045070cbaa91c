"""torchdistill on the same pair: its loaders, its `DistillationBox`, its `KDLoss`.

Its loss is alpha·CE + (1 − alpha)·temperature²·KL, so its alpha is kd's lamda. What is measured is what its own
examples do in an epoch, less their meters and log lines, which only makes it faster.

Up to 1.1.4 it could keep the teacher's outputs, one file an image; 1.1.5 has taken that out. d3 hands them over
through what it offers for extensions: a registered dataset wrapper puts them into the batch, a registered forward
function takes them out. They need views that do not change, hence no random flip.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from typing import Any

import torch
from pair import BATCH, LAMDA, LEARNING_RATE, TAU, Int64, Pair
from rounds import Timing
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

LABELS = {
    "d1": ("torchdistill", "teacher in the loop"),
    "d3": ("torchdistill, teacher outputs handed to it", "no flip; not its feature, see the docstring"),
}
_WRAPPER, _FORWARD = "GivenTeacherOutputs", "given_teacher_outputs"


def reason_against(key: str) -> str | None:
    """Why a side cannot run here, in a line; None if it can."""
    if importlib.util.find_spec("torchdistill") is None:
        return f"{key} left out, torchdistill is missing: pip install 'kdcli[bench]'"
    return None


class TorchdistillLoop:
    """One epoch in a `DistillationBox`."""

    keeps_memory = False

    def __init__(self, key: str, pair: Pair, rows: Int64, workers: int) -> None:
        self.key = key
        self.label, self.note = LABELS[key]
        self.pair = pair
        loader: dict[str, Any] = {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0},
        }
        dataset = pair.dataset(rows, flip=key == "d1")
        forward = "forward_batch_only"
        if key == "d3":
            _register()
            outputs = _outputs_of(pair, dataset)
            loader["dataset_wrapper"] = {"key": _WRAPPER, "kwargs": {"outputs": outputs}}
            forward = _FORWARD
        self.box: Any = importlib.import_module("torchdistill.core.distillation").get_distillation_box(
            teacher_model=pair.teacher,
            student_model=pair.student(),
            dataset_dict={"train": dataset},
            train_config=_settings(loader, forward),
            device=torch.device("cpu"),
            device_ids=None,
            distributed=False,
            lr_factor=1,
        )

    def loss_of(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The box's own loss of a batch as the loader gives it."""
        supplement = {"teacher_outputs": self.pair.teacher(pixels)} if self.key == "d3" else {}
        loss: Tensor = self.box.forward_process(pixels, labels, supplement)
        return loss

    def warm_up(self) -> None:
        """One epoch."""
        self.round()

    def round(self) -> Timing:
        images = 0
        started = time.perf_counter()
        self.box.pre_epoch_process(epoch=0)
        for pixels, labels, supplement in self.box.train_data_loader:
            loss = self.box.forward_process(pixels, labels, supplement)
            self.box.post_forward_process(loss=loss)
            if not loss.isfinite().item():
                raise RuntimeError("torchdistill's loss is not finite")
            images += len(labels)
        self.box.post_epoch_process()
        return Timing(images, time.perf_counter() - started)


def _settings(loader: dict[str, Any], teacher_forward: str) -> dict[str, Any]:
    """A training configuration as its YAML files have it; '.' is the whole model."""
    loss = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": TAU,
        "alpha": LAMDA,
        "reduction": "batchmean",
    }
    return {
        "num_epochs": 1,
        "train_data_loader": loader,
        "teacher": {"forward_proc": teacher_forward, "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "Adam", "kwargs": {"lr": LEARNING_RATE}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}},
        },
    }


def _outputs_of(pair: Pair, dataset: torch.utils.data.Dataset[tuple[Tensor, int]]) -> Tensor:
    """The teacher's logits of every image of a data set, (N, classes)."""
    with torch.inference_mode():
        parts = [pair.teacher(pixels) for pixels, _ in DataLoader(dataset, BATCH)]
    return torch.cat(parts).clone()


def _register() -> None:
    """Register d3's two functions with torchdistill; idempotent."""
    datasets = importlib.import_module("torchdistill.datasets.registry")
    interfaces = importlib.import_module("torchdistill.core.interfaces.registry")
    base: Any = importlib.import_module("torchdistill.datasets.wrapper").BaseDatasetWrapper

    class GivenTeacherOutputs(base):  # type: ignore[misc]  # its base is known only where torchdistill is
        def __init__(self, org_dataset: Any, outputs: Tensor) -> None:
            super().__init__(org_dataset)
            self.outputs = outputs

        def __getitem__(self, index: int) -> Any:
            sample, target, supplement = super().__getitem__(index)
            return sample, target, {**supplement, "teacher_outputs": self.outputs[index]}

    def take(
        model: Any, sample_batch: Any, targets: Any = None, supp_dict: Any = None, **rest: Any
    ) -> Tensor:
        outputs: Tensor = supp_dict["teacher_outputs"]
        return outputs

    datasets.register_dataset_wrapper(GivenTeacherOutputs, key=_WRAPPER)
    interfaces.register_forward_proc_func(take, key=_FORWARD)
