"""kd compare: paired runs, each made once, and nothing claimed that they do not bear out."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli import methods
from kdcli.base.config import CompareConfig, make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Progress
from kdcli.cli import compare as command
from kdcli.cli import train
from kdcli.data import Splits, augment, load
from kdcli.engine import RunDir, fit
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.studies.compare import Comparison, Plan, compare, make_plan
from kdcli.studies.compare.plan import run_of
from kdcli.studies.compare.result import conclude
from tests.helpers import ROOT, command_line, image_folder, make_splits

TRAIN: dict[str, Any] = {
    "data": "toy",
    "student": "convnet-tiny",
    "epochs": 2,
    "batch_size": 16,
    "lr": 1e-2,
    "val_fraction": 0.2,
    "precision": "32",
    "threads": 1,
    "teacher": "runs/teacher/student.pt",
}
T_1 = 12.706205  # t(0.975) with one degree of freedom


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Splits]:
    """A teacher, trained once."""
    folder, splits = tmp_path_factory.mktemp("made"), make_splits()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        values = {**TRAIN, "method": "ce", "student": "convnet-small", "name": "teacher", "epochs": 3}
        fit(make(TrainConfig, values), splits)
    return folder, splits


@pytest.fixture
def splits(made: tuple[Path, Splits], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    shutil.copytree(made[0] / "runs", "runs")
    monkeypatch.setitem(load.__globals__["DATASETS"], "toy", lambda request: made[1])
    return made[1]


def planned(name: str = "c", compared: str = "ce,kd", seeds: str = "2", **train: Any) -> Plan:
    settings = make(CompareConfig, {"methods": compared, "seeds": seeds, "name": name})
    return make_plan(settings, {**TRAIN, **train})


def students(plan: Plan) -> dict[str, str]:
    """SHA-256 of the weights of each finished run."""
    return {
        config.name: checkpoint.digest(checkpoint.load(RunDir.of(config).student).state_dict)
        for config in plan.runs
        if finished(config)
    }


def finished(config: TrainConfig) -> bool:
    return run_of(config).result_file.is_file()


def without_clock(found: Comparison) -> dict[str, Any]:
    document = found.to_dict()
    for run in document["runs"]:
        run["seconds"] = run["run"] = None
    return {
        **document,
        "folder": None,
        "teacher_passes": None,
        "runs": [{**r, "teacher_passes": 0} for r in document["runs"]],
    }


def test_compare_pairs_runs_by_seed(splits: Splits) -> None:
    plan = planned(augment="flip")
    assert [(run.method, run.seed) for run in plan.runs] == [("ce", 0), ("kd", 0), ("ce", 1), ("kd", 1)]
    found = compare(plan, splits)
    right = {
        (run.method, run.seed): json.loads(RunDir.of(run).result_file.read_text())["test"]["accuracy"]
        for run in plan.runs
    }
    ce, kd = (np.array([right[name, seed] for seed in (0, 1)]) for name in ("ce", "kd"))
    base, other = found.standings
    assert base.verdict == "baseline"
    assert base.difference is None
    assert other.test_mean == pytest.approx(kd.mean())
    assert other.test_deviation == pytest.approx(kd.std(ddof=1))
    assert other.difference is not None
    assert other.difference.by_seed == [(0, kd[0] - ce[0]), (1, kd[1] - ce[1])]
    mean = (kd - ce).mean()
    deviation = max((kd - ce).std(ddof=1), 100 / 30 / np.sqrt(6))
    half = T_1 * deviation / np.sqrt(2)
    assert other.difference.interval == pytest.approx((mean - half, mean + half), rel=1e-6)
    assert other.verdict == "inconclusive"
    # two views and the test images, once for all runs of all seeds
    assert found.teacher_passes == 3
    assert json.loads(plan.result_file.read_text()) == json.loads(json.dumps(found.to_dict()))
    for run in plan.runs:
        stored = RunDir.of(run).read_config()
        assert (stored.threads, stored.precision, stored.view_seed) == (1, "32", 0)
        assert stored.augment_seed == 0


def test_compare_same_method_twice_gives_equal_weights(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One method under two names: weights, order, views and noise are alike, so that nothing is left to differ."""
    twin = {**vars(methods.METHODS["noisy"]), "name": "twin"}
    monkeypatch.setitem(methods.METHODS, "twin", methods.Method(**twin))
    plan = planned(compared="noisy,twin", augment="flip-crop", epochs=1)
    [_, other] = compare(plan, splits).standings
    assert plan.baseline == "noisy"  # the first, where ce is not among them
    assert other.difference is not None
    assert [value for _, value in other.difference.by_seed] == [0.0, 0.0]
    assert (other.difference.p, other.verdict) == (1.0, "inconclusive")
    found = students(plan)
    assert found["noisy-seed0"] == found["twin-seed0"] != found["noisy-seed1"] == found["twin-seed1"]


def test_compare_keeps_finished_runs(splits: Splits) -> None:
    plan = planned()
    first = compare(plan, splits)
    before = students(plan)
    lost = RunDir.of(plan.runs[2])
    lost.result_file.unlink()
    lost.student.unlink()
    stamps = {run.name: RunDir.of(run).last.stat().st_mtime_ns for run in plan.runs if RunDir.of(run) != lost}
    again = compare(planned(), splits)
    assert without_clock(again) == without_clock(first)
    assert students(plan) == before
    assert stamps == {
        run.name: RunDir.of(run).last.stat().st_mtime_ns for run in plan.runs if RunDir.of(run) != lost
    }
    assert compare(Plan.load(plan.folder), splits) == again  # nothing is left to do


def test_compare_derives_one_batch_size_for_all_runs(splits: Splits) -> None:
    """72 images to train on give 18 steps of 4."""
    plan = planned(batch_size=0)
    first = compare(plan, splits)
    assert {RunDir.of(run).read_config().batch_size for run in Plan.load(plan.folder).runs} == {4}
    assert compare(planned(batch_size=0), splits) == first  # nothing is left to do


def test_compare_resumed_after_sigterm_gives_equal_result(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "kd, seed 0, epoch 2" in event.task:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        compare(planned("cut"), splits, on_event=stop)
    assert caught.value.exit_code == 143
    assert caught.value.hint == "kd compare --resume comparisons/cut"
    assert "1 of 4 runs are finished; stopped at epoch 2 of 2; the state is saved" in caught.value.message
    plan = Plan.load(Path("comparisons/cut"))
    assert [*map(finished, plan.runs)] == [True, False, False, False]
    assert not plan.result_file.exists()  # nobody looks at a half
    found = compare(plan, splits)
    whole = planned("whole")
    assert without_clock(found) == without_clock(compare(whole, splits))
    assert students(plan) == students(whole)


def test_compare_refuses_changed_settings_and_inputs(splits: Splits) -> None:
    compare(planned(seeds="1", epochs=1), splits)
    for changes, told in (
        ({"epochs": 2}, "started with other settings: --epochs was 1, is 2"),
        ({"tau": 2.0}, "started with other settings: --tau was None, is 2.0"),
        ({"seeds": "2"}, "started with other settings: --seeds was 0, is 0,1"),
        ({"compared": "ce,logits"}, "started with other settings: --methods was ce,kd, is ce,logits"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            compare(planned(**{"seeds": "1", "epochs": 1, **changes}), splits)
        assert "--name" in caught.value.hint
    compare(planned(seeds="1", epochs=1, save_every="0"), splits)  # changes nothing that is computed
    with pytest.raises(KdError, match="train images of comparisons/c changed"):
        compare(planned(seeds="1", epochs=1), make_splits(train=93))
    shutil.copyfile("comparisons/c/runs/ce-seed0/student.pt", "runs/teacher/student.pt")
    with pytest.raises(KdError, match="the teacher of comparisons/c changed"):
        compare(planned(seeds="1", epochs=1), splits)
    config = Path("comparisons/c/runs/kd-seed0/config.toml")
    config.write_text(config.read_text().replace("tau = 3.0", "tau = 4.0"))
    with pytest.raises(UsageError, match=r"not a run of this comparison: --tau was 4\.0, is 3\.0"):
        run_of(planned(seeds="1", epochs=1).runs[1])


def test_compare_takes_more_methods_later(splits: Splits) -> None:
    compare(planned("grown", compared="ce,ls", seeds="2", epochs=1), splits)
    grown = planned("grown", compared="ce,logits,ls", seeds="2", epochs=1, weight=("logits=0.5",))
    at_once = planned("at-once", compared="ce,logits,ls", seeds="2", epochs=1, weight=("logits=0.5",))
    assert [*map(finished, grown.runs)] == [True, False, True] * 2
    assert without_clock(compare(grown, splits)) == without_clock(compare(at_once, splits))
    assert students(grown) == students(at_once)
    assert Plan.load(grown.folder).methods == ("ce", "logits", "ls")
    with pytest.raises(UsageError, match="--methods was ce,logits,ls, is ce,ls"):
        compare(planned("grown", compared="ce,ls", seeds="2", epochs=1), splits)


def test_compare_stops_when_its_teacher_is_replaced_between_runs(splits: Splits) -> None:
    first = Path("comparisons/c/runs/ce-seed0/student.pt")

    def replace_teacher(event: Event) -> None:
        if first.is_file():
            shutil.copyfile(first, "runs/teacher/student.pt")

    with pytest.raises(KdError, match="the teacher of comparisons/c changed"):
        compare(planned(epochs=1), splits, on_event=replace_teacher)
    assert not Path("comparisons/c/runs/kd-seed1").exists()


def test_compare_one_seed_has_no_verdict(splits: Splits) -> None:
    [_, other] = compare(planned(seeds="7,", epochs=1), splits).standings
    assert other.difference is not None
    assert other.difference.by_seed[0][0] == 7
    assert (other.difference.interval, other.difference.p, other.difference.p_holm) == (None, None, None)
    assert (other.test_deviation, other.test_interval) == (None, None)
    assert other.verdict == "one seed: no claim"


def test_compare_continues_after_failed_run(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    def soft(batch: methods.Batch) -> Any:
        return batch.student_logits.mean() * (float("nan") if batch.seed == 1 else 1.0)

    broken = {**vars(methods.METHODS["kd"]), "name": "broken", "loss": soft, "keywords": {}, "balance": None}
    monkeypatch.setitem(methods.METHODS, "broken", methods.Method(**broken))
    kd = command_line(monkeypatch, command, train)
    words = shlex.split(
        "--methods ce,broken,kd --seeds 3 --data toy --student convnet-tiny --epochs 1 --batch-size 16"
    )
    words += shlex.split("--teacher runs/teacher/student.pt --precision 32 --threads 1 --lr 1e-2 --name c")
    with pytest.raises(KdError, match="1 of 9 runs failed: the loss is no longer finite") as caught:
        kd("compare", *words)
    assert (caught.value.exit_code, caught.value.hint) == (
        1,
        "Try them again: kd compare --resume comparisons/c",
    )
    document = json.loads(Path("comparisons/c/comparison.json").read_text())
    status = {run["run"].rsplit("/", 1)[1]: run["status"] for run in document["runs"]}
    assert {name for name, one in status.items() if one == "failed"} == {"broken-seed1"}
    assert len(status) == 9
    row = next(row for row in document["standings"] if row["method"] == "broken")
    assert (row["count"], row["failed"], row["difference"]["count"]) == (2, 1, 2)
    assert row["verdict"] == "inconclusive"
    assert any("broken, seed 1 failed: the loss is no longer finite" in note for note in document["notes"])
    monkeypatch.setitem(
        methods.METHODS,
        "broken",
        methods.Method(**{**broken, "loss": lambda b: b.student_logits.mean()}),
    )
    shutil.rmtree("comparisons/c/runs/broken-seed1")
    assert kd("compare", "--resume", "comparisons/c").exit_code == 0


def test_conclude_verdicts_and_holm_p(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three invented results each: +2, +3, +4 points are 3 ± t(0.975; 2)·1/√3, that is 3 ± 2.48."""
    plan = planned(seeds="3", compared="ce,kd,logits", epochs=1)
    compare(plan, splits)
    for run in plan.runs:
        document = json.loads(RunDir.of(run).result_file.read_text())
        more = {"ce": (0, 0, 0), "kd": (2, 3, 4), "logits": (-2, 3, 4)}[run.method][run.seed]
        document["test"] |= {"accuracy": 50.0 + 10 * run.seed + more, "count": 10_000}
        RunDir.of(run).result_file.write_text(json.dumps(document))
    _, kd, logits = conclude(plan, {}, "toy", 10_000).standings
    assert kd.difference is not None
    assert logits.difference is not None
    assert kd.difference.interval == pytest.approx((3 - 2.484138, 3 + 2.484138), abs=1e-5)
    assert (kd.verdict, logits.verdict) == ("better", "inconclusive")
    assert kd.difference.p == pytest.approx(0.0351, abs=1e-4)
    assert kd.difference.p_holm == pytest.approx(2 * kd.difference.p)
    RunDir.of(plan.runs[-1]).result_file.unlink()  # of logits, of which nothing can be claimed then
    found = conclude(plan, {}, "toy", 10_000)
    _, alone, logits = found.standings
    assert alone.difference is not None
    assert logits.difference is not None
    assert alone.difference.p_holm == alone.difference.p == kd.difference.p
    assert (logits.difference.p, logits.difference.p_holm) == (None, None)
    assert found.comparisons == 1


def test_conclude_missing_run_withholds_verdict(splits: Splits) -> None:
    """+3.00 and +3.02 points would be 3.01 ± 0.13; but the third run is missing, and nobody knows why."""
    plan = planned(seeds="3", epochs=1)
    compare(plan, splits)
    for run in plan.runs:
        document = json.loads(RunDir.of(run).result_file.read_text())
        more = {"ce": (0, 0, 0), "kd": (3, 3.02, 3.04)}[run.method][run.seed]
        document["test"] |= {"accuracy": 50.0 + more, "count": 10_000}
        RunDir.of(run).result_file.write_text(json.dumps(document))
    assert conclude(plan, {}, "toy", 10_000).standings[1].verdict == "better"
    for lost in (plan.runs[5], plan.runs[4]):  # kd's, then in its place the baseline's
        kept = RunDir.of(lost).result_file.read_bytes()
        RunDir.of(lost).result_file.unlink()
        found = conclude(plan, {lost.name: "it broke"}, "toy", 10_000)
        other = found.standings[1]
        assert other.difference is not None
        assert other.difference.interval == pytest.approx((3.01 - 0.127062, 3.01 + 0.127062), abs=1e-5)
        assert other.verdict == "inconclusive"
        assert (other.difference.p, other.difference.p_holm, found.comparisons) == (None, None, 0)
        assert f"{lost.method}, seed {lost.seed} failed: it broke" in found.notes
        assert any("biased sample" in note for note in found.notes)
        RunDir.of(lost).result_file.write_bytes(kept)


def test_view_seed_draws_views_of_teacher_and_student(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's logits are of the student's views."""
    drawn: list[tuple[int, int]] = []
    make_view = augment.make_view

    def watch(name: str, take: Any, seed: int, view: int, samples: Any, pool: Any) -> Any:
        drawn.append((seed, len(samples)))
        return make_view(name, take, seed, view, samples, pool)

    monkeypatch.setattr(augment, "make_view", watch)
    common = {**TRAIN, "method": "kd", "augment": "crop", "views": 2, "seed": 3}
    fit(make(TrainConfig, {**common, "view_seed": 5, "name": "a"}), splits)
    of_students = [seed for seed, count in drawn if count <= 16]
    assert len(of_students) == 2 * 5
    assert {seed for seed, count in drawn if count > 16} >= {5}
    assert set(of_students) == {5}
    drawn.clear()
    fit(make(TrainConfig, {**common, "name": "b"}), splits)
    assert {seed for seed, count in drawn if count <= 16} == {3}


def test_compare_command_prints_table_and_writes_files(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    kd = command_line(monkeypatch, command, train)
    words = shlex.split(
        "--methods ce,kd --seeds 2 --data toy --student convnet-tiny --epochs 1 --batch-size 16"
    )
    words += shlex.split("--teacher runs/teacher/student.pt --precision 32 --threads 1 --tau 2")
    done = kd("compare", *words, "--csv", "t/c.csv", "--markdown", "c.md")
    assert done.exit_code == 0
    table = [line for line in done.stdout.splitlines() if line.startswith(("method", "ce ", "kd "))]
    assert len(table) == 3
    assert max(map(len, table)) <= 80
    assert "inconclusive" in table[2]
    folder = Path("comparisons/ce-kd-convnet-tiny-toy")
    assert f"kd report {folder}" in done.stdout
    assert ">points more than ce, same seed<" in (folder / "figure.svg").read_text()
    assert Path("t/c.csv").read_text().splitlines()[0].startswith("method,is_baseline,count,failed,test_mean")
    assert Path("c.md").read_text().splitlines()[2].startswith("| ce | 2 | ")
    again = json.loads(kd("compare", "--resume", str(folder), "--json").stdout)
    assert again["schema_version"] == 1
    assert again == json.loads((folder / "comparison.json").read_text())
    for wrong, told in (
        (("--resume", str(folder), "--tau", "3"), "continues a comparison as it was started"),
        (("--resume", "runs"), "runs is not a comparison"),
        (("--methods", "ce,nothing"), "unknown method: nothing"),
        (("--methods", "ce,ce"), "must be names of methods, each once"),
        (("--seeds", "0"), "must be a number of seeds"),
        (("--seeds", "1,1"), "must be a number of seeds"),
        (("--baseline", "logits"), "--baseline logits is not compared"),
        (("--teacher", "none.pt"), "no such file: none.pt"),
    ):
        with pytest.raises(KdError, match=told):
            kd("compare", *wrong)


def test_damaged_comparison_is_an_error(splits: Splits) -> None:
    plan = planned(seeds="1", epochs=1)
    plan.folder.mkdir(parents=True)
    for text in ("methods = [", "methods = 3\n", 'methods = ["ce"]\n', "\0"):
        plan.file.write_text(text)
        with pytest.raises(KdError, match=r"comparison\.toml"):
            compare(plan, splits)
    plan.file.unlink()
    compare(plan, splits)
    for text in ("{", "[]", '{"test": {"accuracy": 1e999}}'):
        RunDir.of(plan.runs[0]).result_file.write_text(text)
        with pytest.raises(KdError, match=r"result\.json"):
            compare(plan, splits)


def test_seeds_option_takes_count_or_list() -> None:
    def seeds(text: object) -> tuple[int, ...]:
        return make(CompareConfig, {"seeds": text}).seeds

    assert seeds("5") == seeds(5) == (0, 1, 2, 3, 4)
    assert seeds("3, 7,11") == (3, 7, 11)
    assert seeds("7,") == seeds([7]) == (7,)
    for wrong in ("", "-1", "x", "1,,2", "1.5", ",", "100000"):
        with pytest.raises(UsageError, match="--seeds"):
            seeds(wrong)


def test_weight_applies_to_methods_with_that_term(splits: Splits) -> None:
    plan = planned(compared="ce,kd,logits+ls", weight=("kd=2", "ce=0:0.5", "ls=3"))
    assert [config.weight for config in plan.each] == [
        ("ce=0:0.5",),
        ("kd=2", "ce=0:0.5"),
        ("ce=0:0.5", "ls=3"),
    ]
    with pytest.raises(UsageError, match="--weight at=1: none of these methods has such a term") as caught:
        planned(weight=("at=1",))
    assert caught.value.hint == "They have ce, kd."


@pytest.mark.parametrize(
    ("compared", "train", "told"),
    [
        ("ce,kd", {"assistant": ("lenet",)}, "leave out --assistant"),
        ("ce,kd", {"generations": 2}, "leave out --generations"),
        ("logits,kd", {"unlabelled": "more"}, "method kd reads labels"),
        ("kd,logits", {"cache_top_k": 2}, "method logits regresses all logits"),
        ("kd,at", {"teacher": ("runs/teacher/student.pt",) * 2}, "method at reads features"),
    ],
)
def test_make_plan_refuses_settings_invalid_for_one_method(
    splits: Splits, compared: str, train: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        planned(compared=compared, **train)


def test_compare_refuses_settings_that_do_not_fit_the_data(splits: Splits) -> None:
    for compared, values, told in (
        ("ce,at", {"student_stages": "nowhere"}, "nowhere"),
        ("ce,kd", {"cache_top_k": 3}, "there are 3 classes"),
        ("ce,kd", {"student": "resnet9000"}, "unknown network"),
    ):
        with pytest.raises(UsageError, match=told):
            compare(planned(compared=compared, **values), splits)
        assert not Path("comparisons/c/comparison.toml").exists()
        assert not Path("comparisons/c/runs").exists()


def test_zero_weight_needs_no_teacher(splits: Splits) -> None:
    none = {"kd_weight": 0.0, "teacher": "gone.pt"}
    planned(compared="ce,kd+ls", **none)
    with pytest.raises(KdError, match=r"no teacher at gone\.pt"):
        planned(compared="ce,kd+ls", teacher="gone.pt")


def test_compare_recipe_drops_derived_settings(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fit(make(TrainConfig, {**TRAIN, "method": "kd", "augment": "crop", "name": "r"}), splits).run
    assert (made.read_config().views, made.read_config().tau) == (2, 3.0)
    seen: list[Plan] = []

    def stop(plan: Plan, *given: Any, **named: Any) -> None:
        seen.append(plan)
        raise KdError("seen")

    monkeypatch.setattr("kdcli.studies.compare.compare", stop)
    kd = command_line(monkeypatch, command, train)
    with pytest.raises(KdError, match="seen"):
        kd("compare", "--config", made.config_file.as_posix(), "--methods", "kd,dkd")
    assert (seen[0].train.views, seen[0].train.tau, seen[0].train.lr) == (0, None, TRAIN["lr"])
    Path("chain.toml").write_text("generations = 2\n")
    with pytest.raises(UsageError, match="leave out --generations"):
        kd("compare", "--config", "chain.toml", "--teacher", TRAIN["teacher"])
    assert "--generations" not in kd("compare", "--help-all").stdout


@pytest.mark.slow
def test_compare_continues_after_sigkill(workplace: Path) -> None:
    """SIGKILL in the second of two runs: the first is kept, the second resumed to the same bits."""
    image_folder(Path("images"))
    words = shlex.split(
        "compare --methods ce,ls --seeds 1 --data images --student convnet-tiny --epochs 4 --batch-size 16 "
        "--precision 32 --threads 1 -q --name"
    )
    command = [sys.executable, "-m", "kdcli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "killed"], env=environment)
    deadline = time.monotonic() + 120
    while not Path("comparisons/killed/runs/ls-seed0/last.pt").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.wait()
    kept = Path("comparisons/killed/runs/ce-seed0/result.json").stat().st_mtime_ns
    assert not Path("comparisons/killed/runs/ls-seed0/result.json").exists()
    for name in ("killed", "whole"):
        assert subprocess.run([*command, name], env=environment, check=False).returncode == 0
    assert Path("comparisons/killed/runs/ce-seed0/result.json").stat().st_mtime_ns == kept
    for run in ("ce-seed0", "ls-seed0"):
        killed, whole = (
            checkpoint.digest(checkpoint.load(Path(f"comparisons/{name}/runs/{run}/student.pt")).state_dict)
            for name in ("killed", "whole")
        )
        assert killed == whole
