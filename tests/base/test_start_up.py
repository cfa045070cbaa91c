"""The start of a training: what of torch is imported, and that nothing is missing when it is needed after all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

USES = {
    "compiler": "torch.compile(torch.nn.Linear(3, 2), backend='eager')(torch.ones(4, 3))",
    "exporter": "torch.export.export(torch.nn.Conv2d(3, 4, 3), (torch.ones(2, 3, 8, 8),))",
    "tensors without values": "import torch._meta_registrations\n"
    "assert torch.nn.Conv2d(3, 4, 3, device='meta')(torch.ones(2, 3, 8, 8, device='meta')).shape == (2, 4, 6, 6)",
    "torchvision": "import torchvision",
    **{
        name: f"import importlib\nmodule = importlib.import_module('{name}')\n"
        f"assert module.__spec__.name == '{name}' and module.__spec__.origin == module.__file__"
        for name in (
            "torch._prims",
            "torch._refs.nn.functional",
        )
    },
}


def python(code: str, **more: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def after_the_imports(code: str) -> str:
    return f"from kdcli.cli._imports import imports\nwith imports():\n    import torch\n{code}"


def test_a_training_starts_without_what_only_the_compiler_needs() -> None:
    imported = python(
        after_the_imports("import sys; from kdcli.engine import fit; print('torch._prims' in sys.modules)")
    )

    assert imported.strip() == "False"


@pytest.mark.parametrize("use", USES)
def test_and_has_it_as_soon_as_something_asks_for_it(use: str) -> None:
    shapes = "import sys; assert 'torch._prims' in sys.modules and 'torch._meta_registrations' in sys.modules"

    python(after_the_imports(f"{USES[use]}\n{shapes}"))


def test_another_way_to_import_them_leaves_torch_as_it_is(tmp_path: Path) -> None:
    """A release that needs something of them at once could not be given an empty module."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "from torch import _meta_registrations\nfrom ._meta_registrations import x\n"
    )
    (tmp_path / "torch/_meta_registrations.py").write_text("x = 1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{after_the_imports('assert torch.x == 1')}"

    python(code)
