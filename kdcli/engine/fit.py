"""Training of one student."""

from contextlib import ExitStack

from kdcli.base import runtime
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.runtime import World
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.engine.plan import make_plan
from kdcli.engine.records import RunResult
from kdcli.engine.run_dir import RunDir, resume_command
from kdcli.engine.trainer import Trainer
from kdcli.methods import TrainConfig


def fit(
    config: TrainConfig,
    data: Splits,
    *,
    resume: RunDir | None = None,
    world: World | None = None,
    test: bool = True,
    on_event: OnEvent = ignore,
    chain: TrainConfig | None = None,
) -> RunResult:
    """Train a student as the settings say, and measure it once on the test data.

    An exception from `on_event` ends a run of one process; files written by then are complete.

    Args:
        resume: an interrupted run to continue; `config` is then that run's own.
        world: the processes that share the work, from `runtime.launch`; by default this one alone.
        test: False leaves the test images unread, for a search among runs: the result has no `evaluation`.
        chain: the settings of the whole chain that this is a link of, for its folder; see `fit_chain`.

    Raises:
        UsageError: another process trains the run.
        KdError: teacher and data do not fit, the loss stopped being finite, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM; the state is in `last.pt`.
    """
    world = world or single_process(config)
    on_event = on_event if world.first else ignore
    with runtime.stop_on_signals() as stop, world.report_lost_process(), ExitStack() as stack:
        if resume is not None and world.first:
            stack.enter_context(resume.held())
        on_event(Progress("preparing", 0, 0))
        runtime.set_threads(config.threads, world.local_size)
        runtime.keep_freed_memory()
        trainer = Trainer(make_plan(config, data, world, test=test, chain=chain), resume, on_event, stop)
        if resume is None and world.first:
            stack.enter_context(trainer.run.held())
        try:
            return trainer.train()
        except OSError as error:
            path = trainer.run.path
            raise KdError(
                f"cannot write to {path}: {reason(error)}",
                f"Free some space, then: {resume_command(path, config)}",
            ) from error
        finally:
            trainer.recorder.close()


def single_process(config: TrainConfig) -> World:
    """The world of this process alone; a UsageError if the settings name several devices."""
    if config.devices > 1:
        raise UsageError(
            f"--devices {config.devices}: without a `world` training runs in one process",
            "Start the others with runtime.launch, or use kd train.",
        )
    return World.alone(config.accelerator)
