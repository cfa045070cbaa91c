"""Importing what is heavy, inside a command."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# torch's shape-only kernels: a third of its import, used by its compiler, its exporter and meta tensors alone
_SHAPES = "torch._meta_registrations"
_STATEMENT = "from torch import _meta_registrations\n"
# what they bring along, and what needs them
_USERS = (
    _SHAPES,
    "torch._decomp",
    "torch._dynamo",
    "torch._inductor",
    "torch._prims",
    "torch._refs",
    "torch.onnx",
    "torch.utils._content_store",
)


@contextmanager
def imports() -> Iterator[None]:
    """Import torch for a training: without its compiler's part, and without looking for garbage meanwhile.

    torch makes a million objects that stay, and the collector would go through them a dozen times: a tenth of the
    import. Afterwards what has been imported is no longer looked at.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        _import_torch()
        yield
    finally:
        if (
            gc.get_freeze_count() == 0
        ):  # once: whoever calls commands as functions keeps the garbage between them
            gc.freeze()
        if collecting:
            gc.enable()


def _import_torch() -> None:
    """Import torch, its shape-only kernels only when they are first needed.

    A release of torch that does not import them by the one known statement is imported as it is.
    """
    if "torch" in sys.modules or not _known():
        return
    sys.modules[_SHAPES] = ModuleType(_SHAPES)  # for the statement to find
    try:
        importlib.import_module("torch")
    finally:
        sys.modules.pop(_SHAPES, None)
    sys.meta_path.insert(0, _ShapesFirst())


def _known() -> bool:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = Path(found.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    others = text.replace("torch.distributed._meta_registrations", "").replace("coll_meta_registrations", "")
    return others.count("_meta_registrations") == others.count(_STATEMENT) == 1


class _ShapesFirst(MetaPathFinder):
    """Imports the shape-only kernels before whatever uses them, once."""

    def __init__(self) -> None:
        self.done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing but what the kernels have brought along: the other finders find the rest."""
        if self.done or not fullname.startswith(_USERS):
            return None
        self.done = True
        if fullname != _SHAPES:
            importlib.import_module(_SHAPES)
        module = sys.modules.get(fullname)
        if module is None:
            return None
        # not to be run again: where there is a module by now, Python goes by that module's own specification
        module.__spec__ = importlib.util.spec_from_loader(fullname, _AsItIs(module.__spec__))
        return module.__spec__


class _AsItIs(Loader):
    """Stands for the loader of a module that has been run."""

    def __init__(self, spec: ModuleSpec | None) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Give the module that there is."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""
        module.__spec__ = self.spec
