"""Arguments of the functions: models as files or in memory, data, settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from kdcli.base import code
from kdcli.base.config import (
    NO_ASSUMPTIONS,
    DataSettings,
    InputSettings,
    ModelDataSettings,
    TeacherInputSettings,
    make,
)
from kdcli.base.errors import UsageError
from kdcli.base.names import nearest
from kdcli.cli.arguments import existing_model
from kdcli.data import Splits
from kdcli.deploy import load as loading
from kdcli.deploy import pretrained
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier

Model = str | Path | nn.Module | OnnxClassifier
Models = Model | Iterable[Model]
Student = str | Path | nn.Module
Data = str | Path | Splits
C = TypeVar("C", bound=ModelDataSettings)
OF_DATA = (*DataSettings.model_fields, "resize", "grey", "unlabelled")
_PRINTED = {"plot", "csv", "markdown", "details"}  # options of output alone
_FOLDER = Path("cache/models")  # of checkpoints of models in memory


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for a setting that is not among these; a class map is one of teachers, `teacher_class_map`."""
    known = set(known) - _PRINTED - {"class_map"}
    for name in sorted(set(given) - known):
        hint = "Only the command line has it." if name in _PRINTED else nearest(name, sorted(known))
        raise UsageError(f"unknown setting: {name}", hint)


def of_training(
    teacher: Models | None, student: Student | None, data: Data | None, settings: dict[str, Any]
) -> tuple[Splits | None, dict[str, Any]]:
    """The data where they are loaded, and the options of kd train; the data's are those they were loaded with."""
    values = dict(settings)
    if teacher is not None:
        teachers, inputs = several(teacher), NO_ASSUMPTIONS
        if any(map(_is_bare, teachers)):
            named = set(values) & set(TeacherInputSettings.model_fields) - {"teacher_class_map"}
            inputs = make(TeacherInputSettings, {name: values.pop(name) for name in named}).teacher_inputs
        values["teacher"] = tuple(
            typed(each) if isinstance(each, str | Path) else path_of(each, data, inputs) for each in teachers
        )
    if isinstance(student, str | Path):
        values["student"] = str(typed(student))
    elif isinstance(student, Classifier):
        values["student"] = str(path_of(student))
    elif student is not None:
        values["student"] = _classifier(student, data).arch
    if not isinstance(data, Splits):
        return None, values if data is None else {**values, "data": source(data)}
    _refuse(set(OF_DATA) & set(settings))
    return data, {**values, "data": data.spec, **data.settings}


def several(models: Models) -> list[Model]:
    """A list of models, or of the one."""
    return list(models) if isinstance(models, Iterable) and not isinstance(models, Model) else [models]


def of_model(kind: type[C], data: Data | None, settings: dict[str, Any]) -> tuple[C, Splits | None]:
    """Settings of a command that evaluates a model, and the data where they are loaded."""
    check_known(settings, kind.model_fields)
    if not isinstance(data, Splits):
        return make(kind, settings if data is None else {**settings, "data": source(data)}), None
    _refuse({"skip_broken", "test_fraction"} & set(settings))
    places = {name: data.settings[name] for name in ("data_dir", "cache_dir") if name in data.settings}
    return make(kind, {**places, **settings}), data


def _refuse(of_data: set[str]) -> None:
    """Raise UsageError for settings of data that are loaded."""
    for name in sorted(of_data):
        raise UsageError(f"{name} is a setting of the data, which are loaded", f"Pass {name} to load_data.")


def source(data: object) -> str:
    """The name or path of data; a UsageError for any other object."""
    if not isinstance(data, str | Path):
        hint = (
            "Pass a path, or what kd.load_data returns; of a Hugging Face dataset a folder of save_to_disk."
        )
        raise UsageError(f"{type(data).__name__} is no data set, folder, archive or table", hint)
    return str(data)


def _is_bare(model: Any) -> bool:
    """Whether a model is a module without preprocessing."""
    return isinstance(model, nn.Module) and not isinstance(model, Classifier)


def _classifier(module: object, data: Data | None, inputs: InputSettings = NO_ASSUMPTIONS) -> Classifier:
    if not isinstance(module, nn.Module):
        hint = "Pass a path, a torch.nn.Module, or what kd.load_model returns; of a run its `student`."
        raise UsageError(f"{type(module).__name__} is not a model", hint)
    if not isinstance(data, Splits):
        hint = "Pass data, or the model of kd.load_model(module, data=kd.load_data(…))."
        raise UsageError("a torch.nn.Module needs data for its class names and input size", hint)
    return pretrained.of_module(module, data, inputs)


def loaded(
    model: Model, config: InputSettings, threads: int = 0, data: Data | None = None
) -> Classifier | OnnxClassifier:
    """A model in evaluation mode."""
    if isinstance(model, str | Path):
        return loading.load_model(existing_model(typed(model)), threads, config)
    if not isinstance(model, Classifier | OnnxClassifier):
        return _classifier(model, data, config)
    for name in config.given:
        raise UsageError(f"{name} is a setting of the model, which is loaded", f"Pass {name} to load_model.")
    return model if isinstance(model, OnnxClassifier) else model.eval()


def typed(model: str | Path) -> Path:
    """A model's path or name; a user's function that it names may run."""
    code.allow(str(model))
    return Path(model)


def path_of(model: Model, data: Data | None = None, inputs: InputSettings = NO_ASSUMPTIONS) -> Path:
    """The file of a model; a checkpoint in memory is written to `cache/models/`, under a hash of its content."""
    if isinstance(model, str | Path):
        return existing_model(typed(model))
    if isinstance(model, OnnxClassifier):
        if model.is_foreign and model.assumed.given:
            hint = "Pass its path, and these settings to this function."
            raise UsageError(
                f"{model.path} is loaded anew here, without {', '.join(model.assumed.given)}", hint
            )
        return model.path
    made = model if isinstance(model, Classifier) else _classifier(model, data, inputs)
    return pretrained.keep(made, _FOLDER)
