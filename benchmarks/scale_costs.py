"""Estimated cost of ImageNet-1k and ImageNet-22k, from the measurements below: the tables of docs/scale.md.

Everything is linear in multiply-accumulates and in images.
"""

from __future__ import annotations

from typing import Any

SETS = {"ImageNet-1k": (1_281_167, 1_000), "ImageNet-22k": (14_197_122, 21_841)}
SIDE = 224
TEACHER_MACS, STUDENT_MACS = 4.1e9, 1.8e9  # ResNet-50 and ResNet-18 at 224×224
EPOCHS, VIEWS = 100, 8
DEVICES = (1, 8, 64)
KEPT = 0.9  # share of the speed at each doubling of devices: an assumption
MEASURED: list[dict[str, Any]] = [
    {
        "device": "Two cores of a Xeon at 2.5 GHz, float32",
        "source": "NIN in onnxruntime 360 images/s (222 M multiply-accumulates), LeNet through kd train 902 images/s "
        "(27 M)",
        "teacher": {"images_per_s": 360, "macs": 222e6},
        "student": {"images_per_s": 902, "macs": 27e6},
    },
    {
        "device": "One H100",
        "source": "NIN in torch, float32, batch 4096: 123,000 images/s; NIN trained by kd train, bf16, batch 256: "
        "29,256 images/s",
        "teacher": {"images_per_s": 123000, "macs": 222e6},
        "student": {"images_per_s": 29256, "macs": 222e6},
    },
]


def cache_bytes(images: int, classes: int, top_k: int = 0) -> int:
    """Of one view: float16 logits, or K of them with their classes and the rest's log-sum-exp."""
    if not top_k:
        return images * classes * 2
    return images * (top_k * (2 + (2 if classes <= 1 << 16 else 4)) + 4)


def hours(images: float, macs: float, macs_per_s: float, devices: int) -> float:
    """Of a pass over so many images."""
    speed = macs_per_s * devices * KEPT ** (devices.bit_length() - 1)
    return images * macs / speed / 3600


def table(figures: dict[str, Any]) -> None:
    """Teacher's and student's hours on one kind of device."""
    teacher, student = (
        figures[who]["images_per_s"] * figures[who]["macs"] for who in ("teacher", "student")
    )  # multiply-accumulates of a forward pass a second; the student's figure includes its backward pass
    print(f"\n{figures['device']}: {figures['source']}\n")
    print(
        f"| data | devices | teacher, {VIEWS} views, h | student, {EPOCHS} epochs, h | teacher in each step, h |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (images, _) in SETS.items():
        for devices in DEVICES:
            cached = hours(images * VIEWS, TEACHER_MACS, teacher, devices)
            trained = hours(images * EPOCHS, STUDENT_MACS, student, devices)
            live = hours(images * EPOCHS, TEACHER_MACS, teacher, devices)
            print(f"| {name} | {devices} | {cached:,.1f} | {trained:,.1f} | {live:,.1f} |")


def main() -> None:
    """Print the tables as markdown."""
    print("| data | images | packed, GB | cache a view, GB | top 100 | top 10 | views | cache, GB | top 10 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (images, classes) in SETS.items():
        sizes = [cache_bytes(images, classes, k) / 1e9 for k in (0, 100, 10)]
        print(
            f"| {name} | {images:,} | {images * SIDE * SIDE * 3 / 1e9:,.0f} | {sizes[0]:,.1f} | {sizes[1]:,.2f} "
            f"| {sizes[2]:,.2f} | {VIEWS} | {VIEWS * sizes[0]:,.0f} | {VIEWS * sizes[2]:,.1f} |"
        )
    for figures in MEASURED:
        table(figures)


if __name__ == "__main__":
    main()
