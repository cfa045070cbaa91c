"""Fuzz readers, by atheris where it is installed, else by random mutations of good files.

python -m tests.fuzz.run [--seconds 30] [--driver atheris|random] [--seed 0] [TARGET ...]

One line for each target says how many inputs were read; a find is written to ./crash-<target>-… and ends the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXTREMES = (b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4), b"\0\0\0\x80", b"9" * 4)


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """A few changes of the kinds that break parsers."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 17)]
        elif kind == 3:
            changed[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 4:
            changed[at:at] = changed[at : at + chance.randrange(1, 65)]
        elif kind == 5:
            changed[at : at + 4] = chance.choice(EXTREMES)
        else:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[at:at] = other[start : start + chance.randrange(1, 65)]
    return bytes(changed)


def at_random(name: str, seconds: float, seed: int) -> int:
    """Mutate good files for a while; returns how many inputs were read."""
    from tests.fuzz.targets import TARGETS, seeds

    chance, pool = random.Random(seed), seeds(name)
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        data = mutated(chance.choice(pool), chance, pool)
        count += 1
        started = time.monotonic()
        try:
            TARGETS[name](data)
        except BaseException:
            _keep(name, data, count)
            raise
        if time.monotonic() - started > 20:
            _keep(name, data, count)
            raise SystemExit(f"{name}: an input took more than 20 s")
        if len(pool) < 200 and count % 50 == 0 and len(data) < 20_000:
            pool.append(data)
    return count


def _keep(name: str, data: bytes, count: int) -> None:
    path = Path(f"crash-{name}-{count}")
    path.write_bytes(data)
    print(f"{name}: input {count} is in {path}", file=sys.stderr)


def by_atheris(name: str, seconds: int, seed: int) -> None:
    """Guided by coverage; libFuzzer says at its end how many inputs there were, and does not return."""
    import atheris

    with atheris.instrument_imports(include=["kdcli", "tarfile", "zipfile"]):
        from tests.fuzz.targets import TARGETS, seeds

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds(name)):
            Path(corpus, str(number)).write_bytes(data)
        options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup(
            [sys.argv[0], *options, "-max_len=65536", f"-artifact_prefix=crash-{name}-", corpus],
            TARGETS[name],
        )
        atheris.Fuzz()


def main() -> None:
    """Each target in a process of its own, so that a crash of one is seen and the others run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--driver", choices=("atheris", "random"), default=None)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    driver = options.driver or ("atheris" if importlib.util.find_spec("atheris") else "random")
    if options.here:
        (name,) = options.targets
        if driver == "atheris":
            by_atheris(name, options.seconds, options.seed)
        else:
            print(f"{name}: {at_random(name, options.seconds, options.seed):,} inputs, no find", flush=True)
        return
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in options.targets or TARGETS:
        words = [
            name,
            "--here",
            f"--seconds={options.seconds}",
            f"--seed={options.seed}",
            f"--driver={driver}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.run", *words], capture_output=True, text=True
        )
        told = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "inputs" in line or line.startswith("Done ")
        ]
        print(f"{name} ({driver}): {told[-1] if told else 'no count'}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stderr[-4000:], file=sys.stderr, flush=True)
    sys.exit(f"found something: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
