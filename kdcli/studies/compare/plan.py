"""The runs of a comparison, and the `comparison.toml` that records it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from kdcli import methods
from kdcli.base import code
from kdcli.base.config import CompareConfig, Settings, make, shell_command
from kdcli.base.config.settings import Seed
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import write_text
from kdcli.base.recipes import read_recipe
from kdcli.base.results import invalid
from kdcli.engine.identity import decisive_settings, differences
from kdcli.engine.plan import resolve
from kdcli.engine.run_dir import RunDir, found_from
from kdcli.methods import TrainConfig
from kdcli.teacher import Teacher

PER_RUN = {"method", "seed", "name", "runs_dir"}
_MAX_NAME = 80


def run_of(config: TrainConfig) -> RunDir:
    """The run with these settings; UsageError if its folder has a run with others."""
    run = RunDir.of(config)
    if run.config_file.is_file() and (
        changed := differences(*map(decisive_settings, (run.read_config(), resolve(config))))
    ):
        raise UsageError(
            f"{run.path} is not a run of this comparison: {changed[0]}",
            "Move it away, and it will be trained anew.",
        )
    return run


class CommonSettings(Settings, strict=True):
    """Settings that are measured or derived once, for all runs."""

    precision: Literal["32", "bf16"]
    threads: int
    batch_size: int


class Plan(Settings):
    """A comparison's settings; all but the folder are stored in `comparison.toml`.

    `inputs` are SHA-256 of data, teacher, student and custom methods; empty before the first start.
    """

    folder: Path
    methods: tuple[str, ...]
    seeds: tuple[Seed, ...]
    baseline: str
    train: TrainConfig  # settings of all runs; its method and seed are not used
    common: CommonSettings | None = None  # None before the first start
    inputs: dict[str, str] = Field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "comparison.toml"

    @property
    def result_file(self) -> Path:
        return self.folder / "comparison.json"

    @property
    def resume_command(self) -> str:
        """The command that continues it; empty with the user's own method or module, to be passed again."""
        if any(map(methods.is_custom, self.methods)) or code.is_module(self.train.student):
            return ""
        return shell_command("compare", {"resume": self.folder})

    @property
    def each(self) -> tuple[TrainConfig, ...]:
        """The settings of one run of each method."""
        return tuple(self._config(name, 0) for name in self.methods)

    @property
    def runs(self) -> tuple[TrainConfig, ...]:
        """All methods of a seed before the next seed, so that an interrupted comparison is balanced."""
        return tuple(self._config(name, seed) for seed in self.seeds for name in self.methods)

    def _config(self, method: str, seed: int) -> TrainConfig:
        own = {
            "method": method,
            "seed": seed,
            "name": f"{_folder_name(method)}-seed{seed}",
            "runs_dir": self.folder / "runs",
            "weight": tuple(text for text in self.train.weight if _term(text) in _terms(method)),
        }
        common = self.common.model_dump() if self.common else {}
        return make(TrainConfig, {**dict(self.train), **common, **own})

    def check(self) -> None:
        """Check everything that can be wrong before training: methods, settings, teachers."""
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
            resolve(config)
        if any(methods.objective(config).needs_teacher for config in self.each):
            Teacher.open(self.train.teacher, self.train.cache_dir)

    def save(self) -> None:
        skipped: Any = {"folder": True, "train": PER_RUN}
        write_text(self.file, tomli_w.dumps(self.model_dump(mode="json", exclude=skipped, exclude_none=True)))

    @classmethod
    def load(cls, folder: Path, typed: Collection[str] = ()) -> Plan:
        """The comparison recorded in a folder; UsageError if a custom method in it is not among those `typed`."""
        path = folder / "comparison.toml"
        if not path.is_file():
            raise KdError(f"{folder} is not a comparison", "Pass a folder that kd compare has made.")
        document = read_recipe(str(path))
        try:
            if isinstance(document.get("train"), dict):
                document["train"] = found_from(path, document["train"])
            plan = cls.model_validate({**document, "folder": folder})
        except ValidationError as error:
            raise KdError(f"{path}: {invalid(error)}", "Start the comparison anew.") from error
        if stray := PER_RUN & plan.train.model_fields_set:
            raise KdError(f"{path}: train: {', '.join(sorted(stray))} differs between runs")
        custom = next((name for name in plan.methods if methods.is_custom(name) and name not in typed), None)
        if custom is not None:
            raise UsageError(
                f"{path} names the custom method {custom}, which runs only if the command line names it",
                "If you trust its code, continue by the command that started the comparison: "
                f"--methods …,{custom} --name {folder.name}",
            )
        plan.check()
        return plan

    def as_started(self) -> Plan:
        """This comparison as recorded in its folder; UsageError if it was started with other settings.

        Methods may be added: Holm's p covers all. Seeds may not, as verdicts would depend on when to stop adding.
        """
        if not self.file.exists():
            return self
        stored = Plan.load(self.folder, self.methods)
        before, now = stored._fixed(), self._fixed()
        if set(stored.methods) <= set(self.methods):
            now["--methods"] = before["--methods"]
        if changed := differences(before, now):
            resume = stored.resume_command or "the command that started it"
            raise UsageError(
                f"{self.folder} was started with other settings: {changed[0]}",
                f"Choose another --name, or continue it as it is: {resume}",
            )
        return stored.model_copy(update={"train": self.train, "methods": self.methods})

    def _fixed(self) -> dict[str, Any]:
        """Settings that cannot change once it has started; weights are compared run by run."""
        return {
            "--methods": ",".join(self.methods),
            "--seeds": ",".join(map(str, self.seeds)),
            "--baseline": self.baseline,
            "--threads": self.train.threads,
            "--accelerator": self.train.accelerator,
            **decisive_settings(self.train, PER_RUN | {"weight"}),
        }


def make_plan(settings: CompareConfig, train: Mapping[str, Any]) -> Plan:
    """The comparison for these settings, and those of `kd train`, as typed, that all runs share; checked."""
    # equal views for every seed, so that one teacher cache serves all of them
    config = make(TrainConfig, {"view_seed": 0, **train})
    names = settings.methods
    baseline = settings.baseline or ("ce" if "ce" in names else names[0])
    source = Path(config.data)
    name = settings.name or _folder_name(f"{'-'.join(names)}-{config.student_name}-{source.name or 'data'}")
    plan = Plan(
        folder=settings.out / name[:_MAX_NAME],
        methods=names,
        seeds=settings.seeds,
        baseline=baseline,
        train=config,
    )
    plan.check()
    return plan


def _term(text: str) -> str:
    return text.partition("=")[0].strip()


def _terms(method: str) -> dict[str, None]:
    return dict.fromkeys((methods.CE, *(part.name for part in methods.parse(method))))


def _folder_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).strip(".-") or "_"
