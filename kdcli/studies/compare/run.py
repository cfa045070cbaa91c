"""The runs of a comparison: one after another here, or several at a time in processes of their own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

import kdcli
from kdcli.base import files, runtime
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, OnEvent, Progress, ignore
from kdcli.base.text import reason
from kdcli.data import Splits, rows
from kdcli.data.split import split
from kdcli.engine import fit
from kdcli.engine.identity import check_unchanged, input_hashes
from kdcli.engine.plan import check
from kdcli.engine.student import check_student, make_student
from kdcli.studies.compare.plan import Plan, PlannedRun, Settled
from kdcli.studies.compare.result import Comparison, conclude

CORES_A_JOB = 4
_POLL_S = 0.2
_UNITS = 1000  # of one run, on the bar


def compare(plan: Plan, data: Splits, *, jobs: int = 0, on_event: OnEvent = ignore) -> Comparison:
    """Make the runs that are not there yet, and say what all of them show.

    Args:
        jobs: runs at a time; above 1 each is a process that loads the data by itself. 0: one for each 4 cores.

    Raises:
        UsageError: the folder holds another comparison, or a method refuses the settings.
        KdError: a file cannot be read or written, or data, teacher or student are not those it was begun with.
        Interrupted: SIGINT or SIGTERM; finished runs and the states of others are kept.
    """
    jobs = jobs or _default_jobs(plan)
    with files.locked(
        plan.folder / ".lock",
        lambda: on_event(Note("another kd compare is at work on this comparison; waiting for it")),
    ):
        plan = _begin(plan, data, jobs, on_event)
        waiting = [run for run in plan.runs if not run.is_finished()]
        done = len(plan.runs) - len(waiting)
        if done and waiting:
            on_event(Note(f"{done} of {len(plan.runs)} runs are finished already"))
        shown = _Shown(len(plan.runs), done, on_event)
        failures: dict[str, str] = {}
        with runtime.stop_on_signals() as stop:
            work = _in_processes if jobs > 1 and len(waiting) > 1 else _here
            work(plan, data, waiting, jobs, shown, stop, failures)
        result = conclude(plan, failures, data.label)
        try:
            files.write_json(plan.result_file, result.to_json())
        except OSError as error:
            raise KdError(f"cannot write {plan.result_file}: {reason(error)}") from error
    return result


def _default_jobs(plan: Plan) -> int:
    if runtime.choose_device(plan.train.accelerator) != "cpu":
        return 1
    return max(1, runtime.available_cores() // CORES_A_JOB)


def _begin(plan: Plan, data: Splits, jobs: int, on_event: OnEvent) -> Plan:
    """The comparison with all that its runs must have in common, in its folder."""
    plan = plan.as_begun()
    for config in plan.each:
        check(config, data)
        check_student(config, data.train)
    inputs = {name: sha256 for config in plan.each for name, sha256 in input_hashes(config, data).items()}
    if plan.inputs is None:
        plan = replace(plan, inputs=inputs, settled=_settle(plan, data, jobs, on_event))
        plan.save()
    check_unchanged(plan.inputs or {}, inputs, str(plan.folder))
    return plan


def _settle(plan: Plan, data: Splits, jobs: int, on_event: OnEvent) -> Settled:
    """Threads and precision, decided once: runs that differ in them differ by more than their method."""
    threads = runtime.set_threads(plan.train.threads or max(1, runtime.available_cores() // jobs))
    config = plan.runs[0].config
    if config.precision != "auto":
        return make(Settled, {"threads": threads, "precision": config.precision})
    train = data.train
    samples, _ = split(train.labels, config.val_fraction)
    device = torch.device(runtime.choose_device(config.accelerator))
    student = make_student(config, train, samples, device, on_event)
    pixels = torch.from_numpy(rows.take(train.images, samples[: config.batch_size])).to(device)
    precision, _ = runtime.choose_precision(
        "auto", student.network, student.prepare(pixels), len(train.classes)
    )
    return make(Settled, {"threads": threads, "precision": precision})


def _interrupted(plan: Plan, exit_code: int) -> Interrupted:
    done = sum(run.is_finished() for run in plan.runs)
    return Interrupted(
        f"stopped with {done} of {len(plan.runs)} runs finished; what was begun is saved",
        plan.resume_command or "Type the same command again.",
        exit_code=exit_code,
    )


class _Shown:
    """One bar over all runs; notes of the runs, each once."""

    def __init__(self, count: int, finished: int, on_event: OnEvent) -> None:
        self.count = count
        self.finished = finished
        self.on_event = on_event
        self.parts: dict[str, int] = {}  # of runs under way
        self.rates: dict[str, float] = {}
        self.told: set[str] = set()

    def of(self, run: PlannedRun) -> OnEvent:
        """What a run's own events become."""

        def told(event: Event) -> None:
            if isinstance(event, Note):
                if event.text not in self.told:
                    self.told.add(event.text)
                    self.on_event(event)
                return
            if not isinstance(event, Progress):
                return
            if event.group != "training":
                if event.task.startswith("teacher"):
                    self.on_event(event)
                return
            name = run.config.name
            self.parts[name] = _UNITS * event.done // max(1, event.total)
            self.rates[name] = event.values.get("images_per_s", 0.0)
            number = min(self.count, self.finished + len(self.parts))
            self.on_event(
                Progress(
                    f"run {number}/{self.count}: {run.label}, {event.task}",
                    _UNITS * self.finished + sum(self.parts.values()),
                    _UNITS * self.count,
                    values={"images_per_s": sum(self.rates.values())},
                    group="comparison",
                )
            )

        return told

    def ended(self, run: PlannedRun) -> None:
        """A run is finished, or has failed."""
        self.parts.pop(run.config.name, None)
        self.rates.pop(run.config.name, None)
        self.finished += 1


def _here(
    plan: Plan,
    data: Splits,
    waiting: Sequence[PlannedRun],
    jobs: int,
    shown: _Shown,
    stop: runtime.StopFlag,
    failures: dict[str, str],
) -> None:
    for run in waiting:
        if stop:
            raise _interrupted(plan, stop.exit_code)
        begun = run.is_begun()
        try:
            config = run.place.read_config() if begun else run.config
            fit(config, data, resume=run.place if begun else None, on_event=shown.of(run))
        except Interrupted as error:
            raise _interrupted(plan, error.exit_code) from error
        except UsageError:
            raise
        except KdError as error:
            failures[run.config.name] = error.message
            shown.on_event(Note(f"{run.label} failed: {error.message}"))
        shown.ended(run)


class _Worker:
    """A process with one run, and a thread that hears it."""

    def __init__(
        self,
        run: PlannedRun,
        inputs: Mapping[str, str],
        answers: queue.Queue[tuple[_Worker, dict[str, Any] | None]],
    ) -> None:
        self.run = run
        self.end: dict[str, Any] | None = None
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 — closed in `close`
        asked: dict[str, Any] = {"run": run.place.path.as_posix(), "inputs": dict(inputs)}
        if not run.is_begun():
            asked["config"] = run.config.model_dump(mode="json")
        # a session of its own: Ctrl-C in the terminal reaches it by way of this process
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "kdcli.studies.compare.worker",
            ],  # -P: no module of the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=_environment(),
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()  # it stays open: its end would tell the run that nobody waits for it
        threading.Thread(target=self._hear, args=(answers,), daemon=True).start()

    def _hear(self, answers: queue.Queue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answers.put((self, json.loads(line)))
        self.process.wait()
        answers.put((self, None))

    def problem(self) -> str:
        """Why there was no answer at the end."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        if code < 0:
            return f"its process was ended by signal {-code}"
        return lines[-1][:300] if lines else f"its process left with {code}"

    def close(self) -> None:
        """Let go of pipes; a run that is still at work is told to stop."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def _environment() -> dict[str, str]:
    """With the kdcli that runs here found first."""
    places = [str(Path(kdcli.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def _in_processes(
    plan: Plan,
    data: Splits,
    waiting: Sequence[PlannedRun],
    jobs: int,
    shown: _Shown,
    stop: runtime.StopFlag,
    failures: dict[str, str],
) -> None:
    answers: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
    left = list(waiting)
    working: list[_Worker] = []
    refused: dict[str, Any] | None = None
    passed_on = False
    try:
        while left or working:
            while left and len(working) < jobs and not stop and refused is None:
                working.append(_Worker(left.pop(0), plan.inputs or {}, answers))
            if (stop or refused is not None) and not passed_on:
                passed_on = True
                left = []
                for worker in working:
                    worker.process.terminate()
            if not working:
                break
            try:
                worker, answer = answers.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if answer is not None:
                _heard(worker, answer, shown)
                continue
            working.remove(worker)
            worker.process.wait()
            end = worker.end or {"status": "failed", "message": worker.problem()}
            worker.close()
            if end["status"] == "refused":
                refused = refused or end
            elif end["status"] == "failed" and not stop:
                failures[worker.run.config.name] = end["message"]
                shown.on_event(Note(f"{worker.run.label} failed: {end['message']}"))
            if end["status"] in ("finished", "failed"):
                shown.ended(worker.run)
            elif end["status"] == "stopped" and not passed_on:  # somebody stopped this one alone
                failures[worker.run.config.name] = end["message"]
    finally:
        for worker in working:
            worker.close()
    if stop:
        raise _interrupted(plan, stop.exit_code)
    if refused is not None:
        raise UsageError(refused["message"], refused["hint"])


def _heard(worker: _Worker, answer: dict[str, Any], shown: _Shown) -> None:
    tell = shown.of(worker.run)
    if "end" in answer:
        worker.end = answer["end"]
    elif "note" in answer:
        tell(Note(answer["note"]))
    else:
        task, done, total, values, group = answer["progress"]
        tell(Progress(task, done, total, values=values, group=group))
