"""`kd report`: figures on the page equal those of the models; malformed run files are reported."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli import models
from kdcli.base import metrics
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import report
from kdcli.data import Splits, load
from kdcli.engine.records import measure
from kdcli.report import examine, gather, make_report, page
from tests.helpers import command_line
from tests.report.helpers import EVIL_NAME, HOSTILE, Page, bench_file, comparison_folder, settings


def outputs(path: Path, splits: Splits) -> np.ndarray:
    """Logits, not by way of the report."""
    model = models.load(path).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(np.array(splits.test.images))).double().numpy()


def test_figures_are_those_of_the_models(project: Path, made: tuple[Path, Splits]) -> None:
    splits = made[1]
    labels = np.array(splits.test.labels)
    report = make_report([Path("runs/kd-1"), Path("runs/ce-1")], settings(bench=bench_file(project)))
    teacher = outputs(Path("weights/teacher.pt"), splits).argmax(1)
    teacher_accuracy = 100 * np.mean(teacher == labels)
    for plain, name in zip(report.runs, ("kd-1", "ce-1"), strict=True):
        mine = outputs(Path(f"runs/{name}/student.pt"), splits).argmax(1)
        assert plain["measured"]
        assert plain["test_accuracy"] == pytest.approx(100 * np.mean(mine == labels))
        assert plain["agreement"] == pytest.approx(100 * np.mean(mine == teacher))
        assert plain["teacher_accuracy"] == pytest.approx(teacher_accuracy)
        assert plain["disagreements"] == np.sum(mine != teacher)
        text = Page(report.html).text
        both, student, other = mine == labels, mine != labels, teacher == labels
        assert f"different classes on {np.sum(mine != teacher)} of 80 test images" in text, (
            "the count of disagreements"
        )
        assert (
            f"Both are right on {np.sum(both & other)}, only the student on {np.sum(both & ~other)}, "
            f"only the teacher on {np.sum(student & other)}, neither on {np.sum(student & ~other)}." in text
        )
    assert report.runs[0]["latency_ms"] == 2.0
    assert report.runs[0]["speedup"] == 4.0
    assert "It learned from labels alone" in text  # ce-1 is compared with the only teacher there is
    assert report.runs[0]["accuracy_interval"] == pytest.approx(
        metrics.wilson_interval(report.runs[0]["test_accuracy"], 80)
    )


def test_the_teacher_runs_once_for_all_that_share_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("cache")
    calls = []
    real = examine.Teacher.logits

    def counted(self: Any, *words: Any, **named: Any) -> Any:
        calls.append(self)
        return real(self, *words, **named)

    monkeypatch.setattr(examine.Teacher, "logits", counted)
    make_report([Path("runs/kd-1"), Path("runs") / EVIL_NAME, Path("runs/ce-1")], settings())
    assert len(calls) == 1


def test_run_of_the_teacher_is_marked_and_last(project: Path) -> None:
    bench = bench_file(project)
    timed = make_report([Path("runs/base"), Path("runs/kd-1")], settings(bench=bench))
    assert timed.runs[1]["latency_ms"] == 8.0  # of weights/teacher.pt, the same file
    assert (
        timed.html.count('<tr class="teacher">') == 2
    )  # in the summary once, and among the models that were timed
    report = make_report([Path("runs/base"), Path("runs/kd-1")], settings())
    assert [Path(run["run"]).name for run in report.runs] == ["kd-1", "base"]
    assert report.runs[1]["agreement"] is None
    assert "It is the teacher of the other runs." in Page(report.html).text
    assert report.notes == ["Latencies were left out (--no-bench)."]


def test_a_run_is_chosen_only_by_enough_validation_images(project: Path) -> None:
    """kd-1 is right on 190 of 200, ce-1 on 188 or 184: 1 and 3 points.

    The standard errors are 100 · √((0.95 · 0.05 + 0.94 · 0.06) / 200) = 2.28 and, with 0.92 · 0.08, 2.46.
    """
    for accuracy, chosen in ((94.0, False), (92.0, True)):
        for name, value in (("kd-1", 95.0), ("ce-1", accuracy)):
            path = Path(f"runs/{name}/result.json")
            document = json.loads(path.read_text()) | {"val_accuracy": value, "val_images": 200}
            path.write_text(json.dumps(document))
        text = Page(make_report([Path("runs/kd-1"), Path("runs/ce-1")], settings()).html).text
        assert ("Highest validation accuracy: kd-1, 95.00" in text) == chosen
        few = "200 validation images are too few to choose between kd-1 (95.00 %) and ce-1 (94.00 %)"
        assert (few in text.replace("\xa0", " ")) == (not chosen)


def test_texts_of_files_are_escaped(project: Path) -> None:
    folders = [Path("runs/kd-1"), Path("runs") / EVIL_NAME, Path("runs/base")]
    report = make_report(folders, settings(bench=bench_file(project)))
    html = Page(report.html)
    tags = {tag for tag, _ in html.elements}
    assert not tags & {"iframe", "object", "embed", "form", "b", "base", "foreignobject"}
    assert [tag for tag, _ in html.elements].count("script") == 1
    for tag, attributes in html.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "{{7*7}}{% raw %}" in html.text
    assert "<script>alert(1)</script>" in html.text
    assert "(no name)" in html.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", report.html)
    assert "long " * 60 not in html.text
    assert "<script>alert(3)</script>" in html.text  # of a config.toml
    ids = [attributes["id"] for _, attributes in html.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in html.elements:  # references have a target
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids, target
    for figure in figures(html):
        ElementTree.fromstring(figure)
        assert "<script" not in figure


def test_the_page_is_accessible_deterministic_and_allows_one_script(project: Path) -> None:
    bench = bench_file(project)
    report, again = (make_report([Path("runs/kd-1")], settings(bench=bench)).html for _ in range(2))
    assert report == again
    html = Page(report)
    levels = [int(tag[1]) for tag, _ in html.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    images = [attributes for tag, attributes in html.elements if tag == "img"]
    assert images
    assert all(attributes.get("alt") for attributes in images)
    [script] = re.findall(r"<script>(.*?)</script>", report, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', report)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert f"script-src 'sha256-{digest}'" in policy[1]


def test_thumbnails_are_the_images_and_their_number_is_bounded(
    project: Path, made: tuple[Path, Splits]
) -> None:
    splits = made[1]
    mine, teacher = (
        outputs(Path(path), splits).argmax(1) for path in ("runs/kd-1/student.pt", "weights/teacher.pt")
    )
    different = np.flatnonzero(mine != teacher)
    assert len(different) > 3
    html = Page(make_report([Path("runs/kd-1")], settings(thumbnails=3)).html)
    pictures = thumbnails(html)
    numbers = [int(re.search(r"test image (\d+)", str(item["alt"]))[1]) for item in pictures]  # type: ignore[index]
    assert numbers == [different[0], different[round((len(different) - 1) / 2)], different[-1]]
    for item, number in zip(pictures, numbers, strict=True):
        png = base64.b64decode(str(item["src"]).removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), splits.test.images[number])
    without = make_report([Path("runs/kd-1")], settings(thumbnails=0)).html
    assert not thumbnails(Page(without))


def thumbnails(page: Page) -> list[dict[str, str | None]]:
    return [
        attributes
        for tag, attributes in page.elements
        if tag == "img" and str(attributes["alt"]).startswith("test image")
    ]


def figures(page: Page) -> list[str]:
    """The SVG figures of a page as text."""
    head = "data:image/svg+xml;base64,"
    uris = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    return [base64.b64decode(uri.removeprefix(head)).decode() for uri in uris if uri.startswith(head)]


def test_reliability_bins_sum_to_the_calibration_error() -> None:
    random = np.random.default_rng(3)
    logits = torch.from_numpy(random.normal(0, 2, (500, 4)))
    labels = torch.from_numpy(random.integers(0, 4, 500))
    bins = examine.reliability(logits, labels)
    assert sum(part.count for part in bins) == 500
    error = sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / 500
    assert error == pytest.approx(metrics.calibration_error(logits, labels))
    for part in bins:
        assert part.low < part.confidence <= part.high


def test_confused_pairs() -> None:
    cells = [(0, 0, 5), (0, 1, 3), (1, 0, 1), (1, 1, 9), (2, 0, 7)]
    assert page.pairs(cells) == ([(2, 0, 7, 100.0), (0, 1, 3, 37.5), (1, 0, 1, 10.0)], 3)
    assert page.pairs(cells, 1) == ([(2, 0, 7, 100.0)], 3)


@pytest.mark.parametrize(("classes", "drawn"), [(30, "svg"), (2_500, "list")])
def test_tables_of_many_classes_are_cut_with_a_note(project: Path, classes: int, drawn: str) -> None:
    cells = [[index, index, 9] for index in range(classes)] + [[3, 5, 4]]
    values = json.loads(Path("runs/kd-1/result.json").read_text())
    values["test"] |= {
        "confusion": cells,
        "per_class": [100 * 9 / 13 if index == 3 else 100.0 for index in range(classes)],
    }
    Path("runs/kd-1/result.json").write_text(json.dumps(values))
    checkpoint = gather.checkpoint.load(Path("runs/kd-1/student.pt"))
    object.__setattr__(checkpoint, "classes", tuple(f"class {i}" for i in range(classes)))
    gather.checkpoint.save(Path("runs/kd-1/student.pt"), checkpoint)
    report = make_report([Path("runs/kd-1")], settings())
    text = Page(report.html).text
    assert ('alt="Confusion matrix of kd-1' in report.html) == (drawn == "svg")
    assert (f"A matrix of {classes:,} classes is too large to show" in text) == (drawn == "list")
    assert "The 1 most frequent of 1 confusions that occur" in text
    assert "class 3class 5430.8" in text
    assert (f"The 40 of {classes:,} classes with the lowest accuracy" in text) == (classes > 40)
    assert len(report.html) < 1_000_000


WRONG_RESULTS = {
    "truncated": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "\x00\xff",
    "a list": lambda text: "[1]",
    "deep": lambda text: "[" * 100_000,
    "NaN": lambda text: re.sub(r'"accuracy": [0-9.]+', '"accuracy": NaN', text),
    "infinite": lambda text: re.sub(r'"accuracy": [0-9.]+', '"accuracy": 1e999', text),
    "text for a number": lambda text: re.sub(r'"accuracy": [0-9.]+', '"accuracy": "90"', text),
    "above 100": lambda text: re.sub(r'"accuracy": [0-9.]+', '"accuracy": 101', text),
    "a huge number": lambda text: text.replace('"count": 80', '"count": ' + "9" * 5000),
    "no test": lambda text: text.replace('"test"', '"tset"'),
    "null": lambda text: "null",
    "no cell": lambda text: json.dumps(
        json.loads(text) | {"test": json.loads(text)["test"] | {"confusion": [[1]]}}
    ),
    "other classes": lambda text: json.dumps(
        json.loads(text)
        | {"test": json.loads(text)["test"] | {"confusion": [[0, 0, 80]], "per_class": [1.0]}}
    ),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_a_wrong_result_is_one_line(project: Path, case: str) -> None:
    path = Path("runs/kd-1/result.json")
    path.write_text(WRONG_RESULTS[case](path.read_text()), encoding="utf-8")
    with pytest.raises(KdError, match="no finished run to report on: kd-1: ") as caught:
        gather.gather([Path("runs/kd-1")])
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


def test_a_wrong_result_leaves_one_run_out(project: Path) -> None:
    Path("runs/kd-1/result.json").write_text("null")
    report = make_report([Path("runs/kd-1"), Path("runs/ce-1")], settings())
    assert [name for name, _ in report.left_out] == ["kd-1"]
    assert "Left out, " in Page(report.html).text


WRONG_METRICS = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000 + b"\n{}\n",
    b'{"kind": "epoch", "epoch": "1", "loss": 1}\n{"kind": "epoch", "epoch": 1, "loss": NaN}\n1\nnull\n\n',
    b'{"kind": "epoch", "epoch": 1, "loss": 1, "val_accuracy": [1]}\n{"kind": "epoch", "epoch": '
    + b"9" * 5000
    + b"}\n",
]


@pytest.mark.parametrize("content", WRONG_METRICS, ids=range(len(WRONG_METRICS)))
def test_wrong_metrics_leave_the_curve_out(project: Path, content: bytes) -> None:
    Path("runs/kd-1/metrics.jsonl").write_bytes(content)
    run = gather.read_run(Path("runs/kd-1"))
    assert run.validation == ()
    assert sum("metrics.jsonl" in problem for problem in run.problems) == (content.count(b"\n") > 1)


@pytest.mark.parametrize("name", ["config.toml", "environment.json"])
@pytest.mark.parametrize("content", [b"\xff\x00", b"[" * 100_000, b"a" * 2_000_000, None])
def test_wrong_settings_are_a_problem(project: Path, name: str, content: bytes | None) -> None:
    path = Path("runs/kd-1") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    run = gather.read_run(Path("runs/kd-1"))
    assert (run.config if name == "config.toml" else run.environment) == ()
    assert any(name in problem for problem in run.problems)


def test_the_page_names_what_could_not_be_read(project: Path) -> None:
    Path("runs/kd-1/metrics.jsonl").write_text("1\n2\n")
    Path("runs/kd-1/environment.json").unlink()
    report = make_report([Path("runs/kd-1")], settings())
    text = Page(report.html).text
    assert "Without validation accuracy, so not in the figure: kd-1" in text
    assert "environment.json could not be read." in text
    assert sum("metrics.jsonl" in note or "environment.json" in note for note in report.notes) == 2


def test_without_data_or_teacher_the_page_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("weights/teacher.pt").write_bytes(b"another")
    moved = make_report([Path("runs/kd-1")], settings())
    assert "is not the teacher this run learned from" in moved.notes[0]
    Path("weights/teacher.pt").unlink()
    gone = make_report([Path("runs/kd-1")], settings())
    assert gone.runs[0]["measured"]
    assert "does not exist; pass it with --teacher" in gone.notes[0]
    monkeypatch.delitem(load.__globals__["DATASETS"], "toy")
    bare = make_report([Path("runs/kd-1")], settings())
    assert not bare.runs[0]["measured"]
    assert "Not measured on test images now: " in bare.notes[0]
    recorded = json.loads(Path("runs/kd-1/result.json").read_text())["test"]["accuracy"]
    assert bare.runs[0]["test_accuracy"] == recorded
    assert "The diagram needs the student's outputs" in Page(bare.html).text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": []}, "rows"),
        ({"rows": "x"}, "rows"),
        ({"threads": None}, "threads"),
        ({"rows": [{"name": "a"}]}, "rows.0"),
    ],
)
def test_a_wrong_benchmark_is_refused(project: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KdError, match=said) as caught:
        make_report([Path("runs/kd-1")], settings(bench=bench_file(project, **changes)))
    assert "kd bench --json" in caught.value.hint


@pytest.fixture
def kd(monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, report)


def test_the_command_writes_the_page(project: Path, kd: Any) -> None:
    result = kd("--json", "--threads", "1", "--bench", bench_file(project).as_posix(), "-o", "out/page.html")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["schema_version"] == 1
    assert summary["output"] == "out/page.html"
    assert summary["bytes"] == Path("out/page.html").stat().st_size
    assert [Path(run["run"]).name for run in summary["runs"]] == [EVIL_NAME, "ce-1", "kd-1", "base"]
    assert summary["left_out"] == [{"run": "unfinished", "reason": "not finished (no result.json)"}]
    text = Page(Path("out/page.html").read_text()).text
    assert "median of n = 15; measured before this page (bench.json)" in text
    assert "Left out, not finished (no result.json): unfinished." in text
    assert "kd train --config runs/kd-1/config.toml" in text
    assert f"kd report --output out/page.html --bench {bench_file(project).as_posix()} --threads 1" in text


@pytest.mark.slow
def test_the_command_measures_latencies(project: Path, kd: Any) -> None:
    result = kd("runs/kd-1", "--json", "--threads", "1", "-o", "page.html")
    assert all(run["latency_ms"] > 0 for run in json.loads(result.stdout)["runs"])
    text = Page(Path("page.html").read_text()).text
    assert re.search(r"median of n = \d+; measured while this page was made", text)


def test_wrong_usage(project: Path, kd: Any) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        kd("--no-bench", "--bench", "b.json")
    with pytest.raises(KdError, match=r"cannot read b\.json"):
        kd("--bench", "b.json")
    with pytest.raises(KdError, match="no such run: runs/none"):
        kd("runs/none")
    with pytest.raises(UsageError, match="must be a file, not a folder"):
        kd("-o", "runs")
    with pytest.raises(KdError, match="no finished run"):
        kd("runs/unfinished")
    with pytest.raises(UsageError, match="--thumbnails"):
        kd("--thumbnails", "-1")
    shutil.rmtree("runs")
    with pytest.raises(KdError, match="no runs in runs"):
        kd()
    assert not Path("report.html").exists()


def test_class_rows_with_the_largest_differences() -> None:
    names = [f"class {index}" for index in range(50)]
    labels = torch.arange(50).repeat(2)
    right = torch.eye(50)[labels]
    wrong = right.clone()
    wrong[7] = torch.eye(50)[8]  # one of the two images of class 7
    rows = page._class_rows(names, measure(wrong, labels), measure(right, labels))
    assert len(rows) == page.MAX_CLASSES
    assert (rows[0]["name"], rows[0]["count"], rows[0]["difference"]) == ("class 7", 2, -50.0)
    assert {row["difference"] for row in rows[1:]} == {0.0}


def test_a_comparison_has_its_table_and_figure_whatever_it_is_called(project: Path) -> None:
    place = comparison_folder(Path("comparisons") / EVIL_NAME)
    document = json.loads((place / "comparison.json").read_text())
    made_page = make_report(gather.folders([place]), settings(), comparisons=gather.comparisons([place]))
    assert made_page.comparisons == [place.as_posix()]
    assert [Path(run["run"]).name for run in made_page.runs] == [
        "ce-seed0",
        "ce-seed1",
        "kd-seed0",
        "kd-seed1",
    ]
    page = Page(made_page.html)
    assert "Comparison: " + EVIL_NAME in page.text
    assert "+0.50 … +2.00" in page.text
    assert "2 1 comparison" not in page.text
    assert (
        "2 seeds, the same for each method; paired t-interval over seeds; 1 comparison with ce" in page.text
    )
    assert HOSTILE[0] in page.text
    assert not [one for one in page.elements if one[0] == "img" and (one[1].get("src") or "") == "x"]
    assert [one[0] for one in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\u202e" not in made_page.html
    assert any("points more than ce" in figure for figure in figures(page))
    for text in (
        "{",
        json.dumps({**document, "standings": 3}),
        json.dumps(document).replace("1.25", "1e999"),
    ):
        (place / "comparison.json").write_text(text)
        broken = make_report([Path("runs/kd-1")], settings(), comparisons=[place])
        assert broken.comparisons == []
        assert [(name, "comparison.json" in reason) for name, reason in broken.left_out] == [
            (EVIL_NAME, True)
        ]


def test_axes_of_a_comparison_fit_the_runs_not_wide_intervals(project: Path) -> None:
    """Two seeds have t-intervals of 12.7 standard errors; here −50 … 150 and −70 … 72.5 around one point of range."""
    place = comparison_folder(Path("comparisons/wide"))
    document = json.loads((place / "comparison.json").read_text())
    for row in document["standings"]:
        row["test_interval"] = [-50.0, 150.0]
        if row["difference"]:
            row["difference"]["interval"] = [-70.0, 72.5]
    (place / "comparison.json").write_text(json.dumps(document))
    made_page = make_report([Path("runs/kd-1")], settings(), comparisons=[place])
    [figure] = [one for one in figures(Page(made_page.html)) if "points more than ce" in one]
    numbers = [float(word.replace("−", "-")) for word in re.findall(r">\s*([−\d.]+)\s*</text>", figure)]
    left, right = ([n for n in numbers if n > 20], [n for n in numbers if n <= 20])
    assert len(left) > 1 and len(right) > 1
    assert min(left) >= 44 and max(left) <= 58 and min(right) >= -2 and max(right) <= 4


def test_comparisons_are_found_and_stand_for_their_runs(project: Path) -> None:
    for name in ("b", "a"):
        folder = Path("comparisons") / name
        (folder / "runs/kd-seed10").mkdir(parents=True)
        (folder / "runs/kd-seed9").mkdir()
        (folder / "comparison.json").write_text("{}")
    assert gather.comparisons(()) == [Path("comparisons/a"), Path("comparisons/b")]
    assert gather.comparisons([Path("runs/kd-1")]) == []
    named = gather.folders([Path("runs/kd-1"), Path("comparisons/a")])
    assert named == [
        Path("runs/kd-1"),
        *(Path("comparisons/a/runs") / name for name in ("kd-seed9", "kd-seed10")),
    ]
    assert all(path.parent == Path("runs") for path in gather.folders(()))
    Path("comparisons/a/comparison.json").rename("comparisons/a/comparison.toml")  # interrupted
    assert gather.folders([Path("runs/kd-1"), Path("comparisons/a")]) == named
    shutil.rmtree("runs")
    assert len(gather.folders(())) == 4
