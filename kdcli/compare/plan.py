"""Which runs a comparison is made of, and the folder that remembers it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from kdcli import methods
from kdcli.config import CompareConfig, Settings, TrainConfig, make
from kdcli.engine.plan import resolve
from kdcli.engine.run_dir import PLACE, RunDir
from kdcli.errors import KdError, UsageError
from kdcli.files import write_text

EACH = ("method", "seed", "name", "runs_dir")  # what is each run's own
# what a run of the comparison may do otherwise than the others: it computes the same
_FREE = {"save_every", "keep", "tensorboard", "cache_dir", "data_dir"}
_LONGEST_NAME = 80


class _Stored(Settings):
    """A comparison.toml."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    train: dict[str, Any]
    settled: dict[str, str | int]
    inputs: dict[str, str]


@dataclass(frozen=True)
class PlannedRun:
    """One run, in the ordinary form of `kd train`."""

    config: TrainConfig

    @property
    def place(self) -> RunDir:
        return RunDir(self.config.runs_dir / self.config.name)

    @property
    def label(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    def is_begun(self) -> bool:
        """Whether its folder is there.

        Raises:
            UsageError: what is there was made with other settings.
        """
        if not self.place.config_file.is_file():
            return False
        mine, theirs = (
            config.model_dump(mode="json", exclude=PLACE)
            for config in (resolve(self.config), self.place.read_config())
        )
        name = next(_differing(mine, theirs), None)
        if name is not None:
            raise UsageError(
                f"{self.place.path} is not a run of this comparison: its {_flag(name)} differs",
                "Move it away; it is then made anew.",
            )
        return True

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_begun() and self.place.result_file.is_file()


@dataclass(frozen=True)
class Plan:
    """A comparison's settings.

    Attributes:
        folder: where it lies.
        methods: in the order of the table.
        seeds: that each method runs with.
        baseline: the method that the others are compared with.
        train: what all runs share; its method and seed mean nothing.
        settled: `precision` and `threads` where `train` leaves them open: the same for all runs, from the first on.
        inputs: fingerprints of data, teacher and student.
    """

    folder: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    train: TrainConfig
    settled: Mapping[str, str | int] | None = None
    inputs: Mapping[str, str] | None = None

    @property
    def file(self) -> Path:
        return self.folder / "comparison.toml"

    @property
    def result_file(self) -> Path:
        return self.folder / "comparison.json"

    @property
    def figure_file(self) -> Path:
        return self.folder / "figure.svg"

    @property
    def resume_command(self) -> str:
        return f"kd compare --resume {shlex.quote(self.folder.as_posix())}"

    @property
    def needs_teacher(self) -> bool:
        return any(
            methods.get(name).needs_teacher
            and set(methods.get(name).weights(self._config(name, 0))) != {"ce"}
            for name in self.methods
        )

    @cached_property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All methods of a seed before the next seed: a comparison that is stopped is balanced."""
        return tuple(PlannedRun(self._config(name, seed)) for seed in self.seeds for name in self.methods)

    def _config(self, method: str, seed: int) -> TrainConfig:
        own = {
            "method": method,
            "seed": seed,
            "name": f"{_folder_name(method)}-seed{seed}",
            "runs_dir": self.folder / "runs",
        }
        return self.train.model_copy(update={**own, **(self.settled or {})})

    def check(self) -> None:
        """Look at what can be wrong before anything is trained.

        Raises:
            UsageError: unknown methods, or settings that do not go together.
            KdError: there is no teacher.
        """
        for name in self.methods:
            methods.get(name)
        if self.baseline not in self.methods:
            raise UsageError(
                f"--baseline {self.baseline} is not compared", f"It is one of {', '.join(self.methods)}."
            )
        if len({_folder_name(name) for name in self.methods}) < len(self.methods):
            raise UsageError("two methods have the same folder's name", "Compare them one at a time.")
        if self.train.devices > 1:
            raise UsageError(
                "kd compare makes each run in one process",
                "Leave out --devices; --jobs makes several at a time.",
            )
        for name in self.methods:
            config = resolve(self._config(name, 0))
            methods.get(name).weights(config)
        missing = [path for path in self.train.teacher if not path.is_file()]
        if self.needs_teacher and missing:
            raise KdError(
                f"no teacher at {missing[0]}",
                "kd convert-caffe makes one from a Caffe network, kd train --method ce trains one; "
                "name it with --teacher.",
            )

    def save(self) -> None:
        """Write comparison.toml.

        Raises:
            KdError: it cannot be written.
        """
        document = {
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "train": _plain(self.train),
            "settled": dict(self.settled or {}),
            "inputs": dict(self.inputs or {}),
        }
        try:
            write_text(self.file, tomli_w.dumps(document))
        except OSError as error:
            raise KdError(
                f"cannot write {self.file}: {error.strerror or error}", "Choose another --out."
            ) from error

    @classmethod
    def load(cls, folder: Path, typed: Collection[str] = ()) -> Plan:
        """The comparison that a folder remembers.

        Args:
            typed: methods that the command line names: a method that is code has to be among them.

        Raises:
            KdError: there is none, or it cannot be read.
            UsageError: it names code that the user has not.
        """
        path = folder / "comparison.toml"
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KdError(f"{folder} is no comparison", "Name a folder that kd compare has made.") from None
        except OSError as error:
            raise KdError(f"cannot read {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KdError(f"{path} is not TOML: {error}", "Start the comparison anew.") from error
        try:
            stored = make(_Stored, document)
            train = make(TrainConfig, stored.train)
        except UsageError as error:
            raise KdError(f"{path}: {error.message}", "Start the comparison anew.") from error
        code = next((name for name in stored.methods if methods.any_own(name) and name not in typed), None)
        if code is not None:
            raise UsageError(
                f"{path} names a method that is code, {code}, and kd runs none because a file says so",
                f"If it is yours, go on by the command it was begun with: --methods …,{code} --name {folder.name}",
            )
        plan = cls(
            folder, stored.methods, stored.seeds, stored.baseline, train, stored.settled, stored.inputs
        )
        plan.check()
        return plan

    def as_begun(self) -> Plan:
        """This comparison as its folder has it, if it was begun before.

        Raises:
            UsageError: it was begun with other settings.
        """
        if not self.file.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise UsageError(f"{self.folder} is a file", "Choose another --name.")
            return self
        stored = Plan.load(self.folder, self.methods)
        mine, theirs = self._asked(), stored._asked()
        name = next(_differing(mine, theirs), None)
        if name is not None:
            raise UsageError(
                f"{self.folder} was begun with {_flag(name)} {_shown(theirs.get(name))}, "
                f"not {_shown(mine.get(name))}",
                f"Choose another --name; {stored.resume_command} goes on with it as it is.",
            )
        return replace(stored, train=self.train)

    def _asked(self) -> dict[str, Any]:
        own = {"methods": list(self.methods), "seeds": list(self.seeds), "baseline": self.baseline}
        return {**own, **_plain(self.train)}


def make_plan(settings: CompareConfig, train: Mapping[str, Any]) -> Plan:
    """The comparison that is asked for.

    Args:
        train: settings of `kd train` that its runs share, as typed.

    Raises:
        UsageError: they make no sense together.
        KdError: there is no teacher.
    """
    # the views are the same for every seed, so that what is kept of the teacher serves all of them
    config = make(TrainConfig, {"view_seed": 0, **train})
    names = settings.method_names
    baseline = settings.baseline or ("ce" if "ce" in names else names[0])
    source = Path(config.data)
    name = settings.name or _folder_name(f"{'-'.join(names)}-{config.student_name}-{source.name or 'data'}")
    plan = Plan(settings.out / name[:_LONGEST_NAME], names, settings.seed_numbers, baseline, config)
    plan.check()
    return plan


def _plain(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={*EACH}, exclude_none=True)


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in {**theirs, **mine}:
        if name not in _FREE and mine.get(name) != theirs.get(name):
            yield name


def _folder_name(text: str) -> str:
    """As one folder may be called anywhere."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).strip(".-") or "_"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    if value is None:
        return "as by default"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
