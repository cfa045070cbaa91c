"""The command line as a user meets it: help, errors, exit codes, pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdcli import cli, methods, models
from kdcli.base import names
from kdcli.base.config import ConvertConfig, make
from kdcli.base.errors import KdError
from kdcli.base.events import Note, Progress
from kdcli.base.recipes import read_recipe
from kdcli.cli import output
from kdcli.cli.app import as_kd_error
from kdcli.data import load
from kdcli.data.datasets import DATASETS
from kdcli.methods import TrainConfig
from tests.cli.helpers import ENVIRONMENT, Kd, is_clean
from tests.helpers import digits_student, image_folder


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help-all"])
def test_help_fits_80_columns_and_names_every_option(kd: Kd, command: str, flag: str) -> None:
    code, out, err = kd(command, flag)
    assert (code, err) == (0, "")
    assert is_clean(out)
    assert max(map(len, out.splitlines())) <= 80
    assert out.count(f" kd {command}") >= 3  # the usage line and two examples
    assert "--json" in out


def test_help_lists_defaults_methods_and_networks(kd: Kd) -> None:
    out = " ".join(re.sub(r"[│╭╮╰╯─]", " ", kd("train", "--help-all").out).split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in out
        if isinstance(field.default, float | int) and not isinstance(field.default, bool):
            assert re.search(rf"\[default: {field.default}[],]", out), name
    for name, method in methods.METHODS.items():
        assert f"{name} {method.summary}" in out
    assert "none. [default: 0.05, < 1]" in out and "learning rate. [default: 0.001, > 0]" in out  # ranges
    assert "'kdcli[tensorboard]'" in out  # not taken for markup
    assert models.names() == names.NETWORKS
    assert set(names.DATA_SETS) == set(DATASETS)


def test_help_of_train_fits_three_screens_without_rare_options(
    kd: Kd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)
    short = kd("train", "--help").out
    assert len(short.splitlines()) <= 120
    listed = set(re.findall(r"--[a-z-]+", short))
    first = "method student teacher data epochs batch-size lr augment name resume recipe seed help-all"
    assert {f"--{name}" for name in first.split()} <= listed
    assert not listed & {"--keep", "--dkd-alpha", "--teacher-layout"}
    made = kd("train", "--method", "ce", *QUICK, "--keep", "1", "--name", "t")  # hidden options are accepted
    assert made.code == 0, made
    assert "keep = 1" in Path("runs/t/config.toml").read_text()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tr", "train"),
        ("train --method born", "born-again"),
        ("train --student shuf", "shufflenetv1 shufflenetv2"),
        ("train --data fash", "fashion-mnist"),
        ("train --recipe s", "seed"),
        ("train --teacher w", "weights/teacher.pt"),
        ("train --optimizer adam", "adam adamw"),
        ("train --resume k", "kd-lenet-1"),
        ("reproduce ", "kd-lenet-1"),
        ("info mobile", "mobilenetv2-half"),
        ("download ml", ""),
        ("download mn", "mnist"),
    ],
)
def test_bash_completion_offers_values(
    kd: Kd, monkeypatch: pytest.MonkeyPatch, line: str, offered: str
) -> None:
    for file in ("runs/kd-lenet-1/config.toml", "weights/teacher.pt"):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    asked = {
        "_KD_COMPLETE": "complete_bash",
        "COMP_WORDS": f"kd {line}",
        "COMP_CWORD": str(line.count(" ") + 1),
    }
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    outcome = kd()
    assert (outcome.out.split(), outcome.err) == (offered.split(), "")


def test_completion_imports_no_torch_and_offers_rare_options(workplace: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from kdcli.cli import main; main()"
    asked = {"_KD_COMPLETE": "complete_bash", "COMP_WORDS": "kd train --dkd", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**ENVIRONMENT, **asked}
    )
    assert (done.stdout.split(), done.stderr) == (["--dkd-alpha", "--dkd-beta"], "")


def test_no_arguments_and_version(kd: Kd) -> None:
    code, out, _ = kd()
    assert code in (0, 2)
    for command in cli.COMMANDS:
        assert command in out
    assert re.fullmatch(r"kd \d+\.\d+\.\d+\n", kd("--version").out)


TINY = ["--student", "convnet-tiny"]
WRONG = [
    (["trian"], 2, "no such command: trian", "hint: Did you mean train?"),
    (["conquer"], 2, "no such command: conquer", "hint: Known are demo, "),
    (["train", "--epoch", "3"], 2, "no such option: --epoch", "hint: Did you mean --epochs?"),
    (["train", "--dkd_alfa", "3"], 2, "no such option: --dkd-alfa", "hint: Did you mean --dkd-alpha?"),
    (["train", "--method", "nosy"], 2, "unknown method: nosy", "hint: Did you mean noisy?"),
    (["train", "--method", "kd+att"], 2, "unknown method: att", "hint: Did you mean at?"),
    (["train", "--student", "LeNett"], 2, "unknown network: LeNett", "hint: Did you mean lenet?"),
    (["train", "--recipe", "sed"], 2, "unknown recipe: sed", "hint: Did you mean seed?"),
    (["download", "cifar-10"], 2, "unknown download: cifar-10", "hint: Did you mean cifar10?"),
    (["train", "--method", "magic"], 2, "unknown method: magic", "logits, noisy, kd"),
    (["train", "--method", "kd", "--method", "ce"], 2, "--method is given twice", "one method"),
    (["train", "--student", "perceptron"], 2, "unknown network: perceptron", "lenet"),
    (["train", "--epochs", "many"], 2, "--epochs", "kd train --help-all"),
    (["train", "--epochs", "0"], 2, "--epochs 0", "--help"),
    (["train", "--tau", "-1"], 2, "--tau -1", "--help"),
    (["train", "--noisy-ratio", "1.5"], 2, "--noisy-ratio 1.5", "--help"),
    (["train", "--lr", "nan"], 2, "--lr nan", "--help"),
    (["train", "--augment", "rotate"], 2, "--augment rotate", "--help"),
    (["train", "--name", "../x"], 2, "--name", "--help"),
    (["train", "--frobnicate"], 2, "--frobnicate", "kd train --help-all"),
    (["train", "--recipe", "soup"], 2, "unknown recipe: soup", "seed"),
    (["train", "--recipe", "none.toml"], 2, "none.toml", ""),
    (["train", "--resume", "runs/none"], 1, "no such run: runs/none", "kd runs"),
    (["train", "--resume", "runs/x", "--lr", "1"], 2, "--resume", ""),
    (["train", "--method", "ce"], 1, "CIFAR-10 not found in data", "kd download"),
    (["train", "--data", "mnist", "--method", "ce"], 1, "MNIST not found in data/mnist", "kd download mnist"),
    (["train", "--data", "digits", *TINY], 1, "no teacher in weights/ or runs/", "kd demo"),
    (["train", "--data", "digitz", "--method", "ce"], 2, "digitz", "digits"),
    (["train", "--data", "digits", *TINY, "--teacher", "text.pt"], 1, "text.pt is not a kd checkpoint", ""),
    (["train", "--data", "text.pt", "--method", "ce"], 1, "text.pt", ""),
    (["train", "--method", "ce", "--data", "digits", "--student", "lenet"], 2, "too small", "convnet"),
    (["test", "none.pt"], 1, "no such file: none.pt", "kd demo"),
    (["test", "text.pt"], 1, "text.pt is not a kd checkpoint", ""),
    (["test", "text.onnx"], 1, "text.onnx", ""),
    (["test", "folder"], 1, "folder", ""),
    (["export", "student.pt"], 1, "no such file: student.pt", ""),
    (["export", "text.pt"], 1, "text.pt is not a kd checkpoint", ""),
    (["bench"], 1, "no teacher in weights/ or runs/", "kd demo"),
    (["bench", "none.onnx"], 1, "none.onnx", ""),
    (["bench", "text.onnx"], 1, "text.onnx", ""),
    (["validate"], 1, "no teacher in weights/ or runs/", "kd demo"),
    (["convert-caffe", "none.caffemodel"], 1, "none.caffemodel", ""),
    (["convert-caffe", "text.pt"], 1, "text.pt", ""),
    (["convert-caffe", "text.npy"], 1, "text.npy", ""),
    (["download", "imagenet"], 2, "imagenet", "cifar10"),
    (["demo", "-o", "text.pt"], 2, "text.pt", ""),
]


@pytest.mark.parametrize(("words", "code", "error", "hint"), WRONG, ids=lambda value: str(value)[:40])
def test_usage_error_is_one_line(kd: Kd, words: list[str], code: int, error: str, hint: str) -> None:
    for name in ("text.pt", "text.onnx", "text.npy"):
        Path(name).write_text("this is text\n")
    Path("folder").mkdir()
    before = sorted(path.as_posix() for path in Path().rglob("*"))
    outcome = kd(*words)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert is_clean(outcome.err)
    lines = outcome.err.splitlines()
    [said] = [line for line in lines if line.startswith("error: ")]
    assert error in said
    assert [line for line in lines if line.startswith("hint: ")] == lines[lines.index(said) + 1 :]
    assert hint in (lines[-1] if lines[-1].startswith("hint: ") else "")
    after = sorted(path.as_posix() for path in Path().rglob("*") if "cache" not in path.parts)
    assert after == before  # nothing half-written


def test_missing_model_hint_lists_students(kd: Kd) -> None:
    for name in ("alpha", "beta run"):
        Path(f"runs/{name}").mkdir(parents=True)
        Path(f"runs/{name}/student.pt").write_bytes(b"")
    Path("runs/moved").mkdir()
    Path("runs/moved/student.pt").symlink_to("nowhere.pt")
    outcome = kd("export", "other.pt")
    assert "no such file: other.pt" in outcome.err
    assert outcome.code == 1
    assert "runs/alpha/student.pt" in outcome.err
    assert "'runs/beta run/student.pt'" in outcome.err


def test_control_characters_are_not_printed(kd: Kd) -> None:
    outcome = kd("test", "\x1b[31mred\x07.pt")
    assert outcome.code == 1
    assert is_clean(outcome.err)
    assert "[31mred" in outcome.err


STEERING = "a\x1b[31m\x07b \x9b2J\u202ec :cat: \udcff[bold]"


@pytest.mark.parametrize(
    "words", [("info",), ("info", "--json"), ("predict", "a.png"), ("predict", "a.png", "--json")]
)
def test_texts_of_a_model_do_not_steer_the_terminal(kd: Kd, words: tuple[str, ...]) -> None:
    classes = tuple(f"{number}{STEERING}" for number in range(10))
    digits_student(Path("m.pt"), classes=classes, **{STEERING: STEERING})
    Image.new("L", (8, 8)).save("a.png")
    outcome = kd(words[0], "m.pt", *words[1:])
    assert outcome.code == 0, outcome.err
    assert is_clean(outcome.out), outcome.out
    if "--json" in words:
        assert tuple(json.loads(outcome.out)["classes"]) == classes
    else:
        assert ":cat:" in outcome.out  # nor are they markup
        assert "[bold]" in outcome.out


def test_progress_notes_and_tracebacks_do_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "settings", output.OutputSettings())
    output.on_event(Progress(STEERING, 1, 2))
    output.on_event(Note(STEERING))
    output.note(output.activity.line())
    output.next_command(f"kd export {STEERING}")
    output.table([STEERING, "b"], [])
    output.text(STEERING)
    output.settings.debug = True
    try:
        raise KdError(STEERING, STEERING)
    except KdError as error:
        output.error(error)
    shown = capfd.readouterr()
    assert ":cat:" in shown.out
    assert "Traceback" in shown.err
    assert is_clean(shown.out + shown.err.replace("Traceback", "")), shown


@pytest.mark.parametrize("command", ["test", "report"])
def test_endless_files_that_a_model_names_are_not_read(kd: Kd, command: str) -> None:
    made = kd("train", "--method", "ce", *QUICK, "--name", "t")
    assert made.code == 0, made
    os.truncate(os.open("huge.pt", os.O_CREAT | os.O_WRONLY), 1 << 40)
    os.mkfifo("cifar-10-python.tar.gz")
    target, *options = (
        ["runs/t/student.pt"] if command == "test" else ["runs/t", "--no-bench", "-o", "r.html"]
    )
    for teacher in ("huge.pt", "cifar-10-python.tar.gz", "/dev/zero", "x" * 300):
        digits_student(Path("runs/t/student.pt"), teacher={"path": teacher, "sha256": 64 * "0"})
        outcome = kd(command, target, *options)
        assert outcome.code == 0, outcome.err
        assert teacher in outcome.err
    for spec in ("huge.pt", "cifar-10-python.tar.gz", "/dev/zero", "x" * 300):
        digits_student(Path("runs/t/student.pt"), data={"spec": spec})
        outcome = kd(command, target, *options)
        assert outcome.code == (1 if command == "test" else 0), outcome.err
        assert spec.rpartition("/")[2] in outcome.err
        assert "which is not here as a folder or an archive of at most 16.0 GB" in outcome.err


@pytest.mark.parametrize("depth", [80, 3000])
def test_deep_recipe_is_one_line(kd: Kd, depth: int) -> None:
    Path("r.toml").write_text(f"a={depth * '['}{depth * ']'}")
    outcome = kd("train", "--config", "r.toml")
    assert outcome.code == 2
    assert outcome.err.startswith("error: cannot read r.toml: ")
    assert outcome.err.count("\n") == 2
    assert "\nhint: A recipe is TOML" in outcome.err


def test_name_of_a_recipe_is_a_plain_folder_name(kd: Kd) -> None:
    for name in ("x\\u001b[31m", "x\\u009b", "x\\u202e", "x\\n"):
        Path("r.toml").write_text(f'name = "{name}"\nmethod = "ce"\ndata = "digits"\n')
        outcome = kd("train", "--config", "r.toml")
        assert outcome.code == 2
        assert "must be a plain folder name" in outcome.err
        assert is_clean(outcome.err)


def test_empty_data_option_is_an_error(kd: Kd) -> None:
    made = kd("train", "--method", "ce", *QUICK, "--name", "t")
    assert made.code == 0, made
    outcome = kd("test", "runs/t/student.pt", "--data", "")
    assert outcome.code == 2
    assert "error: no dataset or path: (empty)" in outcome.err


FAST = ["--data", "digits", "--precision", "32", "--threads", "1"]
QUICK = [*FAST, "--student", "convnet-tiny", "--epochs", "1", "--batch-size", "64"]


def test_train_and_test_with_underscore_options(kd: Kd) -> None:
    made = kd("train", "--method", "ce", *QUICK, "--name", "t", "--json")
    assert made.code == 0, made
    report = json.loads(made.out)
    assert report["schema_version"] == 2
    assert Path("runs/t/curves.svg").read_text().lstrip().startswith("<?xml")
    again = kd(
        "train", "--method", "noisy", *QUICK, "--teacher", "runs/t/student.pt", "--noisy_ratio", "0.25",
        "--noisy_sigma=0.1", "--batch_size", "32", "--name", "n",
    )  # fmt: skip
    assert again.code == 0, again
    config = Path("runs/n/config.toml").read_text()
    assert "noisy_ratio = 0.25" in config
    assert "noisy_sigma = 0.1" in config
    assert "batch_size = 32" in config
    assert "next: kd export runs/n/student.pt" in again.out
    assert is_clean(again.out + again.err)
    tested = json.loads(kd("test", "runs/n/student.pt", "--json").out)
    assert tested["teacher"] == "runs/t/student.pt"
    assert tested["test"]["count"] == 360
    assert (
        tested["test"]["accuracy"] == json.loads(Path("runs/n/result.json").read_text())["test"]["accuracy"]
    )
    shown = kd("test", "runs/n", "--plot", "confusion.png")  # a run's folder stands for its student
    assert shown.code == 0, shown
    assert f"{tested['test']['accuracy']:.2f}" in shown.out
    assert Path("confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_given_by_its_name(kd: Kd) -> None:
    made = kd("train", "--method", "ce", *QUICK, "--name", "first-run")
    assert made.code == 0, made
    none = kd("train", "--resume")
    assert (none.code, none.err.splitlines()[0]) == (1, "error: no interrupted run in runs/")
    for words in ("info", "export", "reproduce", "report --no-bench"):
        outcome = kd(*words.split(), "first-run")
        assert outcome.code == 0, outcome
    assert Path("exports/first-run.onnx").is_file()
    for words in ("export", "train --resume"):
        assert "hint: Did you mean first-run?" in kd(*words.split(), "firstrun").err
    Path("runs/first-run/result.json").unlink()
    for words in ("train --resume", "train --resume first-run", "train --resume -q"):
        outcome = kd(*words.split())
        assert outcome.code == 0, outcome
        assert Path("runs/first-run/result.json").is_file()
        Path("runs/first-run/result.json").unlink()


def test_test_images_other_than_the_recorded_ones_are_noted(kd: Kd) -> None:
    fingerprint = load("digits").test.fingerprint
    for recorded, words, noted in (
        (fingerprint, (), False),
        ("0" * 64, (), True),
        ("0" * 64, ("--data", "digits"), False),
    ):
        digits_student(Path("s.pt"), data={"spec": "digits", "fingerprint_test": recorded})
        tested = kd("test", "s.pt", "--threads", "1", *words)
        assert (tested.code, "not the test images" in tested.err) == (0, noted)


def test_a_figure_of_too_many_classes_is_refused(kd: Kd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.cli.test._MOST_DRAWN", 9)
    refused = kd("test", str(digits_student(Path("s.pt"))), "--plot", "confusion.png")
    assert refused.code == 2
    assert "error: --plot: 10 classes are too many for a figure, which has 9 at most" in refused.err
    assert not Path("confusion.png").exists()


def test_options_override_recipe(kd: Kd) -> None:
    Path("r.toml").write_text('epochs = 7\n"batch-size" = 128\nmethod = "ce"\ndata = "digits"\n')
    words = [
        "train",
        "--recipe",
        "r.toml",
        *FAST,
        "--student",
        "convnet-tiny",
        "--epochs",
        "1",
        "--name",
        "r",
    ]
    assert kd(*words).code == 0
    config = Path("runs/r/config.toml").read_text()
    assert "epochs = 1\n" in config
    assert "batch_size = 128" in config
    assert kd("train", "--config", "runs/r/config.toml", "--name", "again").code == 0
    assert Path("runs/again/config.toml").read_text() == config
    Path("lambda.toml").write_text("lambda = 0.75\n")
    assert make(TrainConfig, read_recipe("lambda.toml")).lamda == 0.75
    Path("bad.toml").write_text("epoch = 3\n")
    outcome = kd("train", "--recipe", "bad.toml")
    assert outcome.code == 2
    assert "unknown setting: epoch" in outcome.err
    for twice in ("lambda = 0.5\nlamda = 0.3\n", '"batch-size" = 8\nbatch_size = 16\n'):
        Path("twice.toml").write_text(twice)
        outcome = kd("train", "--recipe", "twice.toml")
        assert outcome.code == 2
        assert "twice, the second time as" in outcome.err


def test_lambda_option_alias(kd: Kd) -> None:
    assert kd("train", "--method", "ce", *QUICK, "--lambda", "0.75", "--name", "x").code == 0
    assert make(TrainConfig, read_recipe("runs/x/config.toml")).lamda == 0.75


def test_help_imports_no_heavy_modules() -> None:
    code = (
        "import sys; sys.argv = ['kd', '--help']\n"
        "from kdcli.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "[]", done


def test_modules_of_commands_import_no_torch() -> None:
    names = "', 'kdcli.cli.".join(name.replace("-", "_") for name in cli.COMMANDS)
    code = (
        f"import sys, importlib\nfor name in ['kdcli.cli.{names}']:\n    importlib.import_module(name)\n"
        "print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "[]\n", done


def test_settings_have_help_texts() -> None:
    for settings in (TrainConfig, ConvertConfig):
        for name, field in settings.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name


def test_hints_name_the_command(kd: Kd) -> None:
    assert kd("train", "--lr", "-1").err.endswith("hint: See: kd train --help-all\n")
    hint = kd("train", "--method", "ce", "--data", "cifar10", "--data-dir", "my data").err.splitlines()[-1]
    assert hint.endswith("or download it: kd download cifar10 --data-dir 'my data'")


def test_same_folder_in_other_words_has_the_recorded_settings(kd: Kd) -> None:
    image_folder(Path("photos"))
    words = ("--threads", "1", "--epochs", "1", "--student", "convnet-tiny")
    made = kd(
        "train",
        "--method",
        "ce",
        "--data",
        "photos/",
        "--image-size",
        "8",
        "--resize",
        "10",
        "--name",
        "t",
        *words,
    )
    assert made.code == 0, made
    made = kd("train", "--teacher", "t", "--data", str(Path("photos").resolve()), *words)
    assert made.code == 0, made
    assert models.load(Path("runs/kd-convnet-tiny-1/student.pt")).resize == 10


def test_the_working_folder_as_data_is_found_again(kd: Kd, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(Path("photos"))
    monkeypatch.chdir("photos")
    words = ("--threads", "1", "--epochs", "1", "--student", "convnet-tiny")
    for more in (("--method", "ce", "--data", ".", "--name", "t"), ("--teacher", "t")):
        made = kd("train", *more, *words)
        assert made.code == 0, made
    assert kd("test", "t").code == 0
    assert len(list(Path("cache/data").iterdir())) == 1


def test_a_folder_named_like_a_data_set_is_noted(kd: Kd) -> None:
    Path("digits").mkdir()
    assert "digits is the data set of that name; what lies here is ./digits" in kd("data", "digits").err


def test_compare_notes_options_that_the_student_does_not_read(kd: Kd) -> None:
    outcome = kd("compare", "--methods", "ce,ls", "--seeds", "1", "--dropout", "0.2", *QUICK)
    assert "--dropout has no effect with --student convnet-tiny, which takes none" in outcome.err


def test_ignored_options_are_noted(kd: Kd) -> None:
    outcome = kd("train", *QUICK, "--dropout", "0.3", "--tau", "2", "--method", "ce")
    assert "--dropout has no effect with --student convnet-tiny, which takes none" in outcome.err
    assert "--tau has no effect with --method ce" in outcome.err
    assert "accuracy on the validation split" in outcome.out
    assert "--images has no effect without --against" in kd("validate", "--images", "3").err
    words = ("export", "runs/ce-convnet-tiny-1", "--calibration-images", "3", "--data", "nowhere")
    assert "--calibration-images has no effect without --int8" in kd(*words).err


def test_out_of_memory_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert as_kd_error(caught.value).message == "out of memory"
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert as_kd_error(on_gpu).message == "out of memory"


def test_sigterm_exit_code() -> None:
    code = (
        "import os, signal\nfrom kdcli.cli import app\n"
        "app._register = lambda arguments: os.kill(os.getpid(), signal.SIGTERM)\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "bench"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        143,
        "",
        "error: stopped\nhint: Rerun the same command.\n",
    )
