"""Which runs a comparison is made of, and the folder that remembers it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field

from kdcli import methods
from kdcli.base.config import CompareConfig, Settings, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import write_text
from kdcli.base.text import reason
from kdcli.engine.plan import check, resolve
from kdcli.engine.run_dir import PLACE, RunDir
from kdcli.methods import TrainConfig

EACH = ("method", "seed", "name", "runs_dir")  # what is each run's own
# what a run of the comparison may do otherwise than the others: it computes the same
_FREE = {"save_every", "keep", "tensorboard", "cache_dir", "data_dir"}
_LONGEST_NAME = 80


class Settled(Settings):
    """What is decided once for all runs: those that differ in it differ by more than their method."""

    threads: Annotated[int, Field(strict=True, ge=1, le=1024)]
    precision: Literal["32", "bf16"]


class _Stored(Settings):
    """A comparison.toml."""

    methods: tuple[str, ...]
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**63)], ...]
    baseline: str
    train: dict[str, Any]
    settled: Settled
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
        inputs: fingerprints of data, teacher, student and methods that are code.
    """

    folder: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    train: TrainConfig
    settled: Settled | None = None
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
        """What goes on with it; empty where a method is code, which only the command it was begun with names."""
        if any(map(methods.any_own, self.methods)):
            return ""
        return f"kd compare --resume {shlex.quote(self.folder.as_posix())}"

    @property
    def each(self) -> tuple[TrainConfig, ...]:
        """The settings of a run of each method."""
        return tuple(self._config(name, 0) for name in self.methods)

    @property
    def needs_teacher(self) -> bool:
        return any(methods.get(config.method).active(config).needs_teacher for config in self.each)

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
            "weight": tuple(text for text in self.train.weight if _term(text) in _terms(method)),
        }
        settled = self.settled.model_dump() if self.settled else {}
        return self.train.model_copy(update={**settled, **own})

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
        terms = dict.fromkeys(term for name in self.methods for term in _terms(name))
        stray = next((text for text in self.train.weight if _term(text) not in terms), None)
        if stray is not None:
            raise UsageError(
                f"--weight {stray}: none of these methods has such a term", f"They have {', '.join(terms)}."
            )
        for config in self.each:
            check(config)
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
            "settled": self.settled.model_dump() if self.settled else {},
            "inputs": dict(self.inputs or {}),
        }
        try:
            write_text(self.file, tomli_w.dumps(document))
        except OSError as error:
            raise KdError(f"cannot write {self.file}: {reason(error)}", "Choose another --out.") from error

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
            raise KdError(f"cannot read {path}: {reason(error)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KdError(f"{path} is not TOML: {error}", "Start the comparison anew.") from error
        try:
            stored = make(_Stored, document)
            each = next((name for name in EACH if name in stored.train), None)
            if each is not None:
                raise UsageError(f"train has {each}, which each run has of its own")
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
                "Choose another --name; "
                f"{stored.resume_command or 'the command it was begun with'} goes on with it as it is.",
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


def _term(text: str) -> str:
    """The term that a --weight is for."""
    return text.partition("=")[0].strip()


def _terms(method: str) -> dict[str, None]:
    """Names of the terms that a method may have, in order."""
    return dict.fromkeys((methods.CE, *(part.name for part in methods.get(method).parts)))


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
