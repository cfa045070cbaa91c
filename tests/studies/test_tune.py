"""`kd tune`: ranges as typed, every trial once whatever happens, test images unread, the best run repeatable."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from PIL import Image
from sqlalchemy.exc import OperationalError

from kdcli import engine
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Epoch, Event, Note
from kdcli.base.files import host_name
from kdcli.cli import train as cli_train
from kdcli.cli import tune as cli_tune
from kdcli.data import Splits
from kdcli.engine import read_metrics
from kdcli.methods import TrainConfig
from kdcli.studies.tune import search, study, summary
from kdcli.studies.tune.search import tune
from kdcli.studies.tune.space import FIXED, Choice, Range, Space, TuneConfig, read_by, read_space
from kdcli.studies.tune.study import read_url, readable_errors
from kdcli.studies.tune.summary import TuneResult, command_of
from tests.helpers import ROOT, command_line, digits_student, make_splits

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PLAIN = {
    "method": "ce",
    "student": "convnet-tiny",
    "epochs": 2,
    "batch_size": 16,
    "lr": 1e-2,
    "precision": "32",
    "threads": 1,
    "val_fraction": 0.2,
    "trials": 3,
    "study": "toy",
}


def config(**changes: Any) -> TuneConfig:
    return make(TuneConfig, {**PLAIN, **changes})


@pytest.fixture
def splits() -> Splits:
    return make_splits()


def search_for(
    splits: Splits, *ranges: str, on_event: Any = lambda event: None, **changes: Any
) -> TuneResult:
    wanted = config(**changes)
    return tune(wanted, read_space(ranges, wanted.train), splits, on_event=on_event)


def fake_fit(accuracy: Any) -> Any:
    """A `fit` that trains nothing: accuracies are a function of settings and epoch."""

    @dataclass(frozen=True)
    class Fake:
        config: TrainConfig
        val_accuracy: float

    def fit(run: TrainConfig, data: Splits, *, test: bool, on_event: Any) -> Fake:
        assert not test
        place = run.runs_dir / run.name
        place.mkdir(parents=True)
        (place / "last.pt").touch()
        for epoch in range(1, run.epochs + 1):
            on_event(Epoch(epoch, run.epochs, 0.0, accuracy(run, epoch)))
        (place / "student.pt").touch()
        return Fake(run, accuracy(run, run.epochs))

    return fit


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip figures and importance, which take longer than the fake trials."""
    monkeypatch.setattr(summary, "importance", lambda study, trials: ({}, "skipped"))
    monkeypatch.setattr(summary, "draw_history", lambda trials, target: target.touch())


def stored(path: Path = Path("runs/toy/study.db"), name: str = "toy") -> list[optuna.trial.FrozenTrial]:
    """The study's trials, as Optuna itself reads them."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}").get_trials()


# --- ranges ------------------------------------------------------------------------------------------------


def space_of(*texts: str, **changes: Any) -> Space:
    return read_space(texts, make(TrainConfig, {"method": "kd", **changes}))


def test_read_space_examples() -> None:
    assert space_of("tau=1:10", "lambda=0:1") == (
        Range("tau", 1.0, 10.0, False),
        Range("lamda", 0.0, 1.0, False),
    )
    assert space_of("batch-size=16:256:log") == (Range("batch_size", 16, 256, True),)
    assert space_of("batch_size=32|64") == (Choice("batch_size", (32, 64)),)
    assert space_of("lr=1e-4:1e-1") == (Range("lr", 1e-4, 0.1, True),)  # by ratio without saying so
    assert space_of("lr=1e-4:1e-1:linear") == (Range("lr", 1e-4, 0.1, False),)
    assert space_of("weight-decay=0:1e-2") == (Range("weight_decay", 0.0, 0.01, False),)
    assert space_of("optimizer=adam|sgd", "augment=none|crop-flip") == (
        Choice("optimizer", ("adam", "sgd")),
        Choice("augment", ("none", "flip-crop")),  # as the option understands it
    )
    assert space_of("ce-weight=0:2") == (Range("ce_weight", 0.0, 2.0, False),)
    assert space_of("teacher=a/t.pt|b/t.onnx") == (Choice("teacher", ("a/t.pt", "b/t.onnx")),)
    assert space_of("noisy-ratio=0:1", method="noisy") == (Range("noisy_ratio", 0.0, 1.0, False),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tau", "neither a range nor a choice"),
        ("tau=", "neither a range nor a choice"),
        ("tau=3", "neither a range nor a choice"),
        ("tau=1:2:3", "neither a range nor a choice"),
        ("tau=1:2:cube", "neither a range nor a choice"),
        ("tau=low:high", "--tau low: must be a valid number"),
        ("tau=5:1", "5.0 is not below 1.0"),
        ("tau=2:2", "2.0 is not below 2.0"),
        ("tau=0:5", "--tau 0: must be greater than 0"),
        ("tau=1:1001", "--tau 1001: must be less than or equal to 1000"),
        ("lamda=-0.1:1", "--lamda -0.1"),
        ("lamda=0:1:log", "a logarithmic range starts above 0"),
        ("kd-weight=0:inf", "inf is not finite"),
        ("kd-weight=nan:1", "--kd-weight nan"),
        ("epochs=1:2.5", "--epochs 2.5: must be a valid integer"),
        ("dropout=0|1", "--dropout 1: must be less than 1"),
        ("optimizer=adam|lion", "--optimizer lion"),
        ("optimizer=adam:sgd", "neither a range nor a choice"),
        ("optimizer=adam|adam", "a value occurs twice"),
        ("augment=flip|twirl", "--augment twirl"),
        ("method=kd|magic", "unknown method: magic"),
        ("temperature=1:2", "no such setting"),
        ("noisy-sigma=0:1", "--noisy-sigma is not read by kd"),
    ],
)
def test_read_space_refuses_malformed_ranges(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        space_of(text)
    assert said in caught.value.message
    assert text.split("=", maxsplit=1)[0] in caught.value.message


def test_every_setting_is_tunable_or_fixed() -> None:
    for name, field in TrainConfig.model_fields.items():
        if name in FIXED:
            with pytest.raises(UsageError, match=re.escape(FIXED[name])):
                space_of(f"{name}=1|2")
            continue
        kinds = str(field.annotation)
        numeric = "int" in kinds or "float" in kinds
        methods_of = next(
            (m for m in ("kd", *studies_methods()) if not unread(m, name)),
            None,
        )
        assert methods_of is not None, name
        if numeric:
            [part] = space_of(f"{name}=0.5:0.75" if "float" in kinds else f"{name}=1:2", method=methods_of)
            assert isinstance(part, Range) and part.name == name
    with pytest.raises(UsageError, match="given twice"):
        space_of("tau=1:2", "tau=3:4")
    with pytest.raises(UsageError, match="nothing to tune"):
        space_of()


def studies_methods() -> list[str]:
    from kdcli import methods

    return list(methods.METHODS)


def unread(method: str, name: str) -> list[str]:
    from kdcli import methods

    return methods.unread(method, [name])


def test_read_by_selects_settings_of_a_method() -> None:
    space = space_of("method=kd|noisy", "tau=1:10", "noisy-ratio=0:1", "lr=1e-3:1e-2")
    assert [part.name for part in read_by(space, "kd")] == ["method", "tau", "lr"]
    assert [part.name for part in read_by(space, "noisy")] == ["method", "noisy_ratio", "lr"]
    with pytest.raises(UsageError, match="--noisy-ratio is not read by ce, kd"):
        space_of("method=ce|kd", "noisy-ratio=0:1")


@settings(deadline=None)
@given(
    low=st.floats(1e-6, 999),
    high=st.floats(1e-6, 999),
    scale=st.sampled_from(["", ":log", ":linear"]),
)
def test_read_space_accepts_ordered_bounds(low: float, high: float, scale: str) -> None:
    text = f"tau={low!r}:{high!r}{scale}"
    if low < high:
        assert space_of(text) == (Range("tau", low, high, scale == ":log"),)
        assert space_of(str(space_of(text)[0])) == space_of(text)
    else:
        with pytest.raises(UsageError):
            space_of(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_read_space_of_any_text_raises_only_usage_errors(text: str) -> None:
    for written in (text, f"tau={text}", f"optimizer={text}", f"epochs={text}"):
        try:
            found = space_of(written)
        except UsageError as error:
            assert error.message
        else:
            assert len(found) == 1


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tau": st.floats(1e-3, 1000),
            "lamda": st.floats(0, 1),
            "lr": st.floats(1e-9, 100),
            "batch_size": st.integers(1, 10**6),
            "optimizer": st.sampled_from(["adam", "adamw", "sgd"]),
            "grey": st.booleans(),
            "teacher": st.sampled_from(
                ["weights/teacher.pt", "my teacher's.pt", "$(x).onnx", ("a.pt", "b.pt")]
            ),
            "weight": st.sampled_from([(), ("at=0:1000:1", "kd=2")]),
            "seed": st.integers(0, 2**63 - 1),
            "ce_weight": st.none() | st.floats(0, 9),
        },
    )
)
def test_command_of_round_trip(values: dict[str, Any]) -> None:
    wanted = make(TrainConfig, values)
    words = shlex.split(command_of(wanted))
    assert words[:2] == ["kd", "train"]
    typed: dict[str, Any] = {}
    rest = iter(words[2:])
    for word in rest:
        name, value = word[2:].replace("-", "_"), True if word == "--grey" else next(rest)
        typed[name] = (*typed.get(name, ()), value) if name in ("teacher", "weight") else value
    assert make(TrainConfig, typed) == wanted


# --- the search --------------------------------------------------------------------------------------------


class _Unreadable:
    """Test images that nobody may look at; that they have a fingerprint is known."""

    fingerprint = "unread"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"test images were read: {name}")

    def __len__(self) -> int:
        raise AssertionError("test images were counted")


def test_tune_reads_no_test_images_and_best_command_repeats(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    blind = replace(splits, test=_Unreadable())  # type: ignore[arg-type]
    found = search_for(blind, "lr=1e-3:1e-1", "optimizer=adam|sgd", on_event=events.append)
    assert [trial.state for trial in found.trials] == ["complete"] * 3
    assert found.best is not None and found.config is not None
    assert found.best.accuracy == max(trial.accuracy or 0 for trial in found.trials)
    assert all(1e-3 <= trial.values["lr"] <= 1e-1 for trial in found.trials)  # type: ignore[operator]
    assert not any(isinstance(event, Epoch) for event in events)  # they are the search's own
    for trial in found.trials:
        place = Path(f"runs/toy/trial-{trial.number:04d}")
        assert (place / "config.toml").is_file()
        assert json.loads((place / "result.json").read_text())["test"] is None
        assert (place / "student.pt").is_file() == (trial == found.best)
        assert not list(place.glob("last*.pt"))
        assert any(isinstance(event, Note) and f"trial {trial.number}:" in event.text for event in events)

    words = shlex.split(command_of(found.config))
    call = command_line(monkeypatch, cli_train, cli_tune)
    monkeypatch.setattr("kdcli.data.load", lambda *args, **kwargs: splits)
    again = json.loads(call(*words[1:], "--json", "--runs-dir", "again").stdout)
    assert again["val_accuracy"] == found.best.accuracy
    assert again["test"]["count"] == len(splits.test)
    import torch

    from kdcli.models import checkpoint

    one = checkpoint.load(Path(again["run"]) / "student.pt").state_dict
    two = checkpoint.load(Path(f"runs/toy/trial-{found.best.number:04d}/student.pt")).state_dict
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fit_without_test_emits_epochs_and_no_test_figures(workplace: Path, splits: Splits) -> None:
    events: list[Event] = []
    run = make(TrainConfig, {k: v for k, v in PLAIN.items() if k in TrainConfig.model_fields})
    result = engine.fit(run, splits, test=False, on_event=events.append)
    epochs = [event for event in events if isinstance(event, Epoch)]
    lines = [line for line in read_metrics(result.run.metrics_file) if line.kind == "epoch"]
    assert [(e.epoch, e.epochs, e.loss, e.val_accuracy) for e in epochs] == [
        (line.epoch, 2, line.loss, line.val_accuracy) for line in lines
    ]
    assert result.test is None and result.to_dict()["test"] is None
    with pytest.raises(KdError, match="no test figures"):
        result.evaluation  # noqa: B018


@pytest.mark.usefixtures("undrawn")
def test_tune_is_repeatable_with_one_process(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = ("lr=1e-3:1e-1", "batch-size=8|16|32")
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50 + run.lr))

    def values(found: TuneResult) -> list[tuple[Any, float | None]]:
        return [(trial.values, trial.accuracy) for trial in found.trials]

    whole = values(search_for(splits, *ranges, trials=3, sampler="random", pruner="none"))
    assert len({str(one) for one, _ in whole}) == 3
    for trials in (1, 3):  # stopped once
        parts = values(
            search_for(splits, *ranges, trials=trials, sampler="random", pruner="none", runs_dir="b")
        )
        assert parts == whole[:trials]
    other = values(search_for(splits, *ranges, trials=1, sampler="random", runs_dir="c", seed=1))
    assert other[0][0] != whole[0][0]
    again = search_for(splits, *ranges, trials=3, sampler="random", pruner="none")
    assert values(again) == whole  # nothing was left to do


@pytest.mark.usefixtures("undrawn")
def test_median_pruner_stops_trials(workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []

    def accuracy(run: TrainConfig, epoch: int) -> float:
        seen.append((run.lr, epoch))
        return 10 * epoch - math.log10(run.lr)  # the lower the rate the better

    monkeypatch.setattr(search, "fit", fake_fit(accuracy))
    found = search_for(splits, "lr=1e-5:1", trials=10, epochs=2, sampler="random")
    done = [trial for trial in found.trials if trial.state == "complete"]
    pruned = [trial for trial in found.trials if trial.state == "pruned"]
    assert len(done) + len(pruned) == 10 and len(pruned) >= 2
    for trial in pruned:  # by the rule: worse than the median of those finished before it, at its first epoch
        before = [1 * 10 - math.log10(t.values["lr"]) for t in done if t.number < trial.number]  # type: ignore[arg-type]
        mine = 10 - math.log10(trial.values["lr"])  # type: ignore[arg-type]
        assert len(before) >= 5 and mine < np.median(before)
        assert [epoch for rate, epoch in seen if rate == trial.values["lr"]] == [1]
    for trial in done[5:]:
        before = [10 - math.log10(t.values["lr"]) for t in done if t.number < trial.number]  # type: ignore[arg-type]
        assert 10 - math.log10(trial.values["lr"]) >= np.median(before)  # type: ignore[arg-type]
    assert not list(Path("runs/toy").glob("*/last*.pt"))
    kept = list(Path("runs/toy").glob("*/student.pt"))
    assert found.best is not None and kept == [Path(f"runs/toy/trial-{found.best.number:04d}/student.pt")]
    assert min(done, key=lambda trial: trial.values["lr"]) == found.best
    notes: list[Event] = []
    unpruned = search_for(
        splits, "lr=1e-5:1", trials=7, epochs=2, sampler="random", pruner="none", study="all"
    )
    assert unpruned.count("complete") == 7
    search_for(splits, "epochs=2:9", trials=1, study="long", on_event=notes.append)
    assert any(isinstance(event, Note) and "different --epochs" in event.text for event in notes)


def test_pruned_run_leaves_complete_files(workplace: Path, splits: Splits) -> None:
    def end(event: Event) -> None:
        if isinstance(event, Epoch):
            raise optuna.TrialPruned

    run = make(
        TrainConfig, {**{k: v for k, v in PLAIN.items() if k in TrainConfig.model_fields}, "name": "cut"}
    )
    with pytest.raises(optuna.TrialPruned):
        engine.fit(run, splits, test=False, on_event=end)
    assert sorted(path.name for path in Path("runs/cut").iterdir()) == [
        "config.toml",
        "environment.json",
        "lock",
        "metrics.jsonl",
    ]
    assert [line.epoch for line in read_metrics(Path("runs/cut/metrics.jsonl"))] == [1]


@pytest.mark.usefixtures("undrawn")
def test_tune_seeds_report_running_mean(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 10.0 * (run.seed + 1) * epoch))
    found = search_for(splits, "lr=1e-3:1", trials=1, seeds=3, seed=4)
    [trial] = found.trials
    assert trial.accuracies == (100.0, 120.0, 140.0)  # seeds 4, 5, 6 after two epochs
    assert trial.accuracy == 120.0
    assert found.config is not None and found.config.seed == 4
    [kept] = stored()
    # each epoch is judged by the mean over the seeds so far
    assert kept.intermediate_values == {
        1: 50.0, 2: 100.0, 3: (100 + 60) / 2, 4: 110.0, 5: (220 + 70) / 3, 6: 120.0,
    }  # fmt: skip
    assert sorted(path.name for path in Path("runs/toy/trial-0000").iterdir()) == [
        "seed-4",
        "seed-5",
        "seed-6",
    ]


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_tune_counts_failed_trials_with_reason(workplace: Path, splits: Splits) -> None:
    notes: list[Event] = []
    found = search_for(
        splits, "lr=90|1e-2", "optimizer=sgd|adam", "weight-decay=0|1", trials=4, sampler="random",
        epochs=2, on_event=notes.append,
    )  # fmt: skip
    states = [trial.state for trial in found.trials]
    assert len(states) == 4 and "failed" in states and found.best is not None
    for trial in found.trials:
        if trial.state == "failed":
            assert "no longer finite" in trial.reason and trial.values["lr"] == 90
            assert any(isinstance(e, Note) and f"trial {trial.number}: failed" in e.text for e in notes)


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_tune_out_of_memory_fails_trial(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def accuracy(run: TrainConfig, epoch: int) -> float:
        raise fault

    monkeypatch.setattr(search, "fit", fake_fit(accuracy))
    found = search_for(splits, "batch-size=8:64", trials=2)
    assert [(trial.state, trial.reason) for trial in found.trials] == [("failed", "out of memory")] * 2
    assert found.best is None and found.figure is None


@pytest.mark.usefixtures("undrawn")
def test_tune_invalid_command_counts_no_trial(workplace: Path, splits: Splits) -> None:
    with pytest.raises(KdError, match=r"nowhere\.pt"):
        search_for(splits, "tau=1:9", method="kd", teacher="nowhere.pt")
    with pytest.raises(UsageError, match="unknown network"):
        search_for(splits, "lr=1e-3:1", student="resnet9000")
    with pytest.raises(UsageError, match="has 1 distinct view"):
        search_for(splits, "optimizer=adam|sgd", views=7)
    assert stored() and not any("reason" in trial.user_attrs for trial in stored())
    # the study has had no trial, so it takes other settings and other values of them
    found = search_for(splits, "optimizer=adam|adamw", trials=1)
    assert [trial.state for trial in found.trials] == ["complete"]


def test_tune_full_disk_requeues_trial(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(run: TrainConfig, epoch: int) -> float:
        raise KdError("cannot write", "kd train --resume") from OSError(28, "No space left on device")

    monkeypatch.setattr(search, "fit", fake_fit(accuracy))
    with pytest.raises(KdError, match="cannot write") as caught:
        search_for(splits, "lr=1e-3:1", trials=2)
    assert caught.value.hint == "Fix it, then rerun the same command to continue."
    assert [trial.state for trial in stored()] == [TrialState.FAIL, TrialState.WAITING]


def test_tune_continues_after_an_error_in_the_first_trial(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(config: TrainConfig, *_: Any, **__: Any) -> None:
        (config.runs_dir / config.name).mkdir(parents=True)
        raise RuntimeError("of the user's network")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(search, "fit", fit)
        search_for(splits, "lr=1e-3:1", trials=1)
    assert Path("runs/toy/trial-0000").exists()
    assert len(search_for(splits, "lr=1e-3:1", trials=1).trials) == 1


@pytest.mark.parametrize(
    ("changes", "ranges", "said"),
    [
        ({"val_fraction": 0}, ["lr=1e-3:1"], "--val-fraction 0"),
        ({"method": "magic"}, ["lr=1e-3:1"], "unknown method"),
        ({}, ["dropout=0:0.5"], "convnet-tiny has no dropout"),
        ({"student": "torchvision:resnet18"}, ["width=0.5:2"], "torchvision:resnet18 has no width"),
        ({"assistant": ("lenet",)}, ["lr=1e-3:1"], "leave out --assistant"),
        ({"generations": 2}, ["lr=1e-3:1"], "leave out --generations"),
        ({"unlabelled": "more"}, ["lr=1e-3:1"], "method ce reads labels"),
        ({"cache_top_k": 2}, ["method=kd|logits"], "method logits regresses all logits"),
        ({"teacher": ("a.pt", "b.pt")}, ["method=kd|at"], "method at reads features"),
        ({"views": 2}, ["augment=flip|none"], "augment none has 1 distinct view"),
        ({"augment": "flip"}, ["views=1:3"], "augment flip has 2 distinct view"),
        ({"weight": ("kd=2",)}, ["method=kd|logits"], "method logits has no such term"),
    ],
)
def test_tune_refuses_invalid_settings(
    workplace: Path, splits: Splits, changes: dict[str, Any], ranges: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        search_for(splits, *ranges, **changes)
    assert not Path("runs").exists()


def test_tune_refuses_classes_of_one_image(workplace: Path) -> None:
    with pytest.raises(UsageError, match="keeps no image"):
        search_for(make_splits(train=3), "lr=1e-3:1")


@pytest.mark.usefixtures("undrawn")
def test_tune_refuses_changed_settings(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50.0))
    search_for(splits, "lr=1e-3:1", trials=1)
    for changes, said in [
        ({"batch_size": 8}, "--batch-size was 16, is 8"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sampler": "random"}, "sampler was tpe, is random"),
        ({"seeds": 2}, "seeds was 1, is 2"),
        ({"weight": ("ce=2",)}, r"weight was \[\], is \['ce=2'\]"),
        ({"view_seed": 3}, "--view-seed was None, is 3"),
    ]:
        with pytest.raises(UsageError, match=said) as caught:
            search_for(splits, "lr=1e-3:1", trials=1, **changes)
        assert "--study" in caught.value.hint
    with pytest.raises(UsageError, match="tune was"):
        search_for(splits, "lr=1e-3:0.5", trials=1)
    with pytest.raises(UsageError, match="train images was"):
        search_for(make_splits(train=93), "lr=1e-3:1", trials=1)
    # where it works, and how many trials there are, may change
    assert len(search_for(splits, "lr=1e-3:1", trials=2, threads=2, cache_dir="c", data_dir="d").trials) == 2
    Path("runs/toy/study.db").unlink()
    with pytest.raises(UsageError, match="trials of a study that is not in the storage"):
        search_for(splits, "lr=1e-3:1", trials=1)


def test_storage_errors_hide_passwords(workplace: Path, splits: Splits) -> None:
    Path("noise.db").write_bytes(b"this is no database, it only looks like a file " * 40)
    optuna.create_study(storage="sqlite:///other.db", study_name="toy").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    for url, said in [
        ("sqlite:///noise.db", "not a database"),
        ("sqlite:///noise.db/x.db", "noise.db"),
        ("sqlite:///other.db", "was started with other settings"),
        ("sqlite://", "plain file or a database server"),
        ("sqlite:///:memory:", "plain file or a database server"),
        ("nonsense s3cret", "not a database URL"),
        ("nosuchdb://user:s3cret@host/name", "nosuchdb"),
        ("mysql+nosuchdriver://user:s3cret@host/name?ssl_key=s3cret", "nosuchdriver"),
        ("postgresql://user:s3cret@127.0.0.1:1/name", "storage postgresql"),
    ]:
        with pytest.raises(KdError) as caught:
            search_for(splits, "lr=1e-3:1", storage=url)
        assert said in caught.value.message, (url, caught.value.message)
        assert "s3cret" not in caught.value.message + caught.value.hint
        assert "\n" not in caught.value.message and caught.value.hint
    url = read_url("postgresql://user:s3cret@host/name?sslpassword=pr1vate", Path("unused"))
    with pytest.raises(KdError) as caught, readable_errors(url):
        raise OperationalError("SELECT 1", {}, Exception("no role user with s3cret and pr1vate\nin line 2"))
    assert caught.value.message == (
        "storage postgresql://user:***@host/name?sslpassword=hidden: no role user with *** and ***"
    )
    braces = search_for(splits, "lr=1e-3:1", storage="sqlite:///{SCHEMA_VERSION.__class__}.db", trials=1)
    assert len(braces.trials) == 1
    assert Path("{SCHEMA_VERSION.__class__}.db").is_file()  # a name, and not filled in


# --- what was found ----------------------------------------------------------------------------------------


def test_importance_and_figure(workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50 + 9 * math.log10(run.lr)))
    few = search_for(splits, "lr=1e-3:1", "batch-size=8:64", trials=4, pruner="none")
    assert few.importance == {} and "4 finished trials are too few" in few.why_not
    found = search_for(splits, "lr=1e-3:1", "batch-size=8:64", trials=14, pruner="none")
    assert next(iter(found.importance)) == "lr" and found.importance["lr"] > 0.8
    assert sum(found.importance.values()) == pytest.approx(1)
    assert found.figure is not None and found.figure.name == "trials.svg"
    assert found.best is not None and f"best {found.best.accuracy:.2f} %" in found.figure.read_text()
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50.0))
    same = search_for(splits, "lr=1e-3:1", trials=6, study="same")
    assert same.importance == {} and "the same accuracy" in same.why_not


def test_tune_command_prints_best_command(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.data.load", lambda *args, **kwargs: splits)
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50 + run.lr))
    call = command_line(monkeypatch, cli_train, cli_tune)
    words = ["tune", "--tune", "lr=0.25|0.5", "--method", "ce", "--student", "convnet-tiny", "--trials", "6",
             "--epochs", "2", "--data", "my data", "--sampler", "random", "--val-fraction", "0.2"]  # fmt: skip
    out = call(*words).stdout
    assert out.splitlines()[-1] == (
        "next: kd train --data 'my data' --method ce --student convnet-tiny --val-fraction 0.2 --epochs 2 --lr 0.5"
    )
    assert "best on the validation split: 50.50 %" in out
    assert "share of the variance of accuracies" in out and "trials.svg" in out
    told = json.loads(call(*words, "--json").stdout)
    assert told["study"] == "tune-ce-convnet-tiny" and len(told["trials"]) == 6
    assert told["command"] == out.splitlines()[-1].removeprefix("next: ")
    with pytest.raises(UsageError, match="--lr is both set and tuned"):
        call(*words, "--lr", "1")
    with pytest.raises(UsageError, match="nothing to tune"):
        call("tune")


def test_tune_without_optuna(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_tune.importlib.util, "find_spec", lambda name: None)
    call = command_line(monkeypatch, cli_train, cli_tune)
    with pytest.raises(UsageError, match="Optuna") as caught:
        call("tune", "--tune", "tau=1:2")
    assert "pip install 'kdcli[tune]'" in caught.value.hint


# --- stopped, killed, and several at once ------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_tune_interrupted_requeues_trial(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.data.load", lambda *args, **kwargs: splits)
    count = 0

    def press(event: Event, on_event: Any) -> None:
        nonlocal count
        if isinstance(event, Epoch):
            count += 1
            if count in (3, 5):  # the first epoch of the second trial; the last of it when it is done again
                os.kill(os.getpid(), signal.SIGTERM if count == 3 else signal.SIGINT)
        on_event(event)

    whole = search.fit
    monkeypatch.setattr(
        search,
        "fit",
        lambda *args, on_event, **named: whole(*args, **named, on_event=lambda event: press(event, on_event)),
    )
    call = command_line(monkeypatch, cli_train, cli_tune)
    words = ["tune", "--tune", "lr=1e-3:1", "--study", "toy", "--pruner", "none"]
    for name in (
        "method",
        "student",
        "epochs",
        "batch_size",
        "precision",
        "threads",
        "val_fraction",
        "trials",
    ):
        words += ["--" + name.replace("_", "-"), str(PLAIN[name])]
    with pytest.raises(Interrupted) as caught:
        call(*words)
    assert caught.value.exit_code == 143
    assert caught.value.message == "stopped in trial 1, which will start anew; 1 of 3 trials are done"
    assert caught.value.hint.startswith("kd tune --tune lr=1e-3:1 ") and "--trials 3" in caught.value.hint
    assert [trial.state for trial in stored()] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    with pytest.raises(Interrupted) as caught:
        call(*words)
    assert caught.value.exit_code == 130
    assert caught.value.message == "stopped; 2 of 3 trials are done"  # that trial was over
    call(*words)
    trials = stored()
    complete, fail = TrialState.COMPLETE, TrialState.FAIL
    assert [trial.state for trial in trials] == [complete, fail, complete, complete]
    assert trials[2].params == trials[1].params


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("sampler", "kills"),
    [
        (
            "tpe",
            [(optuna.Trial, "set_user_attr", 10)],
        ),  # three a trial, the first before its values are drawn
        ("tpe", [(optuna.Trial, "suggest_int", 4)]),  # the second of a trial's values
        ("tpe", [(search, "fit", 13)]),
        ("random", [(search, "fit", 4), (optuna.Study, "tell", 1), (search, "fit", 2)]),
        ("random", [(search._Search, "_note_end", 14)]),
    ],
    ids=["popped", "drawing", "training", "queued again", "ended"],
)
def test_a_killed_study_continues_with_the_same_values(
    workplace: Path,
    splits: Splits,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    kills: list[tuple[Any, str, int]],
) -> None:
    def run(name: str) -> TuneResult:
        wanted = {"trials": 14, "sampler": sampler, "pruner": "none"}
        return search_for(splits, "lr=1e-3:1", "batch-size=8:64", study=name, **wanted)

    def kill(owner: Any, name: str, call: int) -> None:
        """The study runs until the given call of a function."""
        calls, function = 0, getattr(owner, name)

        def killed(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < call:
                return function(*args, **named)
            if name == "fit":
                place = args[0].runs_dir / args[0].name
                place.mkdir(parents=True)
                (place / ".student.pt.tmp").touch()
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, killed)
            run("killed")

    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50 + 9 * math.log10(run.lr)))
    whole = run("whole")
    for module in (search, study):  # no process has this number
        monkeypatch.setattr(module, "this_process", lambda: f"{host_name()} {2**22 + 1}")
    for each in kills:
        kill(*each)
    continued = run("killed")
    assert [trial.values for trial in continued.trials] == [trial.values for trial in whole.trials]
    assert len(list(Path("runs/killed").glob("*/*.pt"))) == 1
    assert not list(Path("runs/killed").glob("*/.*.tmp"))


@pytest.mark.usefixtures("undrawn")
def test_tune_leaves_trials_of_other_hosts(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "fit", fake_fit(lambda run, epoch: 50.0))
    notes: list[Event] = []
    search_for(splits, "lr=1e-3:1", trials=1)
    study = optuna.load_study(study_name="toy", storage="sqlite:///runs/toy/study.db")
    study.ask().set_user_attr("process", f"elsewhere {2**22 + 1}")
    found = search_for(splits, "lr=1e-3:1", trials=2, on_event=notes.append)
    assert [trial.state for trial in found.trials] == ["complete", "running", "complete"]
    assert any(isinstance(event, Note) and "1 trial(s) of other processes" in event.text for event in notes)


@pytest.mark.usefixtures("undrawn")
def test_tune_counts_the_trials_of_other_processes(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second search starts and ends within the first trial of the first one."""

    def accuracy(run: TrainConfig, epoch: int) -> float:
        if run.name == "trial-0000" and epoch == 1:
            search_for(splits, "lr=1e-3:1", trials=3)
        return 50.0

    monkeypatch.setattr(search, "fit", fake_fit(accuracy))
    search_for(splits, "lr=1e-3:1", trials=3)
    assert [trial.state for trial in stored()] == [TrialState.COMPLETE] * 4  # one more than wanted


@pytest.mark.slow
def test_tune_continues_after_sigkill_with_two_processes(workplace: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 3)):
        for label in range(3):
            place = Path("images") / split / f"class-{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(60 * label, 60 * label + 120, (8, 8, 1)).astype(np.uint8)
                Image.fromarray(pixels[:, :, 0]).save(place / f"{number}.png")
    command = [
        sys.executable, "-m", "kdcli",
        *shlex.split(
            "tune --tune lr=1e-3:1e-1 --tune batch-size=8:32 --data images --grey --method ce --student convnet-tiny "
            "--threads 1 --precision 32 --epochs 6 --val-fraction 0.2 --trials 8 --study toy --pruner none -q"
        ),
    ]  # fmt: skip
    first = subprocess.Popen(command, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not Path("runs/toy/trial-0002/metrics.jsonl").exists():  # in the middle of the third
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.wait()
    assert [trial.number for trial in stored() if trial.state == TrialState.RUNNING] == [2]
    pair = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(2)]
    assert [one.wait(timeout=120) for one in pair] == [0, 0]
    trials = stored()
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(done) in (8, 9)  # the other process may have been in the middle of one more
    assert [trial.number for trial in trials] == list(range(len(done) + 1))
    assert trials[3].params == trials[2].params
    assert len({str(trial.params) for trial in trials}) == len(trials) - 1  # no other draw is repeated
    for trial in done:
        result = json.loads((Path("runs/toy") / f"trial-{trial.number:04d}" / "result.json").read_text())
        assert result["val_accuracy"] == trial.value
    best = max(done, key=lambda trial: (trial.value, -trial.number))
    kept = {path.parent.name for path in Path("runs/toy").glob("*/student.pt")}
    assert f"trial-{best.number:04d}" in kept and len(kept) == 1
    assert not list(Path("runs/toy").glob("*/last*.pt"))


def test_continue_command_repeats_list_options() -> None:
    options = {"teacher": [Path("a.pt"), Path("my b.pt")], "weight": ["kd=2"], "grey": True, "trials": 3}
    again = cli_tune._continue_command(["tau=1:2"], None, options)
    assert again == (
        "kd tune --tune tau=1:2 --teacher a.pt --teacher 'my b.pt' --weight kd=2 --grey --trials 3"
    )


def test_tune_recipe_drops_derived_settings(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(TrainConfig, {k: v for k, v in PLAIN.items() if k in TrainConfig.model_fields})
    made = engine.fit(run.model_copy(update={"epochs": 1}), splits).run
    assert engine.RunDir(made.path).read_config().views == 1
    digits_student(Path("weights/teacher.pt"))
    seen: list[TuneConfig] = []

    def stop(wanted: TuneConfig, space: Space) -> None:
        seen.append(wanted)
        raise KdError("seen")

    monkeypatch.setattr(search, "check", stop)
    call = command_line(monkeypatch, cli_train, cli_tune)
    words = ["tune", "--config", made.config_file.as_posix(), "--tune"]
    made.config_file.write_text(made.config_file.read_text().replace("devices = 1", "devices = 2"))
    for tuned in ("epochs=2|3", "kd-weight=0:1", "method=kd|logits"):
        with pytest.raises(KdError, match="seen"):
            call(*words, tuned, *(["--method", "kd"] if "kd-weight" in tuned else []))
        assert seen.pop().views == 0
    with pytest.raises(KdError, match="seen"):
        call(*words, "lr=0.1:1", "--trials", "3")
    assert (seen[0].lr, seen[0].devices) == (PLAIN["lr"], 1)


def test_tune_refuses_chains(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("assistant", "generations"):
        with pytest.raises(UsageError, match="a trial trains a single student") as caught:
            space_of(f"{name}=1|2")
        assert caught.value.hint == "Leave it out of --tune."
    help_text = command_line(monkeypatch, cli_train, cli_tune)("tune", "--help-all").stdout
    assert "--student" in help_text and not {"--generations", "--devices", "--name"} & set(help_text.split())
    assert config(study="", method="kd+my.module:f").study_name == "tune-kd+f-convnet-tiny"
