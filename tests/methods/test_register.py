"""Registering a method: one function in one new file, of the package or of the user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli.methods.registry import discover
from tests.helpers import ROOT

NEW_FILE = '''
from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from kdcli.methods import Batch, method, option

if TYPE_CHECKING:
    from torch import Tensor


@method("aligned", source="a test", ce=1.0, weight=2.0, needs=("features",), features_only=True)
def aligned(
    batch: Batch, *, margin: Annotated[float, option("cosine that is near enough", ge=0, le=1)] = 0.5
) -> Tensor:
    """Match the directions of embeddings."""
    from torch.nn import functional as F

    student, teacher = batch.embeddings
    return (margin - F.cosine_similarity(student, teacher)).clamp(min=0).mean()
'''
# imports the package with a further folder of modules, as if the file lay beside the others, and trains two steps
SCRIPT = """
import json, sys
from importlib.util import find_spec, module_from_spec

if sys.argv[1] == "package":
    spec = find_spec("kdcli.methods")
    spec.submodule_search_locations.append("plugins")
    sys.modules["kdcli.methods"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
from kdcli.cli import main
from kdcli import methods

help_loads_torch = "torch" in sys.modules
from kdcli.base.config import make
from kdcli.engine import fit
from tests.helpers import make_splits

common = {"student": "convnet-tiny", "epochs": 1, "batch_size": 8, "threads": 1, "precision": "32", "val_fraction": 0}
splits = make_splits(train=5, test=3)
teacher = fit(make(methods.TrainConfig, {**common, "method": "ce", "name": "teacher"}), splits).run.student
values = {**common, **json.loads(sys.argv[2]), "teacher": (teacher,), "name": "student"}
result = fit(make(methods.TrainConfig, values), splits)
line = json.loads(result.run.metrics_file.read_text().splitlines()[-1])
print(json.dumps({"terms": line["terms"], "loss": line["loss"], "torch": help_loads_torch}))
"""


def run(*words: str) -> str:
    command = [sys.executable, "-c", *words]
    return subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), "COLUMNS": "120"}, capture_output=True, text=True, check=True
    ).stdout


def test_a_new_file_in_the_package_registers_a_method_with_its_options(workplace: Path) -> None:
    Path("plugins").mkdir()
    Path("plugins/directions.py").write_text(NEW_FILE)
    values = {"method": "aligned", "aligned_margin": 0.75}
    found = json.loads(run(SCRIPT, "package", json.dumps(values)).splitlines()[-1])
    assert not found["torch"]
    assert list(found["terms"]) == ["ce", "aligned"]
    assert found["loss"] == pytest.approx(found["terms"]["ce"] + 2 * found["terms"]["aligned"], rel=1e-5)
    prefix = SCRIPT[: SCRIPT.index("from kdcli import methods")]
    shown = run(prefix + "\nsys.argv[1:] = ['train', '--help-all']\nmain()", "package")
    assert "--aligned-margin" in shown
    assert "aligned: cosine that is near enough. [default: 0.5, ≤ 1]" in " ".join(
        shown.replace("│", " ").split()
    )
    assert "aligned match the directions of embeddings" in " ".join(shown.split())


def test_the_same_file_is_a_custom_method_with_its_defaults(workplace: Path) -> None:
    Path("directions.py").write_text(NEW_FILE)
    values = {"method": "directions:aligned"}
    found = json.loads(run(SCRIPT, "custom", json.dumps(values)).splitlines()[-1])
    assert found["loss"] == pytest.approx(found["terms"]["ce"] + 2 * found["terms"]["aligned"], rel=1e-5)


def test_a_name_or_setting_is_defined_once(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("twice").mkdir()
    Path("twice/__init__.py").touch()
    monkeypatch.syspath_prepend(Path.cwd())
    for name in ("first", "second"):
        Path(f"twice/{name}.py").write_text(NEW_FILE)
    with pytest.raises(ValueError, match="method or setting aligned is defined twice"):
        discover("twice")
