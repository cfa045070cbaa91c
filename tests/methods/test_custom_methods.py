"""Methods of the user's own: what they can be, and that no file can make kd run one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli import data, methods
from kdcli.base.config import CompareConfig, make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Progress
from kdcli.cli import compare as compare_command
from kdcli.cli import export as export_command
from kdcli.cli import info as info_command
from kdcli.cli import predict as predict_command
from kdcli.cli import report as report_command
from kdcli.cli import reproduce as reproduce_command
from kdcli.cli import test as test_command
from kdcli.cli import train as train_command
from kdcli.cli import tune as tune_command
from kdcli.data import Splits
from kdcli.engine import RunDir, fit, read_metrics
from kdcli.models import checkpoint
from kdcli.studies.compare import compare, make_plan
from kdcli.studies.reproduce import check_inputs, read_finished, reproduce
from kdcli.studies.tune.search import tune
from kdcli.studies.tune.space import TuneConfig, read_space
from tests.helpers import (
    ROOT,
    StopAfter,
    command_line,
    config,
    digest_without_clocks,
    image_folder,
    make_splits,
)

METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
# as the installed script starts: without the current folder among Python's
KD = (sys.executable, "-P", "-c", "from kdcli.cli import main; main()")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

Write = Callable[[str, str], None]


@pytest.fixture
def write(workplace: Path) -> Iterator[Write]:
    """Writes a module into the current folder; it is forgotten afterwards."""
    names: list[str] = []

    def made(name: str, text: str) -> None:
        names.append(name)
        Path(f"{name}.py").write_text(f"import torch\nfrom kdcli.methods import method\n{text}")

    yield made
    for name in names:
        sys.modules.pop(name, None)


def documented() -> tuple[str, list[str]]:
    """The example's module and its commands."""
    [block] = re.findall(r"<!-- own -->\n(.*?)<!-- /own -->", METHODS, re.DOTALL)
    module, commands = re.findall(r"```(?:python|sh)\n(.*?)```", block, re.DOTALL)
    return module, commands.splitlines()


def test_the_example_of_the_documentation_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, commands = documented()
    assert len(module.strip().splitlines()) == 12
    Path("mymethods.py").write_text(module)
    image_folder(Path("toy"))
    small = "--data toy --student convnet-tiny --epochs 1 --threads 1 --precision 32 --val-fraction 0 --quiet"
    more = shlex.split(f"{small} --teacher runs/teacher/student.pt")
    fit(config(method="ce", epochs=1, name="teacher"), data.load("toy"))
    names = []
    for number, command in enumerate(commands):
        kd, verb, *words = shlex.split(command)
        assert (kd, verb) == ("kd", "train")
        if number == 0:  # the real one, once
            subprocess.run([*KD, verb, *words, *more], env=ENVIRONMENT, check=True)
        else:
            assert command_line(monkeypatch, train_command)(*words, *more).exit_code == 0
        names.append(config(method=words[1]).method_name)
    del sys.modules["mymethods"]
    assert names == ["sharpen", "kd+sharpen"]
    alone, joined = (RunDir(Path(f"runs/{name}-convnet-tiny-1")) for name in names)
    assert set(read_metrics(alone.metrics_file)[-1].terms) == {"sharpen"}
    line = read_metrics(joined.metrics_file)[-1]
    terms = line.terms
    assert set(terms) == {"ce", "kd", "sharpen"}
    total = 0.3 * terms["ce"] + 0.7 * terms["kd"] + 2 * terms["sharpen"]
    assert line.loss == pytest.approx(total, rel=1e-5)
    assert json.loads(joined.result_file.read_text())["method"] == "kd+mymethods:sharpen"


def digits() -> Splits:
    return data.load("digits")


def test_documented_example_equals_its_formula(write: Write) -> None:
    write("documented", documented()[0])
    [part] = methods.parse("documented:sharpen")
    assert (part.name, part.tau) == ("sharpen", 2.0)
    assert part.summary == "match the teacher's probabilities, squared"
    teacher = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    batch = methods.Batch(student, teacher, torch.zeros(1), torch.zeros(1).long().numpy(), 0, 0, tau=2.0)
    # of p = softmax((1, 3)/2) squared and renormalised: q = 1/(1 + e^2); ½ each for the student
    q = 1 / (1 + torch.tensor(2.0, dtype=torch.float64).exp())
    expected = 4 * (q * (2 * q).log() + (1 - q) * (2 * (1 - q)).log())
    assert float(part.loss(batch).detach()) == pytest.approx(float(expected), rel=1e-12)


# --- what a function says of itself --------------------------------------------------------------------------


def test_decorator_arguments_take_effect(write: Write) -> None:
    write(
        "marked",
        "@method(ce=0.5, weight=3, tau=7, needs_teacher=False, needs=('labels',))\n"
        "def spread(batch):\n"
        "    assert batch.tau == 7\n"
        "    return batch.student_logits.square().mean()\n",
    )
    settings = config(method="marked:spread", epochs=1)
    assert methods.objective(settings).weights() == {"ce": 0.5, "spread": 3.0}
    with pytest.raises(UsageError, match="reads labels, and unlabelled images have none"):
        methods.objective(settings.model_copy(update={"ce_weight": 0.0})).check(unlabelled=True)
    result = fit(settings, make_splits())  # no teacher is needed
    line = result.history[-1]
    assert line.loss == pytest.approx(0.5 * line.terms["ce"] + 3 * line.terms["spread"], rel=1e-5)
    assert result.run.path.name == "spread-convnet-tiny-1"


def test_features_and_output_scale_follow_the_decorator(write: Write) -> None:
    write(
        "asking",
        "@method(needs=('features',))\n"
        "def near(batch):\n"
        "    student, teacher = batch.features\n"
        "    return (student.embedding.mean() - teacher.embedding.mean()).square()\n"
        "@method(regresses=True)\n"
        "def values(batch):\n"
        "    return (batch.student_logits - batch.targets).square().mean()\n"
        "def plain(batch):\n"
        "    return (batch.student_logits - batch.targets).square().mean()\n",
    )
    splits = make_splits()
    teacher = fit(config(method="ce", epochs=1), splits).run.student
    common = {"teacher": teacher, "epochs": 1}
    assert set(fit(config(method="asking:near", **common), splits).history[0].terms) == {"near"}
    losses = [
        fit(config(method=f"asking:{name}", **common), splits).history[0].loss for name in ("values", "plain")
    ]
    assert losses[0] != losses[1]  # one begins at the teacher's mean and spread
    with pytest.raises(UsageError, match="regresses all logits"):
        fit(config(method="asking:values", cache_top_k=2, **common), splits)


@pytest.mark.parametrize(
    "words",
    [
        "weight=-1",
        "weight='1'",
        "ce=float('nan')",
        "tau=0",
        "needs=('features',), needs_teacher=False",
        "needs=('logits',)",
    ],
)
def test_invalid_decorator_arguments_are_refused(write: Write, words: str) -> None:
    write("wrong", f"@method({words})\ndef f(batch):\n    return batch.student_logits.mean()\n")
    with pytest.raises(UsageError, match="--method wrong:f cannot be imported: @method: "):
        methods.parse("wrong:f")


# --- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("absent_module:f", "", "cannot be imported: No module named 'absent_module'"),
        ("bad:absent", "", "cannot be imported: module 'bad' has no attribute 'absent'"),
        ("bad:f", "raise ValueError('two\\nlines')", "cannot be imported: two"),
        ("bad:f", "import sys; sys.exit(3)", "cannot be imported: 3"),
        ("bad:f", "def f(:", "cannot be imported: "),
        ("bad:f", "f = 3", "is not callable"),
        ("bad:kd", "def kd(batch): ...", "kd has a method kd"),
        ("bad:ce", "def ce(batch): ...", "kd has a method ce"),
        ("bad:f:g", "", "does not name a function"),
        ("bad:", "", "does not name a function"),
        (":f", "", "does not name a function"),
        ("../bad:f", "", "does not name a function"),
        ("bad:f+bad:f", "def f(batch): ...", "method f is named twice"),
    ],
)
def test_import_errors_are_one_line(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str, text: str, told: str
) -> None:
    write("bad", text)
    with pytest.raises(UsageError) as caught:
        command_line(monkeypatch, train_command)("--method", name, "--data", "digits")
    assert told in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return batch.student_logits.mean(dim=1)", "must return a scalar tensor"),
        ("return 1.0", "must return a scalar tensor"),
        ("return torch.tensor(1)", "must return a scalar tensor"),
        ("return batch.student_logits.detach().mean()", "does not depend on the student"),
        ("return batch.student_logits.mean() * float('nan')", "the loss is no longer finite"),
        ("return batch.absent", "failed: AttributeError: 'Batch' object has no attribute 'absent'"),
        ("return batch.targets.mean()", "failed: RuntimeError: the teacher's logits are there only with"),
    ],
)
def test_invalid_loss_values_are_refused(write: Write, body: str, told: str) -> None:
    write("giving", f"@method(needs_teacher=False)\ndef f(batch):\n    {body}\n")
    with pytest.raises(KdError) as caught:
        fit(config(method="giving:f", epochs=1), make_splits())
    assert told in caught.value.message
    assert caught.value.hint


def test_the_current_folder_is_searched_last(write: Write) -> None:
    write("colorsys", "raise SystemExit('not the one that comes with Python')")
    sys.modules.pop("colorsys", None)
    write("beside", "VALUE = 1")
    write("neighbour", "import colorsys\nimport beside\ndef f(batch):\n    return beside.VALUE\n")
    methods.parse("neighbour:f")
    methods.parse("neighbour:f")
    assert sys.path[-1] == str(Path.cwd()) and sys.path.count(str(Path.cwd())) == 1


# --- code is run only where the command line names it --------------------------------------------------------

CANARY = (
    "from pathlib import Path\nPath('touched').touch()\n"
    "@method(needs_teacher=False)\ndef sing(batch):\n    return batch.student_logits.square().mean()\n"
)


@pytest.fixture
def canary(write: Write, monkeypatch: pytest.MonkeyPatch) -> Any:
    """kd's commands beside a run whose files name a method that is code, and the code itself."""
    write("canary", CANARY)
    call = command_line(
        monkeypatch,
        *(train_command, test_command, info_command, export_command, predict_command, report_command),
        *(compare_command, tune_command, reproduce_command),
    )
    words = "train --data digits --student convnet-tiny --epochs 1 --threads 1 --precision 32 --name sung"
    call(*shlex.split(words), "--method", "kd+canary:sing", "--teacher", str(teacher_of_digits()))
    assert Path("touched").exists()  # here it was named
    Path("touched").unlink()
    del sys.modules["canary"]
    return call


def teacher_of_digits() -> Path:
    return fit(config(method="ce", epochs=1, name="teacher"), digits()).run.student


def test_no_file_makes_kd_run_code(canary: Any) -> None:
    stored = checkpoint.load(Path("runs/sung/student.pt"))
    assert stored.provenance["method"] == "kd+canary:sing"
    shutil.copy("runs/sung/config.toml", "recipe.toml")
    hint = "If you trust its code, add --method kd+canary:sing"
    for words in ("--resume runs/sung", "--config recipe.toml", "--config recipe.toml --epochs 2"):
        with pytest.raises(UsageError, match=r"names the custom method kd\+canary:sing") as caught:
            canary("train", *words.split())
        assert caught.value.hint == hint
        assert not Path("touched").exists()
    for words in (
        "tune --config recipe.toml --tune lr=1e-3:1e-1",
        "tune --config recipe.toml --tune epochs=1|2",
        "reproduce runs/sung",
    ):
        with pytest.raises(UsageError, match=r"names the custom method kd\+canary:sing") as caught:
            canary(*words.split())
        assert caught.value.hint == hint
        assert not Path("touched").exists()
    canary(*["compare", "--config", "recipe.toml", "--methods", "ce,ls", "--seeds", "1", "--name", "c"])
    plan = Path("comparisons/c/comparison.toml")
    whole = plan.read_text()
    shutil.rmtree("comparisons/c/runs")
    for before, after in (
        ("[common]", '[common]\nmethod = "canary:sing"'),
        ("[train]", '[train]\nmethod = "canary:sing"'),
        ("threads = 1\n", 'threads = "1"\n'),
        ('precision = "32"\n', 'precision = "canary:sing"\n'),
        ('    "ls",', '    "canary:sing",'),
    ):
        assert before in whole
        plan.write_text(whole.replace(before, after))
        with pytest.raises(KdError, match=r"comparison\.toml"):
            canary("compare", "--resume", "comparisons/c")
        assert not Path("touched").exists()
    for words in (
        "info runs/sung/student.pt",
        "test runs/sung/student.pt --threads 1",
        "export runs/sung/student.pt",
        "report --threads 1 --no-bench --thumbnails 0",
    ):
        assert canary(*words.split()).exit_code == 0
        assert "canary" not in sys.modules
    assert not Path("touched").exists()
    assert "kd+canary:sing" in Path("report.html").read_text()


def test_recipe_with_custom_method_needs_it_on_the_command_line(canary: Any) -> None:
    with pytest.raises(UsageError, match="names the custom method") as caught:
        canary("train", "--config", "runs/sung/config.toml")
    typed = shlex.split(str(caught.value.hint).partition("add ")[2])
    assert canary("train", "--config", "runs/sung/config.toml", *typed, "--name", "again").exit_code == 0
    digests = [
        checkpoint.digest(checkpoint.load(Path(f"runs/{name}/student.pt")).state_dict)
        for name in ("sung", "again")
    ]
    assert digests[0] == digests[1]
    canary(
        "train", "--config", "runs/sung/config.toml", "--method", "ce", "--name", "other"
    )  # no code at all


def test_resume_with_custom_method_needs_it_on_the_command_line(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    write("resumed", CANARY)
    settings = config(method="resumed:sing", data="digits", epochs=2, log_every=1)
    whole = fit(settings.model_copy(update={"name": "whole"}), digits())
    with pytest.raises(Interrupted) as stopped:
        fit(settings.model_copy(update={"name": "cut"}), digits(), on_event=StopAfter(2000, signal.SIGINT))
    assert stopped.value.hint == "kd train --resume runs/cut --method resumed:sing"
    call = command_line(monkeypatch, train_command)
    for words, told in (
        ("--resume runs/cut", "names the custom method"),
        ("--resume runs/cut --method ce", "names the custom method"),
        ("--resume runs/cut --method resumed:other", "names the custom method"),
        ("--resume runs/cut --method resumed:sing --epochs 3", "takes no other option"),
    ):
        with pytest.raises(UsageError) as caught:
            call(*words.split())
        assert told in caught.value.message
    assert call(*str(stopped.value.hint).split()[2:]).exit_code == 0
    assert not os.environ["KD_NETWORKS"]  # a method may not make networks that files name
    states = [checkpoint.load(run / "last.pt") for run in (whole.run.path, Path("runs/cut"))]
    assert len({digest_without_clocks([state.state_dict, state.training]) for state in states}) == 1
    fit(config(method="ce", data="digits", epochs=1, name="plain"), digits())
    with pytest.raises(UsageError, match="runs/plain was started with --method ce"):
        call("--resume", "runs/plain", "--method", "resumed:sing")


# --- code is an input like any other --------------------------------------------------------------------------

SONG = "@method(needs_teacher=False)\ndef song(batch):\n    return batch.student_logits.square().mean()\n"


class _StopOnce:
    """SIGINT at the first progress of training."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.group in ("training", "comparison"):
            os.kill(os.getpid(), signal.SIGINT)


def test_comparison_with_custom_method_resumes_with_the_same_code(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    write("sheet", SONG)
    settings = make(CompareConfig, {"methods": "ce,sheet:song", "seeds": "1", "name": "c"})
    train = {"student": "convnet-tiny", "epochs": 1, "batch_size": 16, "precision": "32", "threads": 1}
    splits = make_splits()
    with pytest.raises(Interrupted) as stopped:
        compare(make_plan(settings, train), splits, on_event=_StopOnce())
    assert stopped.value.hint == "Rerun the same command to continue."
    plan = make_plan(settings, train)
    compare(plan, splits)
    source = Path("sheet.py")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    stored = checkpoint.load(RunDir.of(plan.runs[1]).student)
    assert stored.provenance["inputs"]["code of sheet:song"] == sha256
    other = checkpoint.load(RunDir.of(plan.runs[0]).student).provenance["inputs"]
    assert not any("code" in name for name in other)
    source.write_text(source.read_text() + "# another\n")
    del sys.modules["sheet"]  # as in another process
    with pytest.raises(KdError, match="code of sheet:song of comparisons/c changed"):
        compare(make_plan(settings, train), splits)


def test_reproduce_with_custom_method_needs_it_on_the_command_line(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    write("verse", SONG)
    fit(config(method="verse:song", data="digits", epochs=1, batch_size=256, name="r"), digits())
    found = read_finished(Path("runs/r"), "verse:song")
    images = check_inputs(found)
    with pytest.raises(Interrupted) as stopped:
        reproduce(found, images, on_event=_StopOnce())
    assert stopped.value.hint == "kd reproduce runs/r --method verse:song"
    call = command_line(monkeypatch, train_command, reproduce_command)
    done = json.loads(call(*shlex.split(str(stopped.value.hint))[1:], "--json").stdout)
    assert (done["verdict"], done["again"]) == ("bit-identical", "runs/r-reproduced-1")
    source = Path("verse.py")
    source.write_text(source.read_text() + "# another\n")
    del sys.modules["verse"]  # as in another process
    with pytest.raises(KdError, match="code of verse:song of runs/r changed"):
        check_inputs(read_finished(Path("runs/r"), "verse:song"))


def test_tune_with_custom_method_resumes_with_the_same_code(write: Write) -> None:
    write("tuned_song", SONG)
    values = {"student": "convnet-tiny", "epochs": 1, "batch_size": 16, "precision": "32", "threads": 1}
    wanted = make(TuneConfig, {**values, "method": "tuned_song:song", "trials": 1, "val_fraction": 0.2})
    space = read_space(["lr=1e-3:1e-1"], wanted.train)
    splits = make_splits()
    assert tune(wanted, space, splits).settings.study_name == "tune-song-convnet-tiny"
    source = Path("tuned_song.py")
    source.write_text(source.read_text() + "# another\n")
    del sys.modules["tuned_song"]  # as in another process
    with pytest.raises(UsageError, match="started with other settings: code of tuned_song:song was"):
        tune(wanted, space, splits)
