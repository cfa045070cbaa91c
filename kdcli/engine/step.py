"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.runtime import World, plain_step
from kdcli.engine.feed import Inputs
from kdcli.engine.output import Output
from kdcli.methods import Batch, Features, Objective, TrainConfig
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor
from kdcli.models.reproducible import DropoutKeys


class Step:
    """Forward, loss, backward and update, the same for one process and many."""

    def __init__(
        self,
        config: TrainConfig,
        method: Objective,
        student: Classifier,
        adapters: Mapping[str, nn.Module],
        stages: Sequence[str],
        optimizer: torch.optim.Optimizer,
        output: Output | None,
        draw: DropoutKeys,
        world: World,
    ) -> None:
        self.config = config
        self.method = method
        self.student = student
        self.adapters = adapters
        self.learning = [value for module in adapters.values() for value in module.parameters()]
        self.stages = stages
        self.optimizer = optimizer
        self.output = output
        self.draw = draw
        self.world = world
        network: nn.Module = FeatureExtractor(student.network, stages) if stages else student.network
        if config.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        self.network: Callable[[Tensor], Any] = world.replicate(network)
        self.update = plain_step(optimizer)
        self.compiled = not config.compile  # whether what may fail in the compiler is behind us

    def __call__(
        self,
        inputs: Inputs,
        epoch: int,
        rate: float,
        done: float,
        told: tuple[Tensor | None, Features | None],
    ) -> Tensor:
        """Update the student.

        Args:
            epoch: number of the pass, from 0.
            rate: the step's learning rate.
            done: share of the training that is done.
            told: the teacher's logits, (B, C), and features.

        Returns:
            (1 + terms,): the loss, and each unweighted term, times the number of images it stands for, in the order
            of the weights. Nothing waits for the device.
        """
        if self.compiled:
            return self._step(inputs, epoch, rate, done, told)
        try:
            result = self._step(inputs, epoch, rate, done, told)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise KdError(
                f"--compile: torch cannot compile {self.config.student} here: {reason}",
                "It needs a C++ compiler; leave --compile out.",
            ) from error
        self.compiled = True
        return result

    def _step(
        self,
        inputs: Inputs,
        epoch: int,
        rate: float,
        done: float,
        told: tuple[Tensor | None, Features | None],
    ) -> Tensor:
        config, world = self.config, self.world
        self.draw.step(epoch, inputs.samples, world.device)
        prepared = self.student.prepare(inputs.images)  # in float32, as in evaluation and in the export
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            found = self.network(prepared)
        features = None
        if self.stages:
            found, maps, embedding = found
            features = Features(tuple(stage.float() for stage in maps), embedding.float())
        logits = found.float() if self.output is None else self.output(found.float())
        terms = self.method.compute(
            Batch(
                student_logits=logits,
                teacher_logits=told[0],
                labels=inputs.labels,
                samples=inputs.samples,
                epoch=epoch,
                seed=config.seed,
                other_labels=inputs.other_labels,
                shares=inputs.shares,
                student_features=features,
                teacher_features=told[1],
                done=done,
                gather=lambda values: world.gather(values, inputs.count),
            ),
            self.adapters,
        )
        weights = self.method.weights(done)
        total = sum((weights[name] * terms[name] for name in terms), logits.new_zeros(()))
        if world.size > 1:
            total = total + 0 * logits.sum()  # the processes wait for a gradient of each weight
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        world.backward(total if world.size == 1 else total * inputs.weight)
        for value in self.learning if world.size > 1 else ():
            if value.grad is not None:
                value.grad = world.mean(value.grad)
        self.update()
        values = [total, *terms.values()]
        return torch.stack([value.detach() for value in values]) * (inputs.weight * inputs.count)
