"""Training throughput of kd, a naive loop and torchdistill: ratios from interleaved rounds in one process.

    python benchmarks/train_throughput.py --data cifar10-jpeg.tar.xz --teacher weights/teacher.pt
    python benchmarks/train_throughput.py --data … --teacher … --sides b,e        # does --compile pay?

A Caffe NIN teaches a LeNet by method kd (τ 3, λ 0.3), batch 256. Every round runs every side once, in rotated order,
so that what slows the machine for a while slows all; a ratio is taken within its round, of the first side to each.
The losses of all sides are compared on the same images before anything is timed.

    a   kd's own loop, `kdcli.engine.fit`, the teacher's outputs cached
    b   the bare student step on tensors made beforehand
    c   a naive loop: teacher in every step, PIL images, DataLoader
    d1  torchdistill, teacher in the loop
    d3  torchdistill, the teacher's outputs handed to it through its extension points
    e   the bare student step, compiled; only if asked for
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kd_loop import BareStep, KdLoop, config_of, matmul_peak, training_flops
from naive_loop import NaiveLoop, loader_of
from pair import BATCH, Pair, cut, spread
from rounds import Side, log, machine, measure, shown, spread_of, summary, table
from torchdistill_loop import TorchdistillLoop, reason_against

from kdcli import data
from kdcli.base import runtime
from kdcli.base.events import Event, Note
from kdcli.data import Splits

SIDES = ("a", "b", "c", "d1", "d3", "e")
SLOW = ("c", "d1")  # a teacher in every step
TOLERANCE = 1e-3  # relative, between two ways to compute the same loss in float32
TEST_IMAGES = 512


def main(
    data_name: Annotated[str, typer.Option("--data", help="As for kd train.")],
    teacher: Annotated[Path, typer.Option(help="A checkpoint (.pt).")],
    student: Annotated[str, typer.Option(help="Name of its network.")] = "lenet",
    sides: str = ",".join(SIDES[:-1]),
    rounds: Annotated[int, typer.Option(help="0: none, only --profile.")] = 5,
    images: Annotated[
        int, typer.Option(help="Images of the fast sides, validation included; 0: all.")
    ] = 5120,
    slow_images: Annotated[int, typer.Option(help="Images a round of c and d1.")] = 1280,
    val_fraction: float = 0.05,
    threads: Annotated[int, typer.Option(help="0: all available cores.")] = 0,
    workers: Annotated[int, typer.Option(help="DataLoader workers of c and d.")] = 0,
    precision: Annotated[
        str, typer.Option(help="Of a, b and e; auto: as kd selects in a, 32 without a.")
    ] = "auto",
    cache_dir: Annotated[Path, typer.Option(help="Packed images.")] = Path("cache"),
    profile: Annotated[bool, typer.Option("--profile", help="The bare step's costliest operators.")] = False,
) -> None:
    """Print images/s of all sides, and the ratio of the first to each."""
    threads = runtime.set_threads(threads)
    splits = data.load(data_name, cache_dir=cache_dir, on_event=_notes)
    train = cut(splits.train, images) if images else splits.train
    few = Splits(splits.spec, splits.label, train, cut(splits.test, TEST_IMAGES))
    pair = Pair(few, teacher, student, val_fraction)
    if rounds:
        with tempfile.TemporaryDirectory(prefix="kd-throughput-") as scratch:
            place = Path(scratch)
            made, precision = _sides_of(
                pair, sides.split(","), slow_images, workers, threads, precision, place
            )
            losses = _compare_losses(pair, made)
            peaks: dict[str, list[float]] = {"float32": []}
            if precision == "bf16":
                peaks["bfloat16"] = []

            def measure_peaks() -> None:
                runtime.set_threads(threads)
                for name, found in peaks.items():
                    found.append(matmul_peak(getattr(torch, name)))

            rows = summary(made, measure(made, rounds, threads, measure_peaks))
        recipe = f"batch {BATCH}, {rounds} interleaved rounds, precision {precision} (a, b, e)"
        print(f"{student} on {splits.label}, {recipe}\n{machine(threads)}\n")
        print("\n".join(table(rows)))
        _print_arithmetic(rows, peaks, training_flops(pair))
        print("loss of the untrained student on the same images: ", end="")
        print(", ".join(f"{key} {value:.5f}" for key, value in losses.items()), flush=True)
    if profile:
        runtime.set_threads(threads)
        print(BareStep(pair, precision=precision).profile(), flush=True)


def _sides_of(
    pair: Pair,
    chosen: Sequence[str],
    slow_images: int,
    workers: int,
    threads: int,
    precision: str,
    scratch: Path,
) -> tuple[list[Side], str]:
    """The sides that can run, and the precision of (a), (b) and (e): as (a) selects it."""
    if unknown := set(chosen) - set(SIDES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: not among {', '.join(SIDES)}", param_hint="--sides"
        )
    rows = pair.rows[0]
    some = rows[spread(len(rows), slow_images)]
    sides: list[Side] = []
    for key in SIDES:
        if key not in chosen:
            continue
        if key == "a":
            loop = KdLoop(config_of(pair, scratch, threads=threads, precision=precision), pair.splits)
            loop.warm_up()
            precision = loop.config.precision
            sides.append(loop)
        elif key in ("b", "e"):
            sides.append(BareStep(pair, precision=precision, compiled=key == "e"))
        elif key == "c":
            sides.append(
                NaiveLoop(pair.teacher, pair.student(), loader_of(pair.dataset(some, flip=True), workers))
            )
        elif reason := reason_against(key):
            log(reason)
        else:
            own = some if key in SLOW else rows
            sides.append(TorchdistillLoop(key, pair, own, workers))
    return sides, "32" if precision == "auto" else precision


def _compare_losses(pair: Pair, sides: Sequence[Side]) -> dict[str, float]:
    """The loss of the untrained student on the same images, by kd and by each side that has its own formula."""
    found = {"kd": pair.reference_loss()}
    images, labels = pair.examples()
    dataset = pair.dataset(spread(len(pair.splits.train), len(labels)), flip=False)
    pixels = torch.stack([dataset[index][0] for index in range(len(images))])
    for side in sides:
        if isinstance(side, NaiveLoop | TorchdistillLoop):
            found[side.key] = float(side.loss_of(pixels, torch.from_numpy(labels)).detach())
    for key, value in found.items():
        if abs(value - found["kd"]) > TOLERANCE * abs(found["kd"]):
            raise RuntimeError(f"{key} does not compute kd's loss: {value}, not {found['kd']}")
    return found


def _print_arithmetic(rows: list[dict[str, Any]], peaks: dict[str, list[float]], flops: int) -> None:
    """Print the arithmetic of kd's sides as a share of the machine's peak in the same round."""
    print(
        f"\ntraining: {flops / 1e6:.1f} MFLOP an image (2 a multiply-accumulate forward, 4 backward, "
        "less the gradient for the input of the first layer)"
    )
    for name, peak in peaks.items():
        print(f"matmul peak, {name}: {shown(spread_of(peak), 1)} GFLOP/s")
        for row in rows:
            if row["side"] in ("a", "b", "e"):
                done = [speed * flops / 1e9 for speed in row["images_per_s"]["rounds"]]
                share = spread_of([each / top for each, top in zip(done, peak, strict=True)])["median"]
                speed = spread_of(done)["median"]
                print(f"{row['side']}: {speed:.1f} GFLOP/s, {100 * share:.0f} % of the {name} peak")


def _notes(event: Event) -> None:
    if isinstance(event, Note):
        log(event.text)


if __name__ == "__main__":
    typer.run(main)
