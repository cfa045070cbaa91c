"""What a comparison has to say, from what its runs left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli import __version__
from kdcli.base.errors import KdError
from kdcli.studies.compare.plan import Plan, PlannedRun
from kdcli.studies.compare.stats import INCONCLUSIVE, LEVEL, Summary, holm, summary, verdict

MOST_BYTES = 64 << 20  # of a JSON file; a run's confusion matrix of 1,000 classes takes 11 MB
_MOST_RUNS = 100_000
# what makes runs of one machine incomparable with those of another, to the last bits
_CIRCUMSTANCES = ("kd_version", "torch", "cpu", "threads", "accelerator", "precision")

Share = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
# in per cent; an interval from two seeds is up to thirteen times as wide as what it is of
Points = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = tuple[Points, Points]


M = TypeVar("M", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Test(_Model):
    count: Annotated[int, Field(ge=1, lt=2**53)]
    accuracy: Share
    agreement: Share | None = None


class _Recorded(_Model):
    """A result.json, as far as a comparison reads it."""

    val_accuracy: Share | None = None
    test: _Test
    teacher_passes: Count
    seconds: Seconds
    resumed_with_differences: list[str] = []


class RunFigures(_Model):
    """One run.

    Attributes:
        run: its folder.
        status: `missing` is neither finished nor failed: a comparison that was stopped.
        reason: why it failed.
        teacher_passes: of this run alone; 0 where what was kept served it.
        seconds: of training.
        circumstances: what the last bits depend on beside the settings.
        resumed_with_differences: what was different when it was resumed.
    """

    run: str
    method: str
    seed: Seed
    status: Literal["finished", "failed", "missing"]
    reason: str | None = None
    test_accuracy: Share | None = None
    val_accuracy: Share | None = None
    agreement: Share | None = None
    teacher_passes: Count = 0
    seconds: Seconds = 0.0
    circumstances: dict[str, str] = {}
    resumed_with_differences: list[str] = []


class Difference(_Model):
    """A method's test accuracy less the baseline's, seed by seed, in points.

    Attributes:
        count: seeds with which both runs are finished.
        by_seed: (seed, difference) of each.
        deviation, interval, p: None for one seed; p also where a run is missing.
        p_holm: p that holds for all comparisons of this table that have one together.
    """

    count: Annotated[int, Field(ge=1, lt=2**53)]
    mean: Points
    by_seed: list[tuple[Seed, Points]]
    deviation: Points | None
    interval: Interval | None
    p: Share | None
    p_holm: Share | None


class Standing(_Model):
    """A method over its seeds; accuracies in per cent.

    Attributes:
        count: finished runs.
        failed: runs that failed or are missing.
        difference: None for the baseline itself, and where no seed has both runs.
        verdict: `baseline`, `better`, `worse`, `inconclusive`, `one seed: no claim` or `no runs`.
    """

    method: str
    is_baseline: bool
    count: Count
    failed: Count
    test_mean: Share | None
    test_deviation: Points | None
    test_interval: Interval | None
    val_mean: Share | None
    difference: Difference | None
    verdict: str


class Comparison(_Model):
    """A comparison's figures.

    Attributes:
        folder: where it lies.
        test_images: the step of an accuracy is 100 / test_images.
        teacher_passes: over a data set, of all runs together.
        comparisons: with the baseline, in this table, without those that runs are missing of.
        notes: what a reader must know, a line each.
    """

    schema_version: Literal[1] = 1
    kd_version: str
    folder: str
    data: str
    student: str
    epochs: Count
    methods: list[str]
    seeds: Annotated[list[Seed], Field(max_length=_MOST_RUNS)]
    baseline: str
    level: Share
    test_images: Count
    comparisons: Count
    teacher_passes: Count
    standings: Annotated[list[Standing], Field(max_length=_MOST_RUNS)]
    runs: Annotated[list[RunFigures], Field(max_length=_MOST_RUNS)]
    notes: list[str]

    @property
    def failed(self) -> list[RunFigures]:
        return [run for run in self.runs if run.status != "finished"]

    def accuracies(self, method: str) -> dict[int, float]:
        """Test accuracy of the finished runs of a method, by seed."""
        return {
            run.seed: run.test_accuracy
            for run in self.runs
            if run.method == method and run.test_accuracy is not None
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump(mode="json")


def read(path: Path) -> Comparison:
    """A comparison.json, of any origin.

    Raises:
        KdError: missing, too large, or not what kd compare writes.
    """
    return _read(path, Comparison)


def conclude(plan: Plan, failures: Mapping[str, str], label: str) -> Comparison:
    """The figures of a plan's runs.

    Args:
        failures: why a run failed, by its name.
        label: what the data is called.

    Raises:
        KdError: a finished run's files cannot be read.
    """
    runs, counts = [], set()
    for planned in plan.runs:
        figures, count = _figures(planned, failures.get(planned.config.name))
        runs.append(figures)
        counts |= {count} if count else set()
    if len(counts) > 1:
        raise KdError(
            f"the runs of {plan.folder} were not tested on the same images",
            "Start the comparison anew under another --name.",
        )
    test_images = counts.pop() if counts else 0
    standings = _standings(plan, runs, 100 / test_images if test_images else 0.0)
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
        comparisons=len(plan.methods) - 1 - len(_withheld(plan, runs)),
        teacher_passes=sum(run.teacher_passes for run in runs),
        standings=standings,
        runs=runs,
        notes=_notes(runs, standings),
    )


def _figures(planned: PlannedRun, reason: str | None) -> tuple[RunFigures, int]:
    place, config = planned.place, planned.config
    known = {"run": place.path.as_posix(), "method": config.method, "seed": config.seed}
    if not place.result_file.is_file():
        status: Literal["failed", "missing"] = "missing" if reason is None else "failed"
        return RunFigures.model_validate({**known, "status": status, "reason": reason}), 0
    recorded = _read(place.result_file, _Recorded)
    figures = RunFigures.model_validate(
        {
            **known,
            "status": "finished",
            "test_accuracy": recorded.test.accuracy,
            "val_accuracy": recorded.val_accuracy,
            "agreement": recorded.test.agreement,
            "teacher_passes": recorded.teacher_passes,
            "seconds": recorded.seconds,
            "circumstances": _circumstances(place.environment_file),
            "resumed_with_differences": recorded.resumed_with_differences,
        }
    )
    return figures, recorded.test.count


def _circumstances(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        flat = {**document, **document["packages"], "cpu": document["cpu"]["model"]}
        return {name: str(flat.get(name)) for name in _CIRCUMSTANCES}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _standings(plan: Plan, runs: Sequence[RunFigures], resolution: float) -> list[Standing]:
    by_method = {
        name: {run.seed: run for run in runs if run.method == name and run.test_accuracy is not None}
        for name in plan.methods
    }
    base = by_method[plan.baseline]
    paired: dict[str, list[tuple[int, float]]] = {
        name: [
            (seed, (own[seed].test_accuracy or 0.0) - (base[seed].test_accuracy or 0.0))
            for seed in plan.seeds
            if seed in own and seed in base
        ]
        for name, own in by_method.items()
        if name != plan.baseline
    }
    summaries = {
        name: summary([value for _, value in pairs], resolution) for name, pairs in paired.items() if pairs
    }
    withheld = _withheld(plan, runs)
    summaries |= {name: replace(summaries[name], p=None) for name in withheld if name in summaries}
    tested = [name for name, found in summaries.items() if found.p is not None]
    adjusted = dict(zip(tested, holm([summaries[name].p or 0.0 for name in tested]), strict=True))
    standings = []
    for name, own in by_method.items():
        found = summaries.get(name)
        values = [run.test_accuracy for run in own.values() if run.test_accuracy is not None]
        validated = [run.val_accuracy for run in own.values() if run.val_accuracy is not None]
        alone = summary(values, resolution) if values else None
        claim = "baseline" if name == plan.baseline else verdict(found)
        if name in withheld and found is not None and found.interval is not None:
            claim = INCONCLUSIVE
        standings.append(
            Standing(
                method=name,
                is_baseline=name == plan.baseline,
                count=len(values),
                failed=len(plan.seeds) - len(own),
                test_mean=None if alone is None else alone.mean,
                test_deviation=None if alone is None else alone.deviation,
                test_interval=None if alone is None else alone.interval,
                val_mean=sum(validated) / len(validated) if validated else None,
                difference=None if found is None else _difference(found, paired[name], adjusted.get(name)),
                verdict=claim,
            )
        )
    return standings


def _withheld(plan: Plan, runs: Sequence[RunFigures]) -> set[str]:
    """Methods of which nothing is claimed, for a run of theirs or of the baseline is missing.

    Those that are left are no fair sample.
    """
    missing = {run.method for run in runs if run.test_accuracy is None}
    return {name for name in plan.methods if name != plan.baseline and missing & {name, plan.baseline}}


def _difference(found: Summary, by_seed: list[tuple[int, float]], p_holm: float | None) -> Difference:
    return Difference(
        count=found.count,
        mean=found.mean,
        by_seed=by_seed,
        deviation=found.deviation,
        interval=found.interval,
        p=found.p,
        p_holm=p_holm,
    )


def _notes(runs: Sequence[RunFigures], standings: Sequence[Standing]) -> list[str]:
    notes = [
        f"{run.method}, seed {run.seed} {run.status}{': ' + run.reason if run.reason else ''}"
        for run in runs
        if run.status != "finished"
    ]
    if notes and any(row.difference and row.difference.interval for row in standings):
        notes.append("where a run is missing no claim is made: those that are left are no fair sample")
    for name in _CIRCUMSTANCES:
        values = sorted({run.circumstances[name] for run in runs if name in run.circumstances})
        if len(values) > 1:
            notes.append(f"the runs were not all made with the same {name}: {', '.join(values)}")
    notes += [
        f"{run.method}, seed {run.seed} was resumed with a difference: {text}"
        for run in runs
        for text in run.resumed_with_differences
    ]
    return notes


def _read(path: Path, kind: type[M]) -> M:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise KdError(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that are read")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " ".join(str(part) for part in first["loc"])
        raise KdError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
