"""The runs of a comparison, and the `comparison.toml` that records it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Collection, Mapping
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
from kdcli.engine.identity import decisive_settings
from kdcli.engine.plan import check, resolve
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig

PER_RUN = ("method", "seed", "name", "runs_dir")
_MAX_NAME = 80


class CommonSettings(Settings):
    """Settings determined once for all runs."""

    threads: Annotated[int, Field(strict=True, ge=1, le=1024)]
    precision: Literal["32", "bf16"]


class _Document(Settings):
    """A comparison.toml."""

    methods: tuple[str, ...]
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**63)], ...]
    baseline: str
    train: dict[str, Any]
    common: CommonSettings
    inputs: dict[str, str]


@dataclass(frozen=True)
class PlannedRun:
    """One run, with the settings of an ordinary `kd train`."""

    config: TrainConfig

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.config.runs_dir / self.config.name)

    @property
    def label(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    def is_started(self) -> bool:
        """Whether its folder exists.

        Raises:
            UsageError: the run in it has other settings.
        """
        if not self.run_dir.config_file.is_file():
            return False
        own, stored = map(decisive_settings, (resolve(self.config), self.run_dir.read_config()))
        name = _first_difference(own, stored)
        if name is not None:
            raise UsageError(
                f"{self.run_dir.path} is not a run of this comparison: its {_flag(name)} differs",
                "Move it away, and it will be trained anew.",
            )
        return True

    def is_finished(self) -> bool:
        """Whether it has a result."""
        return self.is_started() and self.run_dir.result_file.is_file()


@dataclass(frozen=True)
class Plan:
    """A comparison's settings.

    Attributes:
        folder: the comparison's folder.
        methods: in the order of the table.
        seeds: of each method.
        baseline: the method that the others are compared with.
        train: settings of all runs; its method and seed are not used.
        common: `precision` and `threads` of all runs; None before the first start.
        inputs: SHA-256 of data, teacher, student and own methods; None before the first start.
    """

    folder: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    train: TrainConfig
    common: CommonSettings | None = None
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
        """The command that continues it; empty with a method of one's own, which has to be typed again."""
        if any(map(methods.is_custom, self.methods)):
            return ""
        return f"kd compare --resume {shlex.quote(self.folder.as_posix())}"

    @property
    def each(self) -> tuple[TrainConfig, ...]:
        """The settings of one run of each method."""
        return tuple(self._config(name, 0) for name in self.methods)

    @property
    def needs_teacher(self) -> bool:
        return any(methods.objective(config).needs_teacher for config in self.each)

    @cached_property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All methods of a seed before the next seed, so that an interrupted comparison is balanced."""
        return tuple(PlannedRun(self._config(name, seed)) for seed in self.seeds for name in self.methods)

    def _config(self, method: str, seed: int) -> TrainConfig:
        own = {
            "method": method,
            "seed": seed,
            "name": f"{_folder_name(method)}-seed{seed}",
            "runs_dir": self.folder / "runs",
            "weight": tuple(text for text in self.train.weight if _term(text) in _terms(method)),
        }
        common = self.common.model_dump() if self.common else {}
        return self.train.model_copy(update={**common, **own})

    def check(self) -> None:
        """Check everything that can be wrong before training.

        Raises:
            UsageError: unknown methods, or settings that do not go together.
            KdError: a teacher is missing.
        """
        for name in self.methods:
            methods.parse(name)
        if self.baseline not in self.methods:
            raise UsageError(
                f"--baseline {self.baseline} is not compared", f"It is one of {', '.join(self.methods)}."
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
                "pass it with --teacher.",
            )

    def save(self) -> None:
        """Write comparison.toml."""
        document = {
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "train": self.train.model_dump(mode="json", exclude={*PER_RUN}, exclude_none=True),
            "common": self.common.model_dump() if self.common else {},
            "inputs": dict(self.inputs or {}),
        }
        write_text(self.file, tomli_w.dumps(document))

    @classmethod
    def load(cls, folder: Path, typed: Collection[str] = ()) -> Plan:
        """The comparison recorded in a folder.

        Args:
            typed: methods on the command line: methods of one's own have to be among them.

        Raises:
            KdError: there is none, or it cannot be read.
            UsageError: it names a method of one's own that was not typed.
        """
        path = folder / "comparison.toml"
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KdError(
                f"{folder} is not a comparison", "Pass a folder that kd compare has made."
            ) from None
        except OSError as error:
            raise KdError(f"cannot read {path}: {reason(error)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KdError(f"{path} is not TOML: {error}", "Start the comparison anew.") from error
        try:
            stored = make(_Document, document)
            per_run = next((name for name in PER_RUN if name in stored.train), None)
            if per_run is not None:
                raise UsageError(f"train has {per_run}, which differs between runs")
            train = make(TrainConfig, stored.train)
        except UsageError as error:
            raise KdError(f"{path}: {error.message}", "Start the comparison anew.") from error
        code = next((name for name in stored.methods if methods.is_custom(name) and name not in typed), None)
        if code is not None:
            raise UsageError(
                f"{path} names a method that is code, {code}, which runs only if it is typed",
                "If it is yours, continue by the command that started the comparison: "
                f"--methods …,{code} --name {folder.name}",
            )
        plan = cls(folder, stored.methods, stored.seeds, stored.baseline, train, stored.common, stored.inputs)
        plan.check()
        return plan

    def as_started(self) -> Plan:
        """This comparison with what its folder records, if it was started before.

        Raises:
            UsageError: it was started with other settings.
        """
        if not self.file.exists():
            return self
        stored = Plan.load(self.folder, self.methods)
        own, recorded = self._fixed(), stored._fixed()
        name = _first_difference(own, recorded)
        if name is not None:
            resume = stored.resume_command or "the command that started it"
            raise UsageError(
                f"{self.folder} was started with {_flag(name)} {_value(recorded.get(name))}, "
                f"not {_value(own.get(name))}",
                f"Choose another --name; {resume} continues it as it is.",
            )
        return replace(stored, train=self.train)

    def _fixed(self) -> dict[str, Any]:
        """Settings that cannot change once it has started."""
        train = {name: value for name, value in decisive_settings(self.train).items() if name not in PER_RUN}
        return {
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "threads": self.train.threads,
            "accelerator": self.train.accelerator,
            **train,
        }


def make_plan(settings: CompareConfig, train: Mapping[str, Any]) -> Plan:
    """The comparison for these settings.

    Args:
        train: settings of `kd train` that all runs share, as typed.

    Raises:
        UsageError: they do not go together.
        KdError: a teacher is missing.
    """
    # equal views for every seed, so that one teacher cache serves all of them
    config = make(TrainConfig, {"view_seed": 0, **train})
    names = settings.method_names
    baseline = settings.baseline or ("ce" if "ce" in names else names[0])
    source = Path(config.data)
    name = settings.name or _folder_name(f"{'-'.join(names)}-{config.student_name}-{source.name or 'data'}")
    plan = Plan(settings.out / name[:_MAX_NAME], names, settings.seed_numbers, baseline, config)
    plan.check()
    return plan


def _term(text: str) -> str:
    """The term of a --weight."""
    return text.partition("=")[0].strip()


def _terms(method: str) -> dict[str, None]:
    """Names of the terms of a method, in order."""
    return dict.fromkeys((methods.CE, *(part.name for part in methods.parse(method))))


def _first_difference(own: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    return next((name for name in {**stored, **own} if own.get(name) != stored.get(name)), None)


def _folder_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).strip(".-") or "_"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(value: Any) -> str:
    if value is None:
        return "at its default"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
