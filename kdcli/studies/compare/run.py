"""The runs of a comparison, one after the other; finished ones are kept, an interrupted one is resumed."""

from dataclasses import replace

import torch

from kdcli.base import files, runtime
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, OnEvent, Progress, ignore, notes_once
from kdcli.data import Splits, rows
from kdcli.data.split import split_validation
from kdcli.engine import RunDir, fit
from kdcli.engine.identity import check_unchanged, input_hashes
from kdcli.engine.plan import batch_size_for, resolve
from kdcli.engine.student import check_student, make_student
from kdcli.studies.compare.plan import CommonSettings, Plan, run_of
from kdcli.studies.compare.result import Comparison, conclude

_UNITS = 1000  # of one run, on the progress bar


def compare(plan: Plan, data: Splits, *, on_event: OnEvent = ignore) -> Comparison:
    """Train the missing runs, and compare all of them; KdError for files of another comparison or other inputs.

    After Interrupted, finished runs and the state of the current one are kept.
    """
    on_event = notes_once(on_event)
    with files.locked(plan.folder / ".lock", lambda: on_event(Note("waiting for another kd compare"))):
        plan = _start(plan, data, on_event)
        with runtime.stop_on_signals() as stop:
            failures = _train(plan, data, stop, on_event)
        result = conclude(plan, failures, data.label, len(data.test), data.overlap)
        files.write_json(plan.result_file, result.to_dict())
    return result


def _start(plan: Plan, data: Splits, on_event: OnEvent) -> Plan:
    """The comparison with everything that its runs have in common, recorded in its folder."""
    plan = plan.as_started()
    for config in plan.each:
        resolve(config, data)
        check_student(config, data.train)
    inputs = {name: sha256 for config in plan.each for name, sha256 in input_hashes(config, data).items()}
    check_unchanged(plan.inputs, {name: inputs.get(name) for name in plan.inputs}, str(plan.folder))
    common = plan.common or _common_settings(plan, data, on_event)
    plan = plan.model_copy(update={"inputs": inputs, "common": common})
    plan.save()
    return plan


def _common_settings(plan: Plan, data: Splits, on_event: OnEvent) -> CommonSettings:
    """Threads and precision of all runs: if they differed, runs would differ by more than their method."""
    threads = runtime.set_threads(plan.train.threads)
    config, train = plan.runs[0], data.train
    precision: str = config.precision
    samples, validation = split_validation(train.labels, config.val_fraction, train.validation)
    batch_size = config.batch_size or batch_size_for(len(data.trained_on) - len(validation))
    if precision == "auto":
        device = torch.device(runtime.choose_device(config.accelerator))
        student = make_student(config, train, samples, device, on_event)
        pixels = torch.from_numpy(rows.take(train.images, samples[:batch_size])).to(device)
        precision, _ = runtime.choose_precision("auto", student.network, student.prepare(pixels))
    return CommonSettings(
        threads=threads, precision="bf16" if precision == "bf16" else "32", batch_size=batch_size
    )


def _train(plan: Plan, data: Splits, stop: runtime.StopFlag, on_event: OnEvent) -> dict[str, str]:
    """Train the missing runs; reasons of failures, by name."""
    missing = [config for config in plan.runs if not run_of(config).result_file.is_file()]
    finished = len(plan.runs) - len(missing)
    if finished and missing:
        on_event(Note(f"{finished} of {len(plan.runs)} runs are already finished"))
    failures: dict[str, str] = {}
    for number, config in enumerate(missing, finished):
        if stop:
            raise _interrupted(plan, Interrupted("stopped between two runs", exit_code=stop.exit_code))
        check_unchanged(plan.inputs, plan.inputs | input_hashes(config, data), str(plan.folder))
        run, label = run_of(config), f"{config.method}, seed {config.seed}"
        resume = run if run.config_file.is_file() else None
        try:
            fit(config, data, resume=resume, on_event=_listener(label, number, len(plan.runs), on_event))
        except Interrupted as error:
            raise _interrupted(plan, error) from error
        except UsageError:
            raise
        except KdError as error:
            failures[config.name] = error.message
            on_event(Note(f"{label} failed: {error.message}"))
    return failures


def _listener(label: str, number: int, count: int, on_event: OnEvent) -> OnEvent:
    """Turn a run's progress into one bar over all `count` runs; forward notes and the teacher's passes."""

    def forward(event: Event) -> None:
        if isinstance(event, Progress) and event.group == "training":
            task = f"run {number + 1}/{count}: {label}, {event.task}"
            done = _UNITS * number + _UNITS * event.done // max(1, event.total)
            on_event(replace(event, task=task, done=done, total=_UNITS * count, group="comparison"))
        elif isinstance(event, Note) or (isinstance(event, Progress) and event.task.startswith("teacher")):
            on_event(event)

    return forward


def _interrupted(plan: Plan, stopped: Interrupted) -> Interrupted:
    finished = sum(RunDir.of(config).result_file.is_file() for config in plan.runs)
    return Interrupted(
        f"{finished} of {len(plan.runs)} runs are finished; {stopped.message}",
        plan.resume_command or "Rerun the same command to continue.",
        exit_code=stopped.exit_code,
    )
