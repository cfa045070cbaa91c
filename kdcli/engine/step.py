"""Optimizers, learning rates and one optimizer step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.engine.feed import Minibatch
from kdcli.engine.plan import RunPlan
from kdcli.engine.student import OutputScale
from kdcli.methods import Batch, Features, TrainConfig
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor
from kdcli.models.reproducible import DropoutKeys

_WARM_UP, _START, _END = 0.3, 1 / 25, 1e-4  # of onecycle: share of steps, first and last rate over the peak


def learning_rate(schedule: str, peak: float, step: int, steps: int) -> float:
    """Learning rate of one step of 0 … steps − 1: a pure function of its number, so it has no state to save.

    step: ÷10 at 80 % (the reference's recipe). cosine: half a cosine from the peak to 0 (Loshchilov & Hutter 2017).
    onecycle: cosine from peak/25 up to the peak over 30 %, then cosine to peak·1e-4 (Smith & Topin 2018).
    """
    share = step / max(1, steps - 1)
    if schedule == "step":
        return peak * (0.1 if step >= 0.8 * steps else 1.0)
    if schedule == "cosine":
        return peak * _cosine(1.0, 0.0, step / steps)
    if share < _WARM_UP:
        return peak * _cosine(_START, 1.0, share / _WARM_UP)
    return peak * _cosine(1.0, _END, (share - _WARM_UP) / (1 - _WARM_UP))


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(config: TrainConfig, *modules: nn.Module) -> torch.optim.Optimizer:
    """The optimizer named in the settings; fused, which is one pass over the weights instead of many.

    With sgd, a network's `lr_factors` multiply the rate of some parameters; decay per step is the same for all.
    """
    if config.optimizer != "sgd":
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        parameters = [value for module in modules for value in module.parameters() if value.requires_grad]
        return kind(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
    groups: dict[float, list[nn.Parameter]] = {}
    for module in modules:
        factors: Mapping[str, float] = getattr(module, "lr_factors", {})
        for name, value in module.named_parameters():
            factor = next((factors[end] for end in factors if name.endswith(end)), 1.0)
            if value.requires_grad:
                groups.setdefault(factor, []).append(value)
    return torch.optim.SGD(
        [
            {"params": values, "factor": factor, "weight_decay": config.weight_decay / factor}
            for factor, values in groups.items()
        ],
        config.lr,
        momentum=0.9,
        nesterov=True,
        fused=True,
    )


class Ema:
    """Exponential moving average of a network's weights and batch-norm statistics, in `values`; decay 0: of none.

    After step t (from 0) the average moves by 1 − min(decay, (1 + t)/(10 + t)) towards the weights: the first steps
    have less weight, as in TensorFlow's ExponentialMovingAverage. On several processes each computes the same.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        weights = network.state_dict(keep_vars=True) if decay else {}
        once = {id(value): (name, value.detach()) for name, value in weights.items()}.values()  # tied ones
        self.weights = {name: value for name, value in once if value.is_floating_point()}
        self.values = {name: value.clone() for name, value in self.weights.items()}

    def update(self, step: int) -> None:
        """Include the weights after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            torch._foreach_lerp_(list(self.values.values()), list(self.weights.values()), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.values.items():
            value.copy_(values[name])

    def swap(self) -> None:
        """Exchange the average and the network's weights."""
        with torch.no_grad():
            for name, value in self.weights.items():
                kept = value.clone()
                value.copy_(self.values[name])
                self.values[name].copy_(kept)


@dataclass
class Step:
    """Forward, loss, backward and update, the same for one process and many."""

    plan: RunPlan
    student: Classifier
    adapters: Mapping[str, nn.Module]
    stages: Sequence[str]
    optimizer: torch.optim.Optimizer
    scale: OutputScale | None
    keys: DropoutKeys

    def __post_init__(self) -> None:
        self.config, self.objective, self.world = self.plan.config, self.plan.objective, self.plan.world
        self.learning = [value for module in self.adapters.values() for value in module.parameters()]
        network: nn.Module = self.student.network
        network = FeatureExtractor(network, self.stages) if self.stages else network
        if self.config.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        self.network: Callable[[Tensor], Any] = self.world.replicate(network)

    def __call__(
        self,
        batch: Minibatch,
        epoch: int,
        rate: float,
        done: float,
        teacher: tuple[Tensor | None, Features | None],
    ) -> Tensor:
        """Update the student in epoch `epoch` (from 0) at this learning rate, after the share `done` of the training.

        Returns (1 + terms,): the loss and each unweighted term times the number of images it stands for, in the order
        of the weights. On the device, without synchronising.
        """
        config, world = self.config, self.world
        self.keys.step(epoch, batch.samples, world.device)
        prepared = self.student.prepare(batch.images)  # in float32, as in evaluation and in the export
        bf16 = config.precision == "bf16"
        with self._compiler_errors(), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            outputs = self.network(prepared)
        features = None
        if self.stages:
            outputs, maps, embedding = outputs
            features = Features(tuple(stage.float() for stage in maps), embedding.float())
        logits = outputs.float() if self.scale is None else self.scale(outputs.float())
        terms = self.objective.compute(
            Batch(
                student_logits=logits,
                teacher_logits=teacher[0],
                labels=batch.labels,
                samples=batch.samples,
                epoch=epoch,
                seed=config.seed,
                other_labels=batch.other_labels,
                shares=batch.shares,
                student_features=features,
                teacher_features=teacher[1],
                done=done,
                gather=lambda values: world.gather(values, batch.count),
            ),
            self.adapters,
        )
        weights = self.objective.weights(done)
        total = sum((weights[name] * terms[name] for name in terms), logits.new_zeros(()))
        if world.size > 1:
            total = total + 0 * logits.sum()  # the processes wait for a gradient of each weight
        self._update(total if world.size == 1 else total * batch.weight, rate)
        values = [total, *terms.values()]
        return torch.stack([value.detach() for value in values]) * (batch.weight * batch.count)

    def _update(self, loss: Tensor, rate: float) -> None:
        """Backward pass and optimizer step; gradients of auxiliary modules are averaged over the processes."""
        world = self.world
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        with self._compiler_errors():
            world.backward(loss)
        for value in self.learning if world.size > 1 else ():
            if value.grad is not None:
                value.grad = world.mean(value.grad)
        self.optimizer.step()

    @contextmanager
    def _compiler_errors(self) -> Iterator[None]:
        """Translate an error of torch.compile, which compiles in the first step, to a KdError."""
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise KdError(
                f"--compile: torch cannot compile {self.config.student} here: {first_line(error)}",
                "It needs a C++ compiler; leave --compile out.",
            ) from error
