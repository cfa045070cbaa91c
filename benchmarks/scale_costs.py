"""What ImageNet-1k and ImageNet-22k would cost, computed from figures measured elsewhere: see docs/scale.md.

    python benchmarks/scale_costs.py [--measured benchmarks/measured.json]

Everything is linear in multiply-accumulates and in images; what is measured, and where, is printed with the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SETS = {"ImageNet-1k": (1_281_167, 1_000), "ImageNet-22k": (14_197_122, 21_841)}
SIDE = 224
TEACHER_MACS, STUDENT_MACS = 4.1e9, 1.8e9  # ResNet-50 and ResNet-18 at 224×224
EPOCHS, VIEWS = 100, 8
DEVICES = (1, 8, 64)


def cache_bytes(images: int, classes: int, top_k: int = 0) -> int:
    """Of one view: float16 logits, or K of them with their classes and the rest's log-sum-exp."""
    if not top_k:
        return images * classes * 2
    return images * (top_k * (2 + (2 if classes <= 1 << 16 else 4)) + 4)


def hours(images: float, macs: float, macs_per_s: float, devices: int, kept: float) -> float:
    """Of a pass over so many images, on devices that keep a share `kept` of their speed at each doubling."""
    speed = macs_per_s * devices * kept ** (devices.bit_length() - 1)
    return images * macs / speed / 3600


def table(measured: dict[str, Any], device: str) -> None:
    """Teacher's and student's hours on one kind of device."""
    figures = measured[device]
    teacher, student = (
        figures[who]["images_per_s"] * figures[who]["macs"] for who in ("teacher", "student")
    )  # multiply-accumulates of a forward pass a second; the student's figure includes its backward pass
    kept = measured["kept_at_a_doubling"]
    print(f"\n{figures['what']}: {figures['source']}\n")
    print(
        f"| data | devices | teacher, {VIEWS} views, h | student, {EPOCHS} epochs, h | teacher in each step, h |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (images, _) in SETS.items():
        for devices in DEVICES:
            cached = hours(images * VIEWS, TEACHER_MACS, teacher, devices, kept)
            trained = hours(images * EPOCHS, STUDENT_MACS, student, devices, kept)
            live = hours(images * EPOCHS, TEACHER_MACS, teacher, devices, kept)
            print(f"| {name} | {devices} | {cached:,.1f} | {trained:,.1f} | {live:,.1f} |")


def main() -> None:
    """Print the tables as markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, default=Path(__file__).with_name("measured.json"))
    measured = json.loads(parser.parse_args().measured.read_text())
    print("| data | images | packed, GB | cache a view, GB | top 100 | top 10 | views | cache, GB | top 10 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (images, classes) in SETS.items():
        sizes = [cache_bytes(images, classes, k) / 1e9 for k in (0, 100, 10)]
        print(
            f"| {name} | {images:,} | {images * SIDE * SIDE * 3 / 1e9:,.0f} | {sizes[0]:,.1f} | {sizes[1]:,.2f} "
            f"| {sizes[2]:,.2f} | {VIEWS} | {VIEWS * sizes[0]:,.0f} | {VIEWS * sizes[2]:,.1f} |"
        )
    for device in ("cpu", "gpu"):
        table(measured, device)


if __name__ == "__main__":
    main()
