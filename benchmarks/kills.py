"""Kill commands of kd at random moments, continue them, and compare their results with an uninterrupted run.

`python benchmarks/kills.py --kills 20` runs all scenarios; names select some. Each kill is a SIGKILL of the process
group, at a moment drawn uniformly from the duration of the uninterrupted command. Each copy of the inputs is killed
up to twice, then continued to the end: by `kd train --resume` if the run's folder exists, else by the same command.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from sklearn.datasets import load_digits

Digests = dict[str, str]
KILLS_OF_A_COPY = 2  # the command, and its continuation
TRAIN = "--name x --threads 1 --precision 32 --teacher-precision 32 --lr 3e-3"
DIGITS = "--data digits --teacher teacher.pt"


@dataclass(frozen=True)
class Scenario:
    """A command, the digests of its results by name, and its further inputs."""

    command: str
    results: Callable[[Path], Digests]
    make_inputs: Callable[[Path], None] = lambda folder: None


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of a plain value as JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()


def runs(folder: Path) -> Digests:
    """Each run's tensors, figures and metrics, without times."""
    found = {}
    for path in sorted(folder.glob("**/student.pt")):
        name = path.parent.relative_to(folder).as_posix()
        tensors = torch.load(path, weights_only=True)["state_dict"]
        parts = [(key, str(value.dtype), digest(value.numpy().tobytes())) for key, value in tensors.items()]
        lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        result = json.loads((path.parent / "result.json").read_text())
        found[f"{name}/student.pt"] = digest(parts)
        found[f"{name}/metrics.jsonl"] = digest([without_times(line) for line in lines])
        found[f"{name}/result.json"] = digest([result["test"], result["resumed_with_differences"]])
    return found


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("seconds", "images_per_s")}


def files(folder: Path, pattern: str) -> Digests:
    """Files by name; the key of a cached folder depends on the times of its sources."""
    return {path.name: digest(path.read_bytes()) for path in sorted(folder.glob(pattern))}


def comparison(folder: Path) -> Digests:
    [path] = folder.glob("comparisons/x/comparison.json")
    return {**runs(folder), "standings": digest(json.loads(path.read_text())["standings"])}


def study(folder: Path) -> Digests:
    """The best trial and its student, the values and accuracies of all."""
    result = json.loads((folder / "stdout").read_text())
    trials = [[trial[key] for key in ("state", "values", "accuracy")] for trial in result["trials"]]
    best = [result["best"][key] for key in ("values", "accuracy")]
    students = sorted(value for name, value in runs(folder).items() if name.endswith("student.pt"))
    return {"best": digest(best), "trials": digest(trials), "students": digest(students)}


def make_photos(folder: Path) -> None:
    """900 photos of three sizes, four classes."""
    random = np.random.default_rng(0)
    for number in range(900):
        split, side = ("test" if number % 6 == 0 else "train"), (200, 260, 320)[number % 3]
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / "photos" / split / f"class-{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side + 20), Image.Resampling.BICUBIC).save(path)


def make_archive(folder: Path) -> None:
    """9,000 noisy train digits, three parts of a view, and 100 test digits; packed."""
    bunch, random = load_digits(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as tree, tarfile.open(folder / "digits.tar", "w") as archive:
        for number in range(9100):
            which = number % len(bunch.images)
            noisy = 16 * bunch.images[which] + random.normal(0, 16, (8, 8))
            part = Path(tree, "train" if number < 9000 else "test", str(bunch.target[which]))
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(part / f"{number}.png")
        archive.add(tree, arcname=".")
    finish(folder, f"train {TRAIN} --data digits.tar --grey --method ce --student convnet-tiny --epochs 1")
    shutil.rmtree(folder / "runs")


SCENARIOS = {
    "train-kd": Scenario(
        f"train {TRAIN} {DIGITS} --method kd --student resnet8 --augment flip --epochs 7", runs
    ),
    "train-at": Scenario(
        f"train {TRAIN} {DIGITS} --method at --student resnet8 --epochs 5 --save-every 7steps", runs
    ),
    "train-mixup": Scenario(
        f"train {TRAIN} {DIGITS} --method kd --student resnet8 --augment flip-crop-mixup --epochs 6 --keep 3",
        runs,
    ),
    "pack": Scenario(
        f"train {TRAIN} --data photos --image-size 48 --method ce --student convnet-tiny --epochs 1",
        lambda folder: {**files(folder, "cache/data/*/*.npy"), **runs(folder)},
        make_photos,
    ),
    "teacher-pass": Scenario(
        f"train {TRAIN} --data digits.tar --grey --teacher teacher.pt --method kd --student convnet-tiny "
        "--epochs 1 --augment flip-crop --views 3",
        lambda folder: {**files(folder, "cache/teacher/*/*.npy"), **runs(folder)},
        make_archive,
    ),
    "compare": Scenario(
        f"compare {TRAIN} {DIGITS} --methods ce,kd,fitnet --seeds 2 --student convnet-tiny --epochs 3",
        comparison,
    ),
    "tune": Scenario(
        f"tune {TRAIN.replace('--name', '--study')} {DIGITS} --student convnet-tiny --epochs 1 --trials 12 "
        "--tune tau=1:10 --tune lamda=0:1 --tune optimizer=adam|sgd --json",
        study,
    ),
    "export": Scenario(
        "export teacher.pt --int8 --with-preprocessing -o out/model.onnx",
        lambda folder: files(folder, "out/*.onnx"),
    ),
}


def start(folder: Path, command: str) -> subprocess.Popen[bytes]:
    """Start a command of kd in a folder, as the leader of a process group."""
    words = [sys.executable, "-m", "kdcli", *command.split()]
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("ab") as stderr:
        return subprocess.Popen(words, cwd=folder, stdout=stdout, stderr=stderr, start_new_session=True)


def finish(folder: Path, command: str) -> None:
    """Run a command to its end; a RuntimeError if it fails."""
    if start(folder, command).wait():
        last = (folder / "stderr").read_text().strip().splitlines()[-2:]
        raise RuntimeError(f"kd {command} in {folder}: {' '.join(last)}")


def is_killed(process: subprocess.Popen[bytes], after_s: float) -> bool:
    """Kill a process group after a time; whether it was still running."""
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_and_continue(folder: Path, command: str, moments: list[float]) -> int:
    """Kill a command and its continuations at these moments, in seconds, then finish it; the number of kills."""
    for hits, moment in enumerate(moments):
        if not is_killed(start(folder, command), moment):
            return hits
        if command.startswith("train") and (folder / "runs/x/config.toml").exists():
            command = "train --resume runs/x"
    finish(folder, command)
    return len(moments)


def check(name: str, place: Path, kills: int, random: np.random.Generator) -> bool:
    """Print a scenario's line; whether the results of each killed copy are those of an uninterrupted run."""
    scenario, inputs = SCENARIOS[name], place / name / "inputs"
    shutil.copytree(place / "inputs", inputs)
    scenario.make_inputs(inputs)
    whole = shutil.copytree(inputs, place / name / "uninterrupted")
    begin = time.monotonic()
    finish(whole, scenario.command)
    seconds, expected = time.monotonic() - begin, scenario.results(whole)
    hits = copies = equal = 0
    while hits < kills:
        folder = shutil.copytree(inputs, place / name / f"copy-{copies}")
        moments = random.uniform(0, seconds, min(KILLS_OF_A_COPY, kills - hits)).tolist()
        copies += 1
        try:
            hits += kill_and_continue(folder, scenario.command, moments)
            found = scenario.results(folder)
        except (OSError, ValueError, RuntimeError) as error:
            found = {"error": str(error)}
        if found == expected:
            equal += 1
            shutil.rmtree(folder)
        else:
            differing = [key for key in sorted({*expected, *found}) if expected.get(key) != found.get(key)]
            print(f"  {folder}: {found.get('error', ', '.join(differing))}; killed after {moments} s")
    print(
        f"{name:14}{seconds:5.1f} s, {len(expected):2} results; {hits} kills of {copies} copies; "
        f"equal {equal}/{copies}",
        flush=True,
    )
    return equal == copies


def main(
    scenarios: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SCENARIOS)}.")] = None,
    kills: Annotated[int, typer.Option(help="Kills of a running command, for each scenario.")] = 20,
    seed: int = 0,
) -> None:
    """Kill commands at random moments, continue them, and compare their results with uninterrupted ones."""
    place, random = Path(tempfile.mkdtemp(prefix="kills-")), np.random.default_rng(seed)
    (place / "inputs").mkdir()
    finish(place, f"train {TRAIN} --data digits --method ce --student resnet14 --epochs 3")
    shutil.copy2(place / "runs/x/student.pt", place / "inputs/teacher.pt")
    good = [check(name, place, kills, random) for name in scenarios or SCENARIOS]
    if not all(good):
        raise SystemExit(f"the differing copies are in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    typer.run(main)
