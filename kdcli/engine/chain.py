"""Chains of trainings: over assistants, which each teach the next network, and over generations of one student."""

from __future__ import annotations

import shlex
from dataclasses import replace

from kdcli import methods
from kdcli.base import runtime
from kdcli.base.errors import Interrupted, UsageError
from kdcli.base.events import Event, Note, OnEvent, Progress, ignore
from kdcli.base.runtime import StopFlag, World
from kdcli.data import Splits
from kdcli.engine.fit import fit
from kdcli.engine.identity import check_unchanged, decisive_settings, input_hashes, recorded_inputs
from kdcli.engine.records import RunResult, read_result
from kdcli.engine.run_dir import RunDir, name_of, resume_command
from kdcli.engine.student import check_student
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint

_SEEDS = 2**63


def links(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """The settings of each training in turn: assistants, then generations; one alone where there are neither.

    Each is an ordinary run. The teacher of each but the first is the student of the one before, so that the weights
    of teachers and --teacher-dropout hold for the first alone; layers named in `student_stages` are the student's,
    learning or teaching.
    Generation k has the seed + k - 1 (Furlanello et al. 2018 begin each from weights of its own).
    """
    alone = config.model_copy(update={"assistant": (), "generations": 1})
    if not methods.objective(config).needs_teacher:
        return (alone,)
    count = config.generations
    wanted = [(network, f"-assistant-{number}", 0) for number, network in enumerate(config.assistant, 1)]
    wanted += [(config.student, f"-generation-{number}", number - 1) for number in range(1, count)]
    wanted += [(config.student, "", count - 1)]
    made: list[TrainConfig] = []
    for student, suffix, later in wanted:
        changes: dict[str, object] = {
            "student": student,
            "seed": (config.seed + later) % _SEEDS,
            "student_stages": config.student_stages if student == config.student else "",
        }
        if suffix:
            changes["name"] = config.name + suffix
        if made:
            changes |= {
                "teacher": (_run(made[-1]).student,),
                "teacher_weight": (),
                "teacher_dropout": 0.0,
                "teacher_stages": made[-1].student_stages,
            }
        made.append(alone.model_copy(update=changes))
    return tuple(made)


def continued(run: RunDir) -> TrainConfig:
    """What a resume of this run goes on with: the whole chain's settings if it is a link of one, else its own.

    A link that has been given another name since is a run like any other.
    """
    own, chain = run.read_config(), run.read_chain()
    if (
        chain is None or chain.method != own.method
    ):  # a method may be code: it is the one that has been checked
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
    """Train what the settings say: one student, or a chain of them, each from the one before.

    The links of a chain that are there already, begun with the same settings, are taken as they are where they are
    finished, and continued where not: to repeat the call is to go on.

    Args:
        resume: an interrupted run to continue; `config` is then what `continued` says of it.
        world: as of `fit`.

    Returns:
        What each training has to say, the last one's student being the one that was asked for.

    Raises:
        UsageError: a network is not known or the images are too small for it, or a link's name is taken by a run
            with other settings; all of that before anything is trained.
        KdError, Interrupted: as `fit`. The hint of the latter continues the whole chain.
    """
    chain = links(config)
    teaches = any(part.needs_teacher for part in methods.parse(config.method))
    if len(chain) == 1:
        if teaches and (config.assistant or config.generations > 1) and (world is None or world.first):
            on_event(Note("no term of a teacher weighs anything: --assistant and --generations do nothing"))
        return (fit(chain[0], data, resume=resume, world=world, on_event=on_event),)
    if world is None and config.devices == 1:
        world = World.alone(config.accelerator)
    if world is None:
        raise UsageError("fit_chain() runs in one process", "Start the others with runtime.launch.")
    tell = on_event if world.first else ignore
    with runtime.stop_on_signals() as stop, world.report_lost_process():
        for link in chain:
            check_student(link, data.train)
        config, done = world.broadcast(_standing(config, data) if world.first else None) or (config, 0)
        chain = links(config)
        tell(Note(f"chain {config.name}: {' → '.join(link.student for link in chain)}"))
        results: list[RunResult] = []
        for number, link in enumerate(chain):
            _go_on(chain, stop, world)
            if number < done:
                tell(Note(f"{_run(link).path.as_posix()} is there already: it is not trained again"))
                results.append(read_result(_run(link).result_file))
                continue
            begun = world.broadcast(_run(link).config_file.is_file() if world.first else None)
            title = f"{number + 1}/{len(chain)} {link.student}"
            try:
                results.append(
                    fit(
                        _run(link).read_config() if begun else link,
                        data,
                        resume=_run(link) if begun else None,
                        world=world,
                        on_event=_titled(title, on_event),
                        chain=config,
                    )
                )
            except Interrupted as stopped:
                raise _interrupted(chain, f"{title}: {stopped.message}", stopped) from stopped
        return tuple(results)


def _run(link: TrainConfig) -> RunDir:
    return RunDir(link.runs_dir / link.name)


def _standing(config: TrainConfig, data: Splits) -> tuple[TrainConfig, int]:
    """The settings with a name, and how many links are finished; at most the one after these is begun.

    Raises:
        UsageError: a name is taken, or links are there whose teachers are not.
        KdError: a finished link cannot be read.
    """
    if not config.name:
        number = 1
        while True:
            named = config.model_copy(update={"name": name_of(config, number)})
            if not any(_run(link).path.exists() for link in links(named)):
                return named, 0
            number += 1
    chain = links(config)
    there = [_is_there(link, config) for link in chain]
    finished = [here and _run(link).result_file.is_file() for here, link in zip(there, chain, strict=True)]
    done = finished.index(False) if False in finished else len(chain)
    orphan = next(
        (link for here, link in zip(there[done + 1 :], chain[done + 1 :], strict=True) if here), None
    )
    if orphan is not None:
        raise UsageError(
            f"run {orphan.name} in {config.runs_dir} learned from {chain[done].name}, which is not finished there",
            f"Choose another --name, or remove {shlex.quote(_run(orphan).path.as_posix())}.",
        )
    for link in chain[:done]:
        _check_finished(link, data)
    return config, done


def _is_there(link: TrainConfig, config: TrainConfig) -> bool:
    """Whether a link is finished or begun by this very chain.

    Raises:
        UsageError: what is there is something else.
    """
    run = _run(link)
    chain = run.read_chain()
    if chain is None or chain.name != config.name:
        RunDir.check_free(link)
        return False
    before, now = decisive_settings(chain), decisive_settings(config)
    for name, value in now.items():
        if before[name] != value:
            raise UsageError(
                f"run {link.name} in {link.runs_dir} is of a chain with other settings: "
                f"--{name.replace('_', '-')} was {_shown(before[name])}, is {_shown(value)}",
                "Choose another --name, or continue that chain: "
                f"kd train --resume {shlex.quote(run.path.as_posix())}",
            )
    return True


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _check_finished(link: TrainConfig, data: Splits) -> None:
    """Raise KdError if a finished link learned from other images, or from a teacher that has been replaced."""
    run = _run(link)
    recorded = recorded_inputs(checkpoint.load(run.student).provenance)
    # a teacher that is gone since is no matter: its student is there
    check_unchanged(recorded, input_hashes(link, data, missing=recorded), run.path.as_posix())


def _go_on(chain: tuple[TrainConfig, ...], stop: StopFlag, world: World) -> None:
    """Raise Interrupted if a signal came while a link was finished: `fit` does not stop for that."""
    [number] = world.all_max(stop.signal or 0)
    if number:
        stop.signal = number
        raise _interrupted(chain, "stopped between two trainings", Interrupted("", exit_code=stop.exit_code))


def _interrupted(chain: tuple[TrainConfig, ...], message: str, stopped: Interrupted) -> Interrupted:
    """With what continues the whole chain: a resume of the last link that is there."""
    begun = [_run(link).path for link in chain if _run(link).config_file.is_file()]
    hint = resume_command(begun[-1], chain[0].method) if begun else stopped.hint
    return Interrupted(message, hint or "Type the same command again.", exit_code=stopped.exit_code)


def _titled(title: str, on_event: OnEvent) -> OnEvent:
    """Say which link a bar belongs to."""

    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(
                event, task=f"{title}: {event.task}", group=f"{title}: {event.group or event.task}"
            )
        on_event(event)

    return tell
