"""The result of a comparison, from the results of its runs; as CSV, as Markdown, and as cells of any table."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from kdcli import __version__
from kdcli.base.config.settings import Seed
from kdcli.base.results import Count, NonNegative, Percent, Probability, Table
from kdcli.base.tables import csv_text, markdown_cell, markdown_text
from kdcli.data import overlap_warning
from kdcli.engine import RunDir, read_result
from kdcli.engine.identity import recorded_circumstances
from kdcli.engine.records import Record
from kdcli.methods import TrainConfig
from kdcli.studies.compare.plan import Plan
from kdcli.studies.compare.stats import INCONCLUSIVE, LEVEL, Interval, Points, Summary, holm, summary, verdict


class RunFigures(Record):
    """One run; `missing` if it is neither finished nor failed, in an interrupted comparison.

    `circumstances` are versions, hardware and threads, on which the last bits depend.
    """

    run: str
    method: str
    seed: Seed
    status: Literal["finished", "failed", "missing"]
    reason: str | None = None
    test_accuracy: Percent | None = None
    val_accuracy: Percent | None = None
    agreement: Percent | None = None
    teacher_passes: Count = 0  # of this run alone; 0 with a warm cache
    seconds: NonNegative = 0.0
    circumstances: dict[str, str] = Field(default_factory=dict)
    resumed_with_differences: tuple[str, ...] = ()  # circumstances that changed when it was resumed


class Difference(Summary):
    """A method's test accuracy less the baseline's, seed by seed, in points; seeds with both runs finished."""

    by_seed: list[tuple[Seed, Points]]  # (seed, difference) of each
    p_holm: Probability | None = None  # p adjusted for all comparisons of this table that have one


class Standing(Record):
    """A method over its seeds, finished and failed or missing; accuracies in per cent."""

    method: str
    is_baseline: bool
    count: Count
    failed: Count
    test_mean: Percent | None
    test_deviation: Points | None
    test_interval: Interval | None
    val_mean: Percent | None
    difference: Difference | None  # None for the baseline itself, and where no seed has both runs
    verdict: str  # `baseline`, `better`, `worse`, `inconclusive` or `one seed: no claim`


class Comparison(Record):
    """A `comparison.json`."""

    schema_version: Literal[1] = 1
    kd_version: str
    folder: str
    data: str
    student: str
    epochs: Count
    methods: list[str]
    seeds: list[Seed]
    baseline: str
    level: Probability
    test_images: Count  # the step of an accuracy is 100 / test_images
    comparisons: Count  # of methods with the baseline, without those of incomplete runs
    teacher_passes: Count  # over a data set, of all runs together
    standings: list[Standing]
    runs: list[RunFigures]
    notes: list[str]

    @property
    def failed(self) -> list[RunFigures]:
        return [run for run in self.runs if run.status != "finished"]

    def table(self) -> Table:
        columns = [
            "method",
            "runs",
            "test accuracy, %: mean ± sd",
            f"difference to {self.baseline}, points",
            "95 % interval",
            "p (Holm)",
            "verdict",
        ]
        return columns, [[row.method, *cells(row)] for row in self.standings]


def conclude(
    plan: Plan, failures: Mapping[str, str], label: str, test_images: int, test_in_train: int = 0
) -> Comparison:
    """Compare the finished runs of a plan; `failures` are the reasons of failed runs, by name."""
    runs = [_figures(config, failures.get(config.name)) for config in plan.runs]
    # a method with a missing run, its own or the baseline's, gets no verdict: the other runs may be a biased sample
    missing = {run.method for run in runs if run.status != "finished"}
    withheld = {name for name in plan.methods if name != plan.baseline and missing & {name, plan.baseline}}
    standings = _standings(plan, runs, withheld, 100 / test_images)
    return Comparison(
        kd_version=__version__,
        folder=plan.folder.as_posix(),
        data=label,
        student=plan.train.student,
        epochs=plan.train.epochs,
        methods=list(plan.methods),
        seeds=list(plan.seeds),
        baseline=plan.baseline,
        level=LEVEL,
        test_images=test_images,
        comparisons=len(plan.methods) - 1 - len(withheld),
        teacher_passes=sum(run.teacher_passes for run in runs),
        standings=standings,
        runs=runs,
        notes=[*filter(None, [overlap_warning(test_in_train, test_images)]), *_notes(runs, standings)],
    )


def accuracies_of(runs: Sequence[RunFigures], method: str) -> dict[int, float]:
    """Test accuracy of the finished runs of a method, by seed."""
    own = [run for run in runs if run.method == method]
    return {run.seed: run.test_accuracy for run in own if run.test_accuracy is not None}


def _figures(config: TrainConfig, reason: str | None) -> RunFigures:
    run_dir = RunDir.of(config)
    known: dict[str, Any] = {"run": run_dir.path.as_posix(), "method": config.method, "seed": config.seed}
    if not run_dir.result_file.is_file():
        return RunFigures(**known, status="missing" if reason is None else "failed", reason=reason)
    result = read_result(run_dir.result_file)
    return RunFigures(
        **known,
        status="finished",
        test_accuracy=result.evaluation.accuracy,
        val_accuracy=result.val_accuracy,
        agreement=result.evaluation.agreement,
        teacher_passes=result.teacher_passes,
        seconds=result.seconds,
        circumstances={"precision": config.precision, **recorded_circumstances(run_dir.environment_file)},
        resumed_with_differences=result.resumed_with_differences,
    )


def _standings(
    plan: Plan, runs: Sequence[RunFigures], withheld: set[str], resolution: float
) -> list[Standing]:
    # 1. Accuracies by method and seed, and statistics of their differences to the baseline's
    accuracies = {name: accuracies_of(runs, name) for name in plan.methods}
    base = accuracies[plan.baseline]
    differences: dict[str, Difference] = {}
    for name, own in accuracies.items():
        by_seed = [(seed, own[seed] - base[seed]) for seed in plan.seeds if seed in own and seed in base]
        if by_seed and name != plan.baseline:
            values = dict(summary([value for _, value in by_seed], resolution))
            values |= {"p": None} if name in withheld else {}
            differences[name] = Difference(**values, by_seed=by_seed)
    # 2. Holm's p covers the methods without missing runs
    tested = {name: found.p for name, found in differences.items() if found.p is not None}
    for name, p in zip(tested, holm(list(tested.values())), strict=True):
        differences[name] = differences[name].model_copy(update={"p_holm": p})
    # 3. A row for each method
    rows = []
    for name, own in accuracies.items():
        difference = differences.get(name)
        claim = "baseline" if name == plan.baseline else INCONCLUSIVE
        if difference is not None and name not in withheld:
            claim = verdict(difference)
        alone = summary(list(own.values()), resolution) if own else None
        validated = [run.val_accuracy for run in runs if run.method == name and run.val_accuracy is not None]
        rows.append(
            Standing(
                method=name,
                is_baseline=name == plan.baseline,
                count=len(own),
                failed=len(plan.seeds) - len(own),
                test_mean=alone.mean if alone else None,
                test_deviation=alone.deviation if alone else None,
                test_interval=alone.interval if alone else None,
                val_mean=sum(validated) / len(validated) if validated else None,
                difference=difference,
                verdict=claim,
            )
        )
    return rows


def _notes(runs: Sequence[RunFigures], standings: Sequence[Standing]) -> list[str]:
    notes = [
        f"{run.method}, seed {run.seed} {run.status}{': ' + run.reason if run.reason else ''}"
        for run in runs
        if run.status != "finished"
    ]
    if notes and any(row.difference and row.difference.interval for row in standings):
        notes.append("methods with a missing run get no verdict: the remaining runs may be a biased sample")
    for name in dict.fromkeys(name for run in runs for name in run.circumstances):
        values = sorted({run.circumstances[name] for run in runs if name in run.circumstances})
        if len(values) > 1:
            notes.append(f"the runs differ in {name}: {', '.join(values)}")
    notes += [
        f"{run.method}, seed {run.seed} was resumed with a difference: {text}"
        for run in runs
        for text in run.resumed_with_differences
    ]
    return notes


def to_csv(result: Comparison) -> str:
    """All figures, a line for each method."""
    rows = []
    for row in result.standings:
        values = row.to_dict()
        difference = values.pop("difference") or dict.fromkeys(Difference.model_fields)
        del difference["by_seed"]
        rows.append({**values, **{f"difference_{name}": value for name, value in difference.items()}})
    return csv_text(rows)


def to_markdown(result: Comparison) -> str:
    """The table of differences, and a line about its runs."""
    columns, rows = result.table()
    table = markdown_text(columns, rows, left=(0, len(columns) - 1))
    notes = [
        f"{result.test_images:,} test images of {result.data}; student {result.student}, "
        f"{result.epochs:,} epochs; {statistics_note(result)}",
        *result.notes,
    ]
    return f"{table}\n\n{' '.join(f'{markdown_cell(text)}.' for text in notes)}\n"


def statistics_note(result: Comparison) -> str:
    """How the figures were computed, one line."""
    seeds, count = len(result.seeds), result.comparisons
    return (
        f"{seeds} seed{'s' * (seeds != 1)}, the same for each method; paired t-interval over seeds; "
        f"{count} comparison{'' if count == 1 else 's'} with {result.baseline}, Holm's p covers all of them"
    )


def cells(row: Standing) -> list[str]:
    """Runs, mean ± sd, difference, interval, Holm's p and verdict, as text."""
    difference = row.difference
    interval = difference.interval if difference else None
    deviation = "" if row.test_deviation is None else f" ± {row.test_deviation:.2f}"
    return [
        str(row.count) + (f" (+{row.failed} failed)" if row.failed else ""),
        "—" if row.test_mean is None else f"{row.test_mean:.2f}{deviation}",
        "" if difference is None else signed(difference.mean),
        "" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}",
        "" if difference is None or difference.p_holm is None else p_text(difference.p_holm),
        "" if row.is_baseline else row.verdict,
    ]


def signed(value: float) -> str:
    """`+0.67`, `−1.20`."""
    return f"{value:+.2f}".replace("-", "−")


def p_text(value: float) -> str:
    """A p-value with two significant figures."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
