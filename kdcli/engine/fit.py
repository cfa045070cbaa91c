"""Training of one student, and chains of trainings: over assistants, each the teacher of the next network, and over
generations of one student.
"""

import itertools
import shlex
from contextlib import ExitStack

from kdcli import methods
from kdcli.base import runtime
from kdcli.base.config import TeacherInputSettings
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Note, OnEvent, Progress, ignore, titled
from kdcli.base.runtime import StopFlag, World
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.engine import identity
from kdcli.engine.plan import make_plan
from kdcli.engine.records import RunResult, read_result
from kdcli.engine.run_dir import RunDir, name_of, resume_command
from kdcli.engine.student import check_student
from kdcli.engine.trainer import Trainer
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint

_SEEDS = 2**63


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


def links(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """Settings of each training in order: assistants, then generations; a single training without either.

    Each is an ordinary run. The teacher of each but the first is the student of the one before, so weights of
    teachers, --teacher-dropout and the form of a teacher's input apply to the first alone; `student_stages` are
    layers of the student, both where it learns and where it teaches.
    Generation k has the seed + k - 1 (Furlanello et al. 2018 start each from its own weights).
    """
    alone = config.model_copy(update={"assistant": (), "generations": 1})
    if not methods.objective(config).needs_teacher:
        return (alone,)
    count = config.generations
    trainings = [(network, f"-assistant-{number}", 0) for number, network in enumerate(config.assistant, 1)]
    trainings += [(config.student, f"-generation-{number}", number - 1) for number in range(1, count)]
    trainings += [(config.student, "", count - 1)]
    made: list[TrainConfig] = []
    for student, suffix, seed_offset in trainings:
        changes: dict[str, object] = {
            "student": student,
            "seed": (config.seed + seed_offset) % _SEEDS,
            "student_stages": config.student_stages if student == config.student else "",
            "student_weights": config.student_weights if student == config.student else None,
        }
        if suffix:
            changes["name"] = config.name + suffix
        if made:
            changes |= {
                "teacher": (RunDir.of(made[-1]).student,),
                "teacher_weight": (),
                "teacher_dropout": 0.0,
                **dict.fromkeys(TeacherInputSettings.model_fields),
                "teacher_stages": made[-1].student_stages,
            }
        made.append(alone.model_copy(update=changes))
    return tuple(made)


def resume_config(run: RunDir) -> TrainConfig:
    """Settings to resume a run with: those of its chain if it is still a link of one, by its name, else its own."""
    own, chain = run.read_config(), run.read_chain()
    # a method may be code, and the caller has checked the run's own
    if chain is None or chain.method != own.method:
        return own
    return chain if run.path.name in [link.name for link in links(chain)] else own


def fit_chain(
    config: TrainConfig,
    data: Splits,
    *,
    resume: RunDir | None = None,
    world: World | None = None,
    on_event: OnEvent = ignore,
) -> tuple[RunResult, ...]:
    """Train one student, or a chain of them, each from the one before; results in order.

    Existing links with the same settings are reused if finished and continued if not, so repeating the call
    continues an interrupted chain. All mistakes in settings are found before the first training. Errors are those of
    `fit`; the hint of an `Interrupted` continues the whole chain.

    Args:
        resume: an interrupted run to continue; `config` is then its `resume_config`.
    """
    chain = links(config)
    world = world or single_process(config)
    notify = on_event if world.first else ignore
    # 1. A single run
    if len(chain) == 1:
        teaches = any(part.needs_teacher for part in methods.parse(config.method))
        if teaches and (config.assistant or config.generations > 1):
            notify(Note("all weights of the teacher's terms are 0: --assistant and --generations do nothing"))
        return (fit(chain[0], data, resume=resume, world=world, on_event=on_event),)
    with runtime.stop_on_signals() as stop, world.report_lost_process():
        # 2. Check all links before the first training
        for link in chain:
            check_student(link, data.train)
        config, done = world.from_first(lambda: _finished_links(config, data))
        chain = links(config)
        notify(Note(f"chain {config.name}: {' → '.join(link.student for link in chain)}"))
        # 3. Train the links that are not finished
        results: list[RunResult] = []
        for number, link in enumerate(chain):
            run = RunDir.of(link)
            _check_signal(chain, stop, world)
            if number < done:
                notify(Note(f"{run.path.as_posix()} exists and is finished: it is not trained again"))
                results.append(read_result(run.result_file))
                continue
            begun = world.from_first(run.config_file.is_file)
            settings, begun_run = (run.read_config(), run) if begun else (link, None)
            title = f"{number + 1}/{len(chain)} {link.student}"
            shown = titled(title, on_event)
            try:
                result = fit(settings, data, resume=begun_run, world=world, on_event=shown, chain=config)
            except Interrupted as stopped:
                raise _interrupted(chain, f"{title}: {stopped.message}", stopped) from stopped
            results.append(result)
        return tuple(results)


def _finished_links(config: TrainConfig, data: Splits) -> tuple[TrainConfig, int]:
    """The settings with a name, and the number of finished links; only the link after these may be begun."""
    if not config.name:
        for number in itertools.count(1):
            named = config.model_copy(update={"name": name_of(config, number)})
            if not any(RunDir.of(link).path.exists() for link in links(named)):
                return named, 0
    chain = links(config)
    begun = [_is_begun(link, config) for link in chain]
    finished = [
        exists and RunDir.of(link).result_file.is_file() for link, exists in zip(chain, begun, strict=True)
    ]
    done = [*finished, False].index(False)
    for link, exists in zip(chain[done + 1 :], begun[done + 1 :], strict=True):
        if exists:
            raise UsageError(
                f"run {link.name} in {config.runs_dir} learned from {chain[done].name}, which is not finished there",
                f"Choose another --name, or remove {shlex.quote(RunDir.of(link).path.as_posix())}.",
            )
    for link in chain[:done]:
        recorded = identity.recorded_inputs(checkpoint.load(RunDir.of(link).student).provenance)
        # a teacher's file that is missing now is not needed any more: its student is trained
        current = identity.input_hashes(link, data, missing=recorded)
        identity.check_unchanged(recorded, current, RunDir.of(link).path.as_posix())
    return config, done


def _is_begun(link: TrainConfig, config: TrainConfig) -> bool:
    """Whether a link exists and belongs to this chain; its name must not be taken by another run or chain."""
    run = RunDir.of(link)
    chain = run.read_chain()
    if chain is None or chain.name != config.name:
        RunDir.check_free(link)
        return False
    if changed := identity.differences(*map(identity.decisive_settings, (chain, config))):
        raise UsageError(
            f"run {link.name} in {link.runs_dir} is of a chain with other settings: {changed[0]}",
            f"Choose another --name, or continue that chain: {resume_command(run.path, chain)}",
        )
    return True


def _check_signal(chain: tuple[TrainConfig, ...], stop: StopFlag, world: World) -> None:
    """Raise Interrupted for a signal that came at the end of a link, where `fit` does not stop."""
    [number] = world.all_max(stop.signal or 0)
    if number:
        stop.signal = number
        raise _interrupted(chain, "stopped between two trainings", Interrupted("", exit_code=stop.exit_code))


def _interrupted(chain: tuple[TrainConfig, ...], message: str, stopped: Interrupted) -> Interrupted:
    """The error, with a hint that continues the whole chain: resuming its last link."""
    begun = [RunDir.of(link).path for link in chain if RunDir.of(link).config_file.is_file()]
    hint = resume_command(begun[-1], chain[-1]) if begun else stopped.hint
    return Interrupted(message, hint or "Rerun the same command.", exit_code=stopped.exit_code)
