"""How fast kd trains, beside a naive loop and torchdistill: ratios from interleaved rounds in one process.

    python benchmarks/train_throughput.py --data cifar10-jpeg.tar.xz --teacher weights/teacher.pt
    python benchmarks/train_throughput.py --data … --teacher … --sides b,e        # does --compile pay?

A Caffe NIN teaches a LeNet by method kd (τ 3, λ 0.3), batch 256. Every round runs every side once, in rotated order,
so that what slows the machine for a while slows all; a ratio is taken within its round, of the first side to each.
The losses of all sides are compared on the same images before anything is timed.

    a   kd's own loop, `kdcli.engine.fit`, the teacher's outputs cached
    b   the bare student step on tensors made beforehand
    c   a naive loop: teacher in every step, PIL images, DataLoader
    d1  torchdistill, teacher in the loop
    d2  torchdistill, its own output cache warm (1.1.4 is the last version that has one)
    d3  torchdistill, the teacher's outputs handed to it through its extension points
    e   the bare student step, compiled; only if asked for
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kd_loop import BareStep, KdLoop, config_of, matmul_peak, training_flops
from naive_loop import NaiveLoop, loader_of
from pair import BATCH, Pair, cut, spread
from rounds import Side, log, machine, measure, shown, spread_of, summary, table
from torchdistill_loop import TorchdistillLoop, reason_against

from kdcli import data
from kdcli.base import runtime
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note
from kdcli.data import Splits

SIDES = ("a", "b", "c", "d1", "d2", "d3", "e")
SLOW = ("c", "d1")  # a teacher in every step
TOLERANCE = 1e-3  # relative, between two ways to compute the same loss in float32
TEST_IMAGES = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    args = _parse(arguments)
    report: dict[str, Any] = {"schema_version": 1}
    log("loading")
    try:
        splits = data.load(args.data, cache_dir=args.cache_dir, on_event=_notes)
        with tempfile.TemporaryDirectory(prefix="kd-throughput-") as scratch:
            _measure_all(args, splits, Path(scratch), report)
    except KdError as error:
        log(f"{error.message}\n{error.hint}")
        return error.exit_code
    finally:  # a long run that is stopped keeps what it has
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure_all(args: argparse.Namespace, splits: Splits, scratch: Path, report: dict[str, Any]) -> None:
    threads = runtime.set_threads(args.threads)
    chosen, left_out = _available(args.sides)
    for line in left_out:
        log(line)
    pair = _pair(splits, args)
    report |= {
        "data": splits.label,
        "student": pair.network,
        "batch": BATCH,
        "images": len(pair.splits.train),
        "trained_on": len(pair.rows[0]),
        "rounds": args.rounds,
        "workers": args.workers,
        "left_out": left_out,
        "environment": runtime.environment(),
        "machine": machine(threads),
    }
    if args.rounds:
        sides, precision = _sides_of(args, pair, chosen, scratch)
        report["precision"] = precision
        report["losses"] = _compare_losses(pair, sides)
        dtypes = [torch.float32, torch.bfloat16] if precision == "bf16" else [torch.float32]
        peaks: dict[str, list[float]] = {str(dtype).removeprefix("torch."): [] for dtype in dtypes}

        def measure_peaks() -> None:
            runtime.set_threads(args.threads)
            for name, found in peaks.items():
                found.append(matmul_peak(getattr(torch, name)))

        rows = summary(sides, measure(sides, args.rounds, args.threads, measure_peaks))
        report |= _with_flops(rows, peaks, training_flops(pair))
        print("\n".join(_lines(report)), flush=True)
    if args.profile:
        runtime.set_threads(args.threads)
        print(BareStep(pair, precision=report.get("precision", args.precision)).profile(), flush=True)


def _pair(splits: Splits, args: argparse.Namespace) -> Pair:
    """The pair on --images train images, all if 0; the test that ends each run of kd is kept short."""
    train = cut(splits.train, args.images) if args.images else splits.train
    shortened = Splits(splits.spec, splits.label, train, cut(splits.test, TEST_IMAGES))
    return Pair(shortened, args.teacher, args.student, args.val_fraction)


def _available(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sides that can run, and a line for each that cannot."""
    reasons = {key: reason_against(key) for key in wanted if key.startswith("d")}
    lines = [reason for reason in reasons.values() if reason]
    return [key for key in wanted if not reasons.get(key)], lines


def _sides_of(
    args: argparse.Namespace, pair: Pair, chosen: Sequence[str], scratch: Path
) -> tuple[list[Side], str]:
    """The sides, and the precision of (a), (b) and (e): as (a) chooses it."""
    rows = pair.rows[0]
    some = rows[spread(len(rows), args.slow_images)]
    precision = "32" if args.precision == "auto" else args.precision
    sides: list[Side] = []
    for key in chosen:
        if key == "a":
            log("the teacher's outputs, once")
            loop = KdLoop(
                config_of(pair, scratch, threads=args.threads, precision=args.precision), pair.splits
            )
            loop.warm_up()
            precision = loop.config.precision
            sides.append(loop)
        elif key in ("b", "e"):
            sides.append(BareStep(pair, precision=precision, compiled=key == "e"))
        elif key == "c":
            loader = loader_of(pair.dataset(some, flip=True), args.workers)
            sides.append(NaiveLoop(pair.teacher, pair.student(), loader))
        else:
            own = some if key in SLOW else rows
            sides.append(TorchdistillLoop(key, pair, own, args.workers, scratch))
    return sides, precision


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


def _with_flops(rows: list[dict[str, Any]], peaks: dict[str, list[float]], flops: int) -> dict[str, Any]:
    """The rows, with the arithmetic of kd's sides as a share of the machine's peak in the same round."""
    for row in rows:
        if row["side"] in ("a", "b", "e"):
            done = [speed * flops / 1e9 for speed in row["images_per_s"]["rounds"]]
            row["gflop_per_s"] = spread_of(done)
            row["share_of_matmul_peak"] = {
                name: spread_of([each / peak for each, peak in zip(done, found, strict=True)])
                for name, found in peaks.items()
            }
    found = {name: spread_of(values) for name, values in peaks.items()}
    return {"training_flops_per_image": flops, "matmul_peak_gflop_per_s": found, "sides": rows}


def _lines(report: dict[str, Any]) -> list[str]:
    """The Markdown table, and what it was measured with."""
    flops = report["training_flops_per_image"]
    lines = [
        f"{report['student']} on {report['data']}, batch {report['batch']}, {report['rounds']} interleaved rounds, "
        f"precision {report['precision']} (a, b, e), {report['workers']} loader workers (c, d)",
        report["machine"],
        "",
        *table(report["sides"]),
        "",
        f"training: {flops / 1e6:.1f} MFLOP an image (2 a multiply-accumulate forward, 4 backward, "
        "less the gradient for the input of the first layer)",
    ]
    for name, peak in report["matmul_peak_gflop_per_s"].items():
        lines.append(f"matmul peak, {name}: {shown(peak, 1)} GFLOP/s")
    for row in report["sides"]:
        for name, share in row.get("share_of_matmul_peak", {}).items():
            speed = row["gflop_per_s"]["median"]
            lines.append(
                f"{row['side']}: {speed:.1f} GFLOP/s, {100 * share['median']:.0f} % of the {name} peak"
            )
    losses = ", ".join(f"{key} {value:.5f}" for key, value in report["losses"].items())
    return [*lines, f"loss of the untrained student on the same images: {losses}"]


def _notes(event: Event) -> None:
    if isinstance(event, Note):
        log(event.text)


def _sides(text: str) -> list[str]:
    wanted = text.split(",")
    unknown = [key for key in wanted if key not in SIDES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(SIDES)}")
    return [key for key in SIDES if key in wanted]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="as for kd train")
    add("--teacher", type=Path, required=True, help="a checkpoint (.pt)")
    add("--student", default="lenet", help="name of its network")
    add("--sides", type=_sides, default=list(SIDES[:-1]), help="by default " + ",".join(SIDES[:-1]))
    add("--rounds", type=int, default=5, help="0: none, only --profile")
    add("--images", type=int, default=5120, help="train images of the fast sides, validation included")
    add("--slow-images", type=int, default=1280, help="images a round of c and d1")
    add("--val-fraction", type=float, default=0.05)
    add("--threads", type=int, default=0, help="0: all available cores")
    add(
        "--workers",
        type=int,
        default=0,
        help="DataLoader workers of c and d; 0: torch's default, and on a machine of two cores a worker "
        "only takes a core from the step",
    )
    add(
        "--precision",
        choices=("auto", "32", "bf16"),
        default="auto",
        help="of a, b and e; auto: what kd chooses in a, and 32 without a",
    )
    add("--cache-dir", type=Path, default=Path("cache"), help="packed images")
    add("--profile", action="store_true", help="the bare step's costliest operators")
    add("--json", type=Path, help="write every number to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
