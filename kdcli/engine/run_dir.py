"""`runs/<name>/`: everything a run leaves behind."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from kdcli.config import TrainConfig, make
from kdcli.errors import KdError, UsageError
from kdcli.files import scratch_folder, write_json, write_text
from kdcli.recipes import read_recipe

# Where the run lies is not part of what it computes: the file can be used as a recipe for another run.
_PLACE = {"name", "runs_dir"}


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run."""

    path: Path

    @classmethod
    def create(cls, config: TrainConfig, environment: dict[str, Any], filled: Sequence[str] = ()) -> RunDir:
        """Make a new folder, named by the user or by method, student and the next free number.

        It gets its name with settings and environment in it: whenever a run is killed, it can be resumed.

        Args:
            config: the settings, resolved.
            environment: what `environment.json` says.
            filled: names of settings that were not typed but resolved from others.

        Raises:
            UsageError: the name is taken.
            KdError: the folder cannot be made.
        """
        made: RunDir | None = None
        try:
            made = cls(scratch_folder(config.runs_dir))
            made.write_config(config, filled)
            write_json(made.environment_file, {"schema_version": 1, **environment})
            made.path.chmod(0o755)
            number = 1
            while True:
                path = config.runs_dir / (config.name or f"{config.method}-{config.student}-{number}")
                try:
                    made.path.rename(path)  # never onto a folder that holds anything
                except OSError:
                    if not path.exists():
                        raise
                    if config.name:
                        raise _taken(config) from None
                    number += 1
                else:
                    return cls(path)
        except OSError as error:
            raise KdError(
                f"cannot make a run in {config.runs_dir}: {error.strerror or error}",
                "Choose another --runs-dir.",
            ) from error
        finally:
            if made is not None:
                shutil.rmtree(made.path, ignore_errors=True)

    @staticmethod
    def check_free(config: TrainConfig) -> None:
        """Raise UsageError if the name is taken: better now than after the teacher's passes."""
        if config.runs_dir.exists() and not config.runs_dir.is_dir():
            raise UsageError(f"--runs-dir {config.runs_dir} is not a folder", "Choose another.")
        if config.name and (config.runs_dir / config.name).exists():
            raise _taken(config)

    @classmethod
    def existing(cls, path: Path) -> RunDir:
        """A run that is there.

        Raises:
            KdError: it is not, or it has nothing to continue from.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise KdError(f"{path} is not a run", "Name a folder below runs/ that kd train has made.")
        return run

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def student(self) -> Path:
        return self.path / "student.pt"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    def write_config(self, config: TrainConfig, filled: Sequence[str]) -> None:
        """The resolved settings as TOML; `kd train --config` repeats them (see `recipes.read_recipe`)."""
        values = config.model_dump(mode="json", exclude=_PLACE, exclude_none=True)
        values["filled"] = list(filled)
        write_text(self.config_file, tomli_w.dumps(values))

    def read_config(self) -> TrainConfig:
        """The settings this run was started with, with its own place filled in."""
        values = read_recipe(str(self.config_file))
        return make(TrainConfig, {**values, "name": self.path.name, "runs_dir": self.path.parent})

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one JSON line."""
        with self.metrics_file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def cut_metrics(self, epochs: int) -> None:
        """Drop lines of epochs that a resumed run will do again."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["epoch"] <= epochs]
        write_text(self.metrics_file, "".join(line + "\n" for line in kept))

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.result_file, {"schema_version": 1, **result})


def _taken(config: TrainConfig) -> UsageError:
    path = config.runs_dir / config.name
    more = f", or continue it: kd train --resume {shlex.quote(path.as_posix())}"
    return UsageError(
        f"run {config.name} exists in {config.runs_dir}",
        f"Choose another --name{more if RunDir(path).config_file.is_file() else ''}",
    )
