"""Latency and throughput of models side by side, their ratios to the teacher, intervals and verdicts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch

from kdcli.base.config import BenchConfig
from kdcli.base.events import OnEvent, Progress
from kdcli.base.timing import Floats, interleaved, warm_up
from kdcli.deploy.bench.footprint import Footprint
from kdcli.deploy.bench.measurements import Row

SESSIONS = 16
_MIN_SESSIONS = 8  # before the intervals may end the measurement
_CALLS = 5  # timed single-image calls of a model in a round
_PRECISE = 0.01  # half width of an interval that is narrow enough
_BATCH_ROUNDS = 15
_WARM_S = 0.02
_SAME_SIZE = 1.05  # a smaller ratio of sizes is called `same size`
_SMALLEST = 1.02  # ratios nearer to 1 are called no difference, however narrow the interval
_LEAST_CALLS = 1000  # for the 99th percentile: ten lie beyond it
_RESAMPLES = 10_000  # of the bootstrap

Runner = Callable[[int], Any]  # runs the network on that many images


@dataclass(frozen=True)
class Candidate:
    """A model on one engine."""

    row: Row  # its figures so far
    load: Callable[[], Runner]  # loads it anew: the place of weights in memory changes speeds by 1 %
    footprint: Callable[[], Footprint]  # measures it in a separate process


@dataclass
class Timings:
    """Seconds of calls of all candidates."""

    single: list[Floats] = field(default_factory=list)  # of one image, by session (rounds, candidates, calls)
    batches: dict[int, Floats] = field(default_factory=dict)  # by batch size (rounds, candidates)

    @property
    def rounds(self) -> int:
        """Rounds of all sessions."""
        return sum(map(len, self.single))

    def ratios(self, teacher: int, model: int) -> list[Floats]:
        """Teacher's time ÷ a model's, by session (rounds,)."""
        medians = [np.median(session, axis=2) for session in self.single]
        return [session[:, teacher] / session[:, model] for session in medians]

    def figures(self, model: int) -> dict[str, Any]:
        """Values of `Row` from a model's own times."""
        single_ms = 1e3 * np.concatenate([session[:, model].ravel() for session in self.single])
        median, p90, p95, p99 = np.percentile(single_ms, [50, 90, 95, 99]).tolist()
        throughput = {1: 1e3 / median}
        for size, seconds in self.batches.items():
            throughput[size] = float(size / np.median(seconds[:, model]))
        return {
            "latency_ms": median,
            "latency_p90_ms": p90,
            "latency_p95_ms": p95,
            "latency_p99_ms": p99 if len(single_ms) >= _LEAST_CALLS else None,
            "latency_n": len(single_ms),
            "throughput": throughput,
            "images_per_s": throughput[max(throughput)],
        }


def measure(candidates: Sequence[Candidate], config: BenchConfig, on_event: OnEvent) -> Timings:
    """Time single images, then batches.

    In each of several sessions all models are loaded anew and warmed up, and take turns in rounds of random order.
    The measurement ends early when every ratio to the teacher is known to 1 %: this looks at the intervals' widths,
    not at the ratios.
    """
    timings = Timings()
    sessions = min(SESSIONS, config.rounds)
    with torch.inference_mode():
        for session in range(sessions):
            # 1. Load and warm up; the first time until libraries, threads and clock are warm too.
            runners = [candidate.load() for candidate in candidates]
            for runner in runners:
                warm_up(partial(runner, 1), at_least_s=_WARM_S, until_stable=session == 0)

            # 2. Rounds.
            end = time.monotonic() + config.max_seconds * (1 - session / SESSIONS)
            seconds = interleaved(
                [partial(runner, 1) for runner in runners],
                rounds=config.rounds // sessions + (session < config.rounds % sessions),
                repeats=_CALLS,
                budget_s=config.max_seconds / SESSIONS,
                seed=session,
                on_round=_reporter(on_event, "measuring latency", timings.rounds, config.rounds, end),
            )
            timings.single.append(seconds)

            # 3. Stop when all intervals are narrow.
            if session + 1 >= _MIN_SESSIONS and _is_precise([item.row for item in candidates], timings):
                break
        on_event(Progress("measuring latency", config.rounds, config.rounds, "rounds"))
        timings.batches = _measure_batches(runners, config, on_event)
    return timings


def _measure_batches(runners: Sequence[Runner], config: BenchConfig, on_event: OnEvent) -> dict[int, Floats]:
    """Seconds by batch size (rounds, candidates)."""
    sizes = [size for size in config.batch if size > 1]
    rounds = min(_BATCH_ROUNDS, config.rounds)
    found: dict[int, Floats] = {}
    for position, size in enumerate(sizes):
        calls = [partial(runner, size) for runner in runners]
        for call in calls:
            call()  # allocates memory for this size
        end = time.monotonic() + config.max_seconds * (1 - position / len(sizes))
        seconds = interleaved(
            calls,
            rounds=rounds,
            settle=False,
            budget_s=config.max_seconds / len(sizes),
            on_round=_reporter(on_event, "measuring batches", position * rounds, rounds * len(sizes), end),
        )
        found[size] = seconds[:, :, 0]
    on_event(Progress("measuring batches", rounds * len(sizes), rounds * len(sizes), "rounds"))
    return found


def _reporter(on_event: OnEvent, task: str, done: int, total: int, end: float) -> Callable[[int], None]:
    """A function that reports rounds, of work that ends by the time `end` (monotonic)."""
    return lambda number: on_event(
        Progress(task, done + number, total, "rounds", left_s=end - time.monotonic())
    )


def _is_precise(rows: Sequence[Row], timings: Timings) -> bool:
    for index, row in enumerate(rows):
        teacher = _teacher_of(row, rows)
        if teacher is not None:
            low, ratio, high = ratio_interval(timings.ratios(teacher, index))
            if (high - low) / (2 * ratio) > _PRECISE:
                return False
    return True


def _teacher_of(row: Row, rows: Sequence[Row]) -> int | None:
    """Index of the teacher on the same engine."""
    teachers = (i for i, other in enumerate(rows) if other.is_teacher and other.engine == row.engine)
    return next(teachers, None)


def compare(index: int, rows: Sequence[Row], timings: Timings) -> Row:
    """A row with its ratios to the teacher on the same engine, and the verdict."""
    row = rows[index]
    size_ratio = max(rows[0].network_bytes, 1) / max(row.network_bytes, 1)
    row = row.extend(size_ratio=size_ratio)
    size, bigger = size_text(size_ratio), size_ratio < 1 / _SAME_SIZE
    teacher = _teacher_of(row, rows)
    if teacher is None:
        note = f"the teacher was not run on {row.engine}: no speed ratio"
        return row.extend(verdict=size, worse=bigger, notes=[note])
    if row.is_teacher:
        return row.extend(speedup=1.0, speedup_interval=(1.0, 1.0), verdict="teacher")
    low, ratio, high = ratio_interval(timings.ratios(teacher, index))
    speed = speed_verdict(low, ratio, high)
    text = "no difference in speed" if speed == "no difference" else f"{max(ratio, 1 / ratio):,.3g}× {speed}"
    return row.extend(
        speedup=ratio,
        speedup_interval=(low, high),
        speed=speed,
        verdict=f"{text}, {size}",
        worse=bigger or speed == "slower",
    )


def size_text(ratio: float) -> str:
    """2.13 → `2.1× smaller`, 0.5 → `2.0× bigger`, 1.01 → `same size`."""
    times = max(ratio, 1 / ratio)
    if times <= _SAME_SIZE:
        return "same size"
    return f"{times:,.{0 if times >= 10 else 1}f}× {'smaller' if ratio > 1 else 'bigger'}"


def ratio_interval(sessions: Sequence[Floats]) -> tuple[float, float, float]:
    """Bootstrap 95 % interval of a ratio: lower bound, ratio, upper bound; 0 and infinity around a single round.

    Rounds of one session share the models' place in memory and the state of the machine, so sessions are resampled,
    not rounds (of a single session, rounds). As there are few, the interval is the expanded percentile interval
    (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015), which is as wide as Student's t requires.
    The ratio is the exponential of the mean of the sessions' median log ratios.
    """
    logs = [np.log(np.asarray(ratios, np.float64)) for ratios in sessions]
    medians = np.array([np.median(ratios) for ratios in logs]) if len(logs) > 1 else logs[0]
    middle, count = float(medians.mean()), len(medians)
    if count < 2:
        return 0.0, float(np.exp(middle)), float("inf")
    random = np.random.default_rng(0)
    means = medians[random.integers(0, count, (_RESAMPLES, count))].mean(axis=1)
    tail = 100 * scipy.stats.norm.cdf(-np.sqrt(count / (count - 1)) * scipy.stats.t.ppf(0.975, count - 1))
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(np.exp(min(low, middle))), float(np.exp(middle)), float(np.exp(max(high, middle)))


def speed_verdict(low: float, ratio: float, high: float) -> str:
    """`faster`, `slower` or `no difference`: the interval must exclude 1, and the ratio be 2 % away from it."""
    if low > 1 and ratio >= _SMALLEST:
        return "faster"
    if high < 1 and ratio <= 1 / _SMALLEST:
        return "slower"
    return "no difference"
