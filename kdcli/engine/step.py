"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdcli.config import TrainConfig
from kdcli.engine.feed import Inputs
from kdcli.engine.output import Output
from kdcli.errors import KdError
from kdcli.methods import Batch, Method
from kdcli.models import Classifier
from kdcli.models.reproducible import Draw
from kdcli.runtime import World, plain_step


class Step:
    """Forward, loss, backward and update, the same for one process and many."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        student: Classifier,
        optimizer: torch.optim.Optimizer,
        output: Output | None,
        draw: Draw,
        world: World,
    ) -> None:
        self.config = config
        self.method = method
        self.weights = method.weights(config)
        self.student = student
        self.optimizer = optimizer
        self.output = output
        self.draw = draw
        self.world = world
        network = torch.compile(student.network) if config.compile else student.network
        self.network: Callable[[Tensor], Tensor] = world.replicate(network)  # type: ignore[arg-type]
        self.update = plain_step(optimizer)
        self.compiled = not config.compile  # whether what may fail in the compiler is behind us

    def __call__(self, inputs: Inputs, epoch: int, rate: float, targets: Tensor | None) -> Tensor:
        """Update the student.

        Args:
            epoch: number of the pass, from 0.
            rate: the step's learning rate.
            targets: the teacher's logits, (B, C).

        Returns:
            (terms,): each unweighted term times the number of images it stands for, in the order of the weights.
            Nothing waits for the device.
        """
        if self.compiled:
            return self._step(inputs, epoch, rate, targets)
        try:
            result = self._step(inputs, epoch, rate, targets)
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

    def _step(self, inputs: Inputs, epoch: int, rate: float, targets: Tensor | None) -> Tensor:
        config, world = self.config, self.world
        self.draw.step(epoch, inputs.samples, world.device)
        prepared = self.student.prepare(inputs.images)  # in float32, as in evaluation and in the export
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.network(prepared)
        logits = logits.float() if self.output is None else self.output(logits.float())
        terms = self.method.terms(
            Batch(
                student_logits=logits,
                teacher_logits=targets,
                labels=inputs.labels,
                samples=inputs.samples,
                epoch=epoch,
                config=config,
                other_labels=inputs.other_labels,
                shares=inputs.shares,
            )
        )
        total = sum((self.weights[name] * terms[name] for name in self.weights), logits.new_zeros(()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        world.backward(total if world.size == 1 else total * inputs.weight)
        self.update()
        return torch.stack([terms[name].detach() for name in self.weights]) * (inputs.weight * inputs.count)
