"""Folders of runs and caches: names, states and sizes, known without torch."""

import re
import shutil
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from kdcli.base import files
from kdcli.base.errors import KdError

State = Literal["finished", "interrupted", "running"]
RUNS = Path("runs")
PLACES = (RUNS, Path("comparisons"))  # of folders that may be given by their name alone


def by_name(path: Path) -> Path:
    """An existing path, else the run or comparison of this name, if there is one."""
    return next((found for found in (path, *(place / path for place in PLACES)) if found.exists()), path)


def run_folders(place: Path = RUNS) -> list[Path]:
    """Folders of runs in a folder, without links; the last is that which was written to last."""
    found = [
        path
        for path in place.glob("*")
        if (path / "config.toml").is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]
    records = ("config.toml", "metrics.jsonl", "result.json")  # other files may vanish meanwhile

    def written(run: Path) -> float:
        return max((run / name).stat().st_mtime for name in records if (run / name).is_file())

    return sorted(found, key=written)


def state(run: Path) -> State:
    """Whether a run has its result, and, if not, whether a process trains it."""
    if (run / "result.json").is_file():
        return "finished"
    return "running" if is_locked(run / "lock") else "interrupted"


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file."""
    from filelock import FileLock, Timeout

    try:
        if path.is_file():
            with FileLock(path, timeout=0):
                pass
    except Timeout:
        return True
    except OSError:  # a read-only folder
        pass
    return False


def document(path: Path) -> dict[str, Any]:
    """The values of a run's file; none where it is absent or damaged."""
    try:
        return files.read_document(path)
    except KdError:
        return {}


def all_runs() -> list[Path]:
    """Runs, and those of comparisons."""
    return [
        run for place in (RUNS, *sorted(Path("comparisons").glob("*/runs"))) for run in run_folders(place)
    ]


def saved_states(run: Path) -> list[Path]:
    """Files that serve to resume a run, none of them behind a link."""
    return [path for path in sorted(run.glob("last*.pt")) if _is_own(path, r"last(-\d+)?\.pt")]


def cache_entries(cache_dir: Path) -> dict[Path, list[Path]]:
    """Entries of a cache by folder: none behind a link, none that a process writes."""
    return {
        folder: [
            path
            for path in sorted(folder.glob("*"))
            if _is_own(path, r"[0-9a-f]{32}(\.pt)?") and not any(map(is_locked, path.glob("*.lock")))
        ]
        for folder in (cache_dir / name for name in ("data", "teacher", "teacher-sample", "preprocess"))
    }


def _is_own(path: Path, names: str) -> bool:
    """Whether a path has such a name, and no link leads to it."""
    return bool(re.fullmatch(names, path.name)) and not any(each.is_symlink() for each in path.parents)


def size_on_disk(path: Path) -> int:
    """Bytes of a file or of all files in a folder; links count as themselves."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return sum(each.lstat().st_size for each in chain((path,), inside) if each.is_symlink() or each.is_file())


def delete(path: Path) -> None:
    """Delete a file, a link or a folder; what links point to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
