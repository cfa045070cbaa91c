"""Run folders by name and state, known without torch."""

from pathlib import Path
from typing import Literal, NoReturn

from kdcli.base import files

State = Literal["finished", "interrupted", "running"]
RUNS = Path("runs")
PLACES = (RUNS, Path("comparisons"))  # of folders that may be given by their name alone


def by_name(path: Path) -> Path:
    """A path; where nothing is there, the run or comparison of this name, if there is one."""
    return next((found for found in (path, *(place / path for place in PLACES)) if found.exists()), path)


def run_folders(place: Path = RUNS) -> list[Path]:
    """Folders of runs in a folder, without links; the last is that which was written to last."""
    found = [
        path
        for path in place.glob("*")
        if (path / "config.toml").is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]
    return sorted(found, key=lambda path: max(file.lstat().st_mtime for file in path.iterdir()))


def state(run: Path) -> State:
    """Whether a run has its result, and, if not, whether a process trains it."""
    if (run / "result.json").is_file():
        return "finished"
    return "running" if is_locked(run / "lock") else "interrupted"


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file."""

    def refuse() -> NoReturn:
        raise BlockingIOError

    try:
        if path.is_file():
            with files.locked(path, refuse):
                pass
    except BlockingIOError:
        return True
    except OSError:  # a read-only folder
        pass
    return False
