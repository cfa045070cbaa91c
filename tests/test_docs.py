"""What the pages show is run, or at least parsed."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn

from kdcli.cli import app as application
from kdcli.cli.app import COMMANDS, app
from kdcli.data import ImageSet
from kdcli.methods import Batch, Features
from kdcli.methods.registry import ATTRIBUTE
from kdcli.models import class_map
from kdcli.teacher.probabilities import logits_of
from tests.cli.conftest import check_options
from tests.cli.test_first_steps import save_pictures
from tests.helpers import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def execute(code: str, variables: dict[str, Any]) -> None:
    """Run a cell; its last expression is shown as a notebook does."""
    *body, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        body.append(last)
    exec(compile(ast.Module(body, []), "cell", "exec"), variables)
    if isinstance(last, ast.Expr):
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), variables)
        assert "<table>" in getattr(shown, "_repr_html_", lambda: "<table>")()


def test_all_blocks_are_known() -> None:
    """Kinds of blocks by page: sh is run by test_pages, the others here, in test_readme or in test_custom_methods."""
    found = {
        page.name: Counter(re.findall(r"^\s*```(.*)", page.read_text("utf-8"), re.M)[::2]) for page in PAGES
    }
    assert {kind for kinds in found.values() for kind in kinds} == {"sh", "python", "csv"}
    assert {name: kinds["python"] for name, kinds in found.items() if kinds["python"]} == {
        "README.md": 2, "methods.md": 2, "python.md": 6,
    }  # fmt: skip
    assert {name: kinds["csv"] for name, kinds in found.items() if kinds["csv"]} == {"teachers.md": 2}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert target.startswith("https://") or file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_commands_have_known_options() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    commands = [line.partition(" #")[0].strip() for line in text.splitlines() if line.startswith("kd ")]
    assert len(commands) > 30
    for command in commands:
        check_options(command)


# of other programs, and examples
OF_OTHERS = """--help --version --install-completion --index-url --upgrade --encode --saved-model --tflite --memory
--read-only --aligned-margin --teacher- --noisy
--nnodes --node-rank --nproc-per-node --rdzv-backend --rdzv-endpoint"""


def test_options_in_pages_and_messages_exist() -> None:
    known = set(OF_OTHERS.split())
    for name in COMMANDS:
        app.registered_commands = []
        application._register([name])
        known.update(*(each.opts for each in typer.main.get_command(app).commands[name].params))
    for file in (ROOT / "benchmarks").glob("*.py"):
        parameters = re.findall(r"^ +(\w+): ", file.read_text(encoding="utf-8"), re.MULTILINE)
        known.update(f"--{name.replace('_', '-')}" for name in parameters)
    for file in (*PAGES, *(ROOT / "kdcli").rglob("*.py")):
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", file.read_text(encoding="utf-8"))
        assert set(named) <= known, file.name


def test_method_of_the_page_about_methods() -> None:
    code = blocks(ROOT / "docs" / "methods.md", "python")[1]
    variables: dict[str, Any] = {}
    exec(
        "from typing import Annotated\nfrom kdcli.methods import *\nfrom torch import Tensor\n" + code,
        variables,
    )
    described = getattr(variables["aligned"], ATTRIBUTE)
    assert described.needs_features and list(described.fields) == ["aligned_margin"]
    student, teacher = (
        Features((), torch.tensor(rows)) for rows in ([[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [4.0, 0.0]])
    )
    numbers = torch.zeros(2).long()
    batch = Batch(
        torch.zeros(2, 2),
        None,
        numbers,
        numbers.numpy(),
        0,
        0,
        student_features=student,
        teacher_features=teacher,
    )
    assert float(described.loss(batch, margin=1.0)) == 0.5  # cosines 1 and 0


@pytest.mark.slow
def test_page_about_python(workplace: Path) -> None:
    variables: dict[str, Any] = {}
    for code in blocks(ROOT / "docs" / "python.md", "python"):
        execute(code, variables)


def brightness() -> nn.Module:
    """Classes of `save_pictures` by the mean pixel m, nearest of 30, 110 and 190: logits (2·m·c − c²)/200."""
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    centres = torch.tensor([30.0, 110.0, 190.0])
    with torch.no_grad():
        module[2].weight.copy_((centres / 300)[:, None])
        module[2].bias.copy_(-(centres**2) / 200)
    return module


@pytest.mark.slow
def test_python_of_the_readme(workplace: Path) -> None:
    save_pictures(Path("photos"), 40)
    [code] = [block for block in blocks(ROOT / "README.md", "python") if "kdcli" in block]
    for long, short in (
        ('"mobilenetv2-half"', '"convnet-tiny"'),
        ("epochs=30", "epochs=1"),
        ("data=photos))", "data=photos, rounds=3, max_seconds=1, no_memory=True))"),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    variables: dict[str, Any] = {"my_module": brightness()}
    execute(code, variables)
    assert variables["run"].result.teacher.plain == 100 and Path("student.onnx").is_file()


def test_tables_of_the_page_about_teachers(workplace: Path) -> None:
    classes, probabilities = blocks(ROOT / "docs" / "teachers.md", "csv")
    Path("map.csv").write_text(classes)
    found = class_map.find(("tabby", "tiger cat", "beagle", "pug"), ("cat", "dog"), Path("map.csv"))
    assert found is not None and found.groups == ((0, 1), (2,))
    Path("probs.csv").write_text(probabilities)
    names = np.frombuffer(b"train/cat/1.jpg\0train/dog/2.jpg\0", np.uint8)
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)
    data = ImageSet(images, labels, ("cat", "dog"), "x", name_bytes=names)
    np.testing.assert_allclose(
        np.exp(logits_of(Path("probs.csv"), "", data, None)), [[0.93, 0.07], [0.1, 0.9]]
    )


@pytest.mark.slow
def test_notebook(workplace: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    variables: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            execute("".join(cell["source"]), variables)
    assert variables["run"].result.test.accuracy > 85
