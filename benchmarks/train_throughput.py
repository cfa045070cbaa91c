"""How fast kd trains, beside a naive loop and torchdistill: ratios from interleaved rounds in one process.

    python benchmarks/train_throughput.py --data cifar10-jpeg.tar.xz --teacher weights/teacher.pt

A Caffe NIN teaches a LeNet by method kd (τ 3, λ 0.3), batch 256. Every round runs every side once, in rotated order,
so that what slows the machine for a while slows all; a ratio is taken within its round. The losses of all sides are
compared on the same images before anything is timed.

    a   kd's own loop, `kdcli.engine.fit`, the teacher's outputs cached
    b   the bare student step on tensors made beforehand
    c   a naive loop: teacher in every step, PIL images, DataLoader
    d1  torchdistill, teacher in the loop
    d2  torchdistill, its own output cache warm (1.1.4 is the last version that has one)
    d3  torchdistill, the teacher's outputs handed to it through its extension points
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from kd_loop import BareStep, KdLoop, matmul_peak, set_threads, training_flops
from naive_loop import NaiveLoop
from pair import BATCH, Pair, Side, cut, spread, tell
from throughput_table import Measured, summary, table
from torchdistill_loop import TorchdistillLoop, reason_against

from kdcli import data
from kdcli.base import runtime
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note
from kdcli.data import Splits

SIDES = ("a", "b", "c", "d1", "d2", "d3")
SLOW = ("c", "d1")  # a teacher in every step
TOLERANCE = 1e-3  # relative, between two ways to compute the same loss in float32
TEST_IMAGES = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    args = _parse(arguments)
    report: dict[str, Any] = {"schema_version": 1}
    tell("loading")
    try:
        splits = data.load(args.data, cache_dir=args.cache_dir, on_event=_notes)
        with tempfile.TemporaryDirectory(prefix="kd-throughput-") as scratch:
            _measure_all(args, splits, Path(scratch), report)
    except KdError as error:
        tell(f"{error.message}\n{error.hint}")
        return error.exit_code
    finally:  # a long run that is stopped keeps what it has
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure_all(args: argparse.Namespace, splits: Splits, scratch: Path, report: dict[str, Any]) -> None:
    threads = set_threads(args.threads)
    chosen, left_out = _available(args.sides)
    for line in left_out:
        tell(line)
    pair = _pair(splits, args.images, args)
    report |= {
        "data": splits.label,
        "batch": BATCH,
        "images": len(pair.splits.train),
        "trained_on": len(pair.rows[0]),
        "rounds": args.rounds,
        "workers": args.workers,
        "threads": threads,
        "left_out": left_out,
        "environment": runtime.environment(),
        "versions": _versions(),
    }
    if args.rounds:
        sides, precision = _prepare(args, pair, chosen, scratch)
        report["precision"] = precision
        report["losses"] = _compare_losses(pair, sides)
        measured = _rounds(sides, args.rounds, args.threads, precision)
        report |= summary(sides, measured, training_flops(pair))
        print(table(report), flush=True)
    if args.profile:
        set_threads(args.threads)
        print(BareStep(pair, precision=report.get("precision", args.precision)).profile(), flush=True)


def _pair(splits: Splits, images: int, args: argparse.Namespace) -> Pair:
    """The pair on this many train images, all if 0; the test that ends each run of kd is kept short."""
    train = cut(splits.train, images) if images else splits.train
    shortened = Splits(splits.spec, splits.label, train, cut(splits.test, TEST_IMAGES))
    return Pair(shortened, args.teacher, args.val_fraction)


def _available(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sides that can run, and a line for each that cannot."""
    reasons = {key: reason_against(key) for key in wanted if key.startswith("d")}
    lines = [reason for reason in reasons.values() if reason]
    return [key for key in wanted if not reasons.get(key)], lines


def _prepare(
    args: argparse.Namespace, pair: Pair, chosen: Sequence[str], scratch: Path
) -> tuple[list[Side], str]:
    """The sides, and the precision that (a) has settled on for (a) and (b); not warmed up but for (a)."""
    rows = pair.rows[0]
    some = rows[spread(len(rows), args.slow_images)]
    precision = "32" if args.precision == "auto" else args.precision
    sides: list[Side] = []
    for key in chosen:
        if key == "a":
            tell("warming up a: the teacher's outputs, once")
            loop = KdLoop(pair, scratch, threads=args.threads, precision=args.precision)
            loop.warm_up()
            precision = loop.precision
            sides.append(loop)
        elif key == "b":
            sides.append(BareStep(pair, precision=precision))
        elif key == "c":
            sides.append(NaiveLoop(pair, some, args.workers))
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


def _settle(side: Side, threads: int) -> None:
    """Threads, and malloc as the side finds it: kd tells it to keep freed memory, the others do not.

    What they find is where glibc's own adaptation to large blocks ends.
    """
    set_threads(threads)
    if side.key in ("a", "b"):
        runtime.keep_freed_memory()
    elif sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def _rounds(sides: Sequence[Side], rounds: int, threads: int, precision: str) -> Measured:
    measured = Measured({side.key: [] for side in sides})
    dtypes = [torch.float32, torch.bfloat16] if precision == "bf16" else [torch.float32]
    for side in sides:
        if not isinstance(side, KdLoop):
            tell(f"warming up {side.key}: {side.label}")
            _settle(side, threads)
            side.warm_up()
    for number in range(rounds):
        turn = number % max(1, len(sides))
        for side in (*sides[turn:], *sides[:turn]):
            _settle(side, threads)
            timing = side.round()
            measured.timings[side.key].append(timing)
            tell(f"round {number + 1}/{rounds}, {side.key}: {timing.images_per_s:.0f} images/s")
        set_threads(threads)
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            measured.peaks.setdefault(name, []).append(matmul_peak(dtype))
    return measured


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchvision", "pillow", "numpy", "torchdistill"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _notes(event: Event) -> None:
    if isinstance(event, Note):
        tell(event.text)


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
    add("--sides", type=_sides, default=list(SIDES), help="by default all: " + ",".join(SIDES))
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
        help="of a and b; auto: what kd chooses in a, and 32 without a",
    )
    add("--cache-dir", type=Path, default=Path("cache"), help="packed images")
    add("--profile", action="store_true", help="the bare step's costliest operators")
    add("--json", type=Path, help="write every number to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
