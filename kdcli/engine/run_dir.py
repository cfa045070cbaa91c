"""`runs/<name>/`: the files of a run."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from kdcli import methods
from kdcli.base import code
from kdcli.base.config import make, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import expand, locked, publish, recorded_path, scratch_folder, write_json, write_text
from kdcli.base.recipes import read_recipe
from kdcli.base.text import reason
from kdcli.data.datasets import DATASETS
from kdcli.methods import TrainConfig
from kdcli.models.checkpoint import Checkpoint, save

# The run's location is not stored in its config.toml, which can thus serve as a recipe for other runs.
PLACE = {"name", "runs_dir"}


@dataclass
class RunDir:
    """Paths and files of one run."""

    path: Path

    def __post_init__(self) -> None:
        self.config_file = self.path / "config.toml"
        self.chain_file = self.path / "chain.toml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.student = self.path / "student.pt"
        self.result_file = self.path / "result.json"

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        environment: dict[str, Any],
        filled: Sequence[str],
        chain: TrainConfig | None,
    ) -> RunDir:
        """Create the folder, named by the user (a UsageError if taken), or by method, student and a free number.

        It is renamed into place with settings and environment in it, so a killed run can always be resumed. `filled`:
        settings that were derived from others; `chain`: those of the chain that this run is a link of.
        """
        made: RunDir | None = None
        try:
            made = cls(scratch_folder(config.runs_dir))
            # the settings as TOML; `kd train --recipe` repeats them, see `recipes.read_recipe`
            values = config.model_dump(mode="json", exclude=PLACE, exclude_none=True)
            write_text(made.config_file, tomli_w.dumps({**values, "filled": list(filled)}))
            write_json(made.environment_file, {"schema_version": 1, **environment})
            if chain is not None:
                write_text(made.chain_file, tomli_w.dumps(chain.model_dump(mode="json", exclude_none=True)))
            number = 1
            while True:
                path = config.runs_dir / (config.name or name_of(config, number))
                try:
                    publish(made.path, path)
                    return cls(path)
                except OSError:
                    if not path.exists():
                        raise
                    cls.check_free(config)
                    number += 1
        except OSError as error:
            message = f"cannot make a run in {config.runs_dir}: {reason(error)}"
            raise KdError(message, "Choose another --runs-dir.") from error
        finally:
            if made is not None:
                shutil.rmtree(made.path, ignore_errors=True)

    @staticmethod
    def check_free(config: TrainConfig) -> None:
        """Raise UsageError if the name is taken: checked before the teacher's passes."""
        if config.runs_dir.exists() and not config.runs_dir.is_dir():
            raise UsageError(f"--runs-dir {config.runs_dir} is not a folder", "Choose another.")
        run = RunDir.of(config)
        if config.name and run.path.exists():
            hint = "Choose another --name"
            if run.config_file.is_file():
                hint += f", or continue it: {resume_command(run.path, config)}"
            raise UsageError(f"run {config.name} exists in {config.runs_dir}", hint)

    @classmethod
    def of(cls, config: TrainConfig) -> RunDir:
        """The run of these settings, by its name."""
        return cls(config.runs_dir / config.name)

    @classmethod
    def existing(cls, path: Path) -> RunDir:
        """An existing run; a KdError if the folder has no `config.toml`."""
        run = cls(path)
        if not run.config_file.is_file():
            raise KdError(f"not a run folder: {path}", "Pass a folder inside runs/.")
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training this run (a UsageError there) until this process ends in any way."""
        holder = self.path / "lock.holder"

        def refuse() -> NoReturn:
            number = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
            raise UsageError(
                f"{self.path} is in use: process {number} trains it",
                "Wait until it ends, or stop it and rerun the same command.",
            )

        with locked(self.path / "lock", refuse):
            try:
                with suppress(OSError):  # a full disk: the lock counts
                    holder.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
                yield
            finally:
                holder.unlink(missing_ok=True)

    def saved(self) -> list[Path]:
        """Existing saved states, newest first: last.pt, then last-<step>.pt."""
        older = sorted(self.path.glob("last-*.pt"), reverse=True)
        return [path for path in (self.last, *older) if path.exists()]

    def save_state(self, state: Checkpoint, keep: int, before: int | None) -> None:
        """Write last.pt; the previous one stays as last-<step>.pt, up to `keep` states in all.

        A complete last.pt exists at every moment: the old one is linked to its second name first. `before`: its step;
        None without a readable one.
        """
        if before is not None and keep > 1:
            with suppress(OSError):  # it exists, or the file system has no links: one state less
                os.link(self.last, self.path / f"last-{before:09d}.pt")
        save(self.last, state)
        for path in sorted(self.path.glob("last-*.pt"), reverse=True)[keep - 1 :]:
            path.unlink(missing_ok=True)

    def read_config(self) -> TrainConfig:
        """The run's settings, with its present name and location."""
        values = found_from(self.config_file, read_recipe(str(self.config_file)))
        return make(TrainConfig, {**values, "name": self.path.name, "runs_dir": self.path.parent})

    def read_chain(self) -> TrainConfig | None:
        """Settings of the chain that this run is a link of, with its present location; None if it is no link."""
        if not self.chain_file.is_file():
            return None
        values = found_from(self.chain_file, read_recipe(str(self.chain_file)))
        return make(TrainConfig, {**values, "runs_dir": self.path.parent})


def found_from(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of kd train that a file records, with the paths of inputs as they are found from it."""

    def found(value: Any) -> Any:
        if not isinstance(value, str) or "\0" in value:
            return value
        path = recorded_path(expand(value), file)
        return value if path == expand(value) else str(path)

    named = {
        "unlabelled",
        "data_dir",
        "cache_dir",
        "student_weights",
        "teacher_class_names",
        "teacher_class_map",
    }
    paths = {name: found(values[name]) for name in named & values.keys()}
    if str(values.get("data")) not in DATASETS:
        paths["data"] = found(values.get("data"))
    if str(values.get("student")).lower().endswith(".pt"):
        paths["student"] = found(values["student"])
    if isinstance(teachers := values.get("teacher"), list):
        paths["teacher"] = [found(path) for path in teachers]
    return {**values, **{name: path for name, path in paths.items() if path is not None}}


def name_of(config: TrainConfig, number: int) -> str:
    """Name of a run that the user has not named."""
    return f"{config.method_name}-{config.student_name}-{number}"


def resume_command(run: Path, config: TrainConfig) -> str:
    """Command that resumes a run; it repeats a method that is code, because no file may name code."""
    if code.is_module(config.student):
        return f"kd.distill(resume={run.as_posix()!r})"
    method = config.method if methods.is_custom(config.method) else None
    return shell_command("train", {"resume": run, "method": method})
