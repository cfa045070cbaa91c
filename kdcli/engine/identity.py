"""Identity of a run: runs with equal settings, inputs and circumstances end with equal bits.

The one definition for resuming, chains, comparisons, searches and `kd reproduce`.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kdcli import methods, models
from kdcli.base import code, files, runs
from kdcli.base.config import option_flag
from kdcli.base.errors import KdError
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.deploy import load
from kdcli.engine.run_dir import PLACE
from kdcli.methods import TrainConfig

# Settings of storage, and of hardware: threads and devices change bits, and are recorded among the circumstances.
NEUTRAL = PLACE | {"cache_dir", "data_dir", "keep", "log_every", "save_every", "tensorboard"}
NEUTRAL |= {"accelerator", "devices", "threads"}
# Settings that name files: `input_hashes` has their content, wherever they lie
BY_CONTENT = {"data", "unlabelled", "teacher", "teacher_class_names", "teacher_class_map", "student_weights"}
_CIRCUMSTANCES = ("kd_version", "accelerator", "accelerator_name", "instructions", "threads", "processes")
_PACKAGES = ("torch", "torchvision", "timm", "numpy")


def decisive_settings(config: TrainConfig, without: Set[str] = frozenset()) -> dict[str, Any]:
    """The settings that decide what is computed, less those in `without`: JSON values by option."""
    values = config.model_dump(mode="json", exclude={*NEUTRAL, *without})
    return {option_flag(name): value for name, value in values.items()}


def input_hashes(
    config: TrainConfig,
    data: Splits,
    *,
    hashed: Mapping[Path, str] = MappingProxyType({}),
    missing: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """SHA-256 of a run's inputs, by name: images, teachers, student's file, the user's code.

    Files in `hashed` are not read again; `missing` are hashes for files that cannot be read, else a KdError.
    """
    found = {"train images": data.train.fingerprint, "test images": data.test.fingerprint}
    if data.unlabelled is not None:
        found["images without labels"] = data.unlabelled.fingerprint
    teachers = config.teacher if methods.objective(config).needs_teacher else ()
    paths = {
        f"teacher {number}" if len(teachers) > 1 else "teacher": path
        for number, path in enumerate(teachers, 1)
    }
    if config.student_file is not None:
        paths["student"] = config.student_file
    if config.student_weights is not None:
        paths["student weights"] = config.student_weights
    for name in ("class_names", "class_map") if teachers else ():
        if (path := getattr(config.teacher_inputs, name)) is not None:
            paths[name.replace("_", " ")] = path
    for name, path in paths.items():
        try:
            found[name] = hashed.get(path) or files.sha256_file(path)
        except OSError as error:
            if name not in missing:
                raise KdError(f"cannot read {path}: {reason(error)}", "Name a file that is there.") from error
            found[name] = missing[name]
    # as imported: the files may change meanwhile
    sources = methods.source_digests(config.method) | models.source_digests(config.student)
    for path in filter(Path.is_file, (*teachers, config.student_file or Path())):
        sources |= load.source_digests(path)
    return found | {f"code of {name}": sha256 for name, sha256 in sources.items()}


def recorded_inputs(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The same names and hashes from the untrusted provenance in a `student.pt`."""
    return {str(name): str(sha256) for name, sha256 in _mapping(provenance.get("inputs")).items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def circumstances(recorded: Any) -> dict[str, str]:
    """Versions and hardware on which the last bits depend, from an untrusted `environment.json`."""
    values = _mapping(recorded)
    packages = _mapping(values.get("packages"))
    found = {name: values.get(name) for name in _CIRCUMSTANCES}
    found |= {name: packages.get(name) for name in _PACKAGES}
    found["cpu"] = _mapping(values.get("cpu")).get("model")
    return {name: str(value) for name, value in found.items() if value is not None}


def recorded_circumstances(environment_file: Path) -> dict[str, str]:
    """`circumstances` from a run's `environment.json`; empty if it cannot be read."""
    return circumstances(runs.document(environment_file))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each name whose value changed; options of `before` that are no longer compared do not count."""
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and (name in now or not name.startswith("--"))
    ]


def check_unchanged(known: Mapping[str, str | None], now: Mapping[str, str | None], owner: str) -> None:
    """Raise KdError if an input of `owner`, a run's folder, changed since it was recorded, or is on one side only."""
    for name in {**known, **now}:
        if known.get(name) != now.get(name):
            if name.startswith("code of ") and now.get(name) is None:
                function = name.removeprefix("code of ")
                raise KdError(
                    f"{owner} needs {function}, which is code and runs only if you name it",
                    f"If you trust its code: export {code.ALLOWED}={function}",
                )
            raise KdError(
                f"the {name} of {owner} changed since its start",
                "Restore the original, or start a new run: another --name, without --resume.",
            )
