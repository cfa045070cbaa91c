"""Latency and size of the models of a page: measured now, or read from the output of `kd bench --json`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcli.base.config import BenchConfig, ReportConfig, make
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent
from kdcli.base.files import is_unchanged
from kdcli.deploy.bench import BenchResult, Row, bench
from kdcli.deploy.load import kind_of, teachers_of
from kdcli.engine.records import Evaluation, read_record
from kdcli.report.examine import Examined, recorded_teacher

_ROUNDS = 80  # of a measurement for a page


@dataclass(frozen=True)
class Speed:
    """Rows of a benchmark."""

    rows: tuple[Row, ...] = ()
    method: str = ""  # how, where and how often it was measured, one line
    notes: tuple[str, ...] = ()  # remarks of the benchmark
    unavailable: str = ""  # why there are no rows


def from_file(path: Path) -> Speed:
    """Rows of a file from `kd bench --json > FILE`; a KdError if it has other content."""
    try:
        result = read_record(BenchResult, path)
        if any("\0" in str(row.path) for row in result.rows):
            raise KdError(f"{path}: a path has the character NUL")
    except KdError as error:
        raise KdError(f"--bench: {error.message}", "Make it with: kd bench --json > bench.json") from error
    return of_bench(result, f"measured before this page ({path.name})")


def of_bench(result: BenchResult, when: str = "measured with kd bench on this machine") -> Speed:
    """Rows of a benchmark, and a line on how they were measured."""
    cpu = result.environment.get("cpu")
    model = cpu.get("model") if isinstance(cpu, dict) else None
    count = f", median of n = {result.rows[0].latency_n}" if result.rows[0].latency_n else ""
    method = f"One image{count}; {when}: {model or 'CPU unknown'}, {result.threads} threads."
    return Speed(result.rows, method, result.notes)


def measure(
    examined: Sequence[Examined], others: Sequence[Path], config: ReportConfig, on_event: OnEvent
) -> Speed:
    """Time students, teacher and `others` now, unless `config.no_bench` is set."""
    if config.no_bench:
        return Speed(unavailable="Latencies were left out (--no-bench).")
    teacher = _teacher_of_ratios(examined, config)
    first = teacher or examined[0].run.student
    students = [found.run.student for found in examined]
    rest = [path for path in (*students, *others) if path.resolve() != first.resolve()]
    recorded = (each for run in examined for each in teachers_of(run.run.provenance, run.run.student))
    inputs = next((each.inputs.given for each in recorded if each.path == first), {})
    inputs = inputs if kind_of(first) == "onnx" else {}
    values = {"rounds": _ROUNDS, "threads": config.threads, "teacher": first, **inputs}
    settings = make(BenchConfig, {**values, "batch": "1", "no_memory": True})
    try:
        result = bench([first, *rest], settings, on_event=on_event, skip=True)
    except KdError as error:
        return Speed(unavailable=f"The models could not be timed: {error.message}")
    if teacher is None:  # `bench` takes the first student for the teacher
        rows = (
            replace(row, is_teacher=False, speedup=None, speedup_interval=None, size_ratio=None)
            for row in result.rows
        )
        result = replace(result, rows=tuple(rows))
    return of_bench(result, "measured while this page was made, on this machine")


def _teacher_of_ratios(examined: Sequence[Examined], config: ReportConfig) -> Path | None:
    """The teacher that ratios refer to: --teacher, else that of most runs, if its file is unchanged."""
    if config.teacher is not None:
        return config.teacher
    used = [found.teacher.path for found in examined if found.teacher is not None]
    if not used:
        recorded = (recorded_teacher(found.run) for found in examined)
        used = [path for path, sha in recorded if path and is_unchanged(path, sha)]
    used = [path for path in used if kind_of(path) != "outputs"]
    return max(used, key=used.count) if used else None


def with_accuracies(rows: Sequence[Row], examined: Sequence[Examined]) -> list[Row]:
    """The rows; accuracies of this page replace recorded ones."""
    measured: dict[Path, Evaluation] = {}
    for found in examined:
        if not found.unmeasured:
            measured[found.run.student.resolve()] = found.evaluation
        if found.teacher is not None:
            measured[found.teacher.path.resolve()] = found.teacher.evaluation
    changes: dict[Path, dict[str, Any]] = {
        path: {
            "accuracy": own.accuracy,
            "accuracy_interval": own.accuracy_interval,
            "accuracy_source": "measured",
        }
        for path, own in measured.items()
    }
    return [replace(row, **changes.get(row.path.resolve(), {})) for row in rows]
