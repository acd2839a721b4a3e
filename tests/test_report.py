"""Reports: what is shown is what the result files say, and the statistics are right on known cases."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shlex
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers_harness import made_results, sweep_options

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.reports import page, plots, texts
from dynamax_lm_eval.reports.command import report
from dynamax_lm_eval.reports.names import is_flat, opening_metric
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.files import POINT, POINT_NAME, finished_points
from dynamax_lm_eval.sweep.results import TaskResults
from dynamax_lm_eval.sweep.similarity import consistency, token_f1


@pytest.fixture(scope="module")
def swept(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.sweep(sweep_options(model_folder, tmp_path_factory.mktemp("sweep") / "out"))


@pytest.fixture(scope="module")
def reported(swept: Path) -> Path:
    assert main(["report", str(swept), "--metrics", "tiny_choice=acc", "--bootstrap", "50"]) == 0
    return swept / "report"


def unpacked(folder: Path, part: str) -> str:
    """What a page has packed under a name, as a browser unpacks it."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(rf'<script type="text/plain" id="{part}">\n([A-Za-z0-9+/=]+)\n</script>', text)
    assert found is not None
    return gzip.decompress(base64.b64decode(found.group(1))).decode("utf-8")


def page_data(folder: Path, part: str = "data") -> Any:
    return json.loads(unpacked(folder, part))


def vouch_for_nothing(home: Path) -> None:
    """Results of a point may be changed by hand from now on."""
    POINT.write(home / POINT_NAME, {**POINT.read(home / POINT_NAME), "checksums": {}})


def data_equal(swept: Path, point: dict[str, Any]) -> float:
    """Share of logged texts that are those of the full model."""

    def texts(of: dict[str, Any]) -> list[str]:
        lines = (of["folder"] / of["samples"]["tiny_generate"]).read_text().splitlines()
        return [sample["resps"][0][0].strip() for sample in map(json.loads, lines)]

    (whole,) = [p for p in finished_points(swept) if p["point"] == "full"]
    return float(np.mean([a == b for a, b in zip(texts(whole), texts(point), strict=True)]))


def test_the_table_says_what_was_run(swept: Path, reported: Path) -> None:
    table = pd.read_csv(reported / "points.csv").drop_duplicates("point").set_index("point")
    for point in finished_points(swept):
        data = json.loads((point["folder"] / point["results"]).read_text())
        row, settings = table.loc[point["point"]], data["config"]["dynamax"]
        assert (row["dtype"], row["device"]) == (settings["dtype"], settings["device"])
        assert datetime.fromisoformat(row["date"]).timestamp() == int(data["date"])
        if point["family"] == "exits":
            assert row["exit_layers"] == "+".join(map(str, settings["policy"]["exit_layers"]))
        else:
            assert pd.isna(row["exit_layers"])
        assert pd.isna(row["exits_fingerprint"]), "none are trained"
    task = collect.read([swept], 0.1)[0]
    result = next(point for point in task.points if point.kind == "exits")
    result.run["exits_fingerprint"] = "0123456789abcdef"
    task.points = [task.full, result]
    assert collect.tidy([task])["exits_fingerprint"].fillna("").tolist() == ["", "0123456789ab"]


def test_the_table_holds_what_the_result_files_say(swept: Path, reported: Path) -> None:
    table = pd.read_csv(reported / "points.csv", float_precision="round_trip")
    parquet = pd.read_parquet(reported / "points.parquet")
    parquet["exits_fingerprint"] = parquet["exits_fingerprint"].astype(float)  # of none, which is None there
    pd.testing.assert_frame_equal(table, parquet, check_dtype=False)
    assert len(table) == 6 * 2
    for point in finished_points(swept):
        data = json.loads((point["folder"] / point["results"]).read_text())
        for task, metric in (("tiny_generate", "exact_match"), ("tiny_choice", "acc")):
            (row,) = table[(table["point"] == point["point"]) & (table["task"] == task)].to_dict("records")
            assert row["metric"] == metric
            assert row["score"] == data["results"][task][f"{metric},none"]
            assert row["compute_reduction"] == data["compute"]["by_task"][task]["compute_reduction"]
            full = json.loads(
                next(p for p in finished_points(swept) if p["point"] == "full")["folder"]
                .joinpath(next(p for p in finished_points(swept) if p["point"] == "full")["results"])
                .read_text()
            )
            macs = [run["compute"]["by_task"][task]["macs"]["total"] for run in (full, data)]
            if task == "tiny_generate":
                assert row["consistency_exact"] == data_equal(swept, point)
            assert row["compute_vs_full"] == pytest.approx(macs[0] / macs[1])


def test_what_is_plotted_is_in_the_result_files(reported: Path) -> None:
    table = pd.read_csv(reported / "points.csv", float_precision="round_trip").set_index(["task", "point"])
    tasks = page_data(reported)["tasks"]
    assert len(tasks) == 2
    for task in tasks:
        name = task["title"].partition(": ")[2]
        assert task["points"][0]["name"] == "full"
        for point in task["points"]:
            row = table.loc[(name, point["name"])]
            assert point["scores"][task["usual_metric"]][0] == row["score"]
            assert point["at"]["compute_reduction"] == row["compute_reduction"]
            assert point["at"]["compute_vs_full"] == pytest.approx(row["compute_vs_full"])


def test_intervals_stand_beside_every_number_that_compares(swept: Path, reported: Path) -> None:
    table = pd.read_csv(reported / "points.csv")
    for name in ("compute_vs_full", "consistency_exact"):
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all() and (
            table[name] <= table[f"{name}_high"] + 1e-9
        ).all()
    texts = table[(table["task"] == "tiny_generate") & (table["family"] != "full")]
    (task,) = [task for task in collect.read([swept], 0.1) if task.task == "tiny_generate"]
    left_out = {point.name: int(task.loops(point).sum()) for point in task.points[1:]}
    assert dict(zip(texts["point"], texts["loops_left_out"], strict=True)) == left_out
    for point in task.points:
        limit = round(point.compute["token_limit_share"] * len(point.samples))
        assert sum(point.looping) >= limit > 0, "the tiny model hardly ever stops by itself"
    assert table.loc[table["task"] == "tiny_choice", "loops_left_out"].isna().all()
    text = (reported / "report.md").read_text(encoding="utf-8")
    assert "in the point's run or in the full model's (`left_out`)" in text
    assert re.search(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", text)
    (shown,) = [task for task in page_data(reported)["tasks"] if task["title"].endswith("tiny_generate")]
    assert shown["intervals"]["full"]["compute_vs_full_low"] == 1
    assert set(shown["without"]["exact_match,none"]) == {point.name for point in task.points[1:]}


def test_files_of_a_report(reported: Path) -> None:
    names = {path.name for path in reported.iterdir()}
    assert {"points.csv", "points.parquet", "report.md", "report.html"} < names
    assert sum(name.endswith(".png") for name in names) == sum(name.endswith(".svg") for name in names) == 3
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    assert "plotly.js v" in unpacked(reported, "plotly")
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", text)
    assert "default-src 'none'" in text, "a browser keeps the page from asking for anything"
    for task in page_data(reported)["tasks"]:
        assert set(task["figures"]) <= set(task["metrics"])
        assert {file for files in task["figures"].values() for file in files} < names


def test_the_page_shows_the_layers_of_every_token(swept: Path, reported: Path) -> None:
    (task,) = [task for task in collect.read([swept], 0.1) if task.task == "tiny_generate"]
    point = next(point for point in task.points if point.name == "state-skip-0.3")
    shown = texts.strip(point, 0)
    assert shown is not None
    assert "".join(text for text, _ in shown).startswith(point.answers[0][:3])
    assert [layer for _, layer in shown[1:]] == point.samples[0]["exit_layers"][0]
    assert shown[0][1] == 6, "the first token comes from the prompt"


def test_the_page_says_how_sure_exits_were(swept: Path, reported: Path) -> None:
    (task,) = [task for task in collect.read([swept], 0.1) if task.task == "tiny_generate"]
    point = next(point for point in task.points if point.name == "state-skip-0.3")
    said, shown = texts.confidences(point, 0), texts.strip(point, 0)
    assert said is not None and shown is not None and said[0] == [], "of the first token nothing was decided"
    exits, (threshold,) = texts.exits(point), set(point.policy["thresholds"])
    for (_, layer), confidences in list(zip(shown, said, strict=True))[1:]:
        asked = exits[: len(confidences)]
        assert asked == [exit_layer for exit_layer in exits if exit_layer <= layer]
        is_sure = [value is not None and value > threshold - 0.001 for value in confidences]
        assert is_sure == [exit_layer == layer for exit_layer in asked]
    assert texts.confidences(task.full, 0) is None
    (number,) = [i for i, found in enumerate(page_data(reported)["tasks"]) if found["title"].endswith("tiny_generate")]
    answers = page_data(reported, "texts")[number]["answers"]
    assert any("confidences" in answer for answer in answers[point.name])
    assert not any("confidences" in answer for answer in answers["full"])


def test_texts_cannot_leave_their_script() -> None:
    data = {"text": "</script><script>alert(1)</script>", "nan": math.nan}
    packed = page.packed(page.as_json(data))
    assert re.fullmatch("[A-Za-z0-9+/=]+", packed)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == {**data, "nan": None}


def test_the_page_says_what_was_run(swept: Path, reported: Path) -> None:
    data = page_data(reported)
    (command_line,) = data["commands"]
    words = shlex.split(command_line)
    assert words[:3] == ["dynamax-lm-eval", "sweep", "--backbone"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--tasks"] == "tiny_generate,tiny_choice" and options["--thresholds"] == "0.3,0.6"
    assert "--seed" not in options, "defaults are left out"
    facts = data["tasks"][0]["facts"]
    assert facts["dtype"] == "float32" and facts["device"].startswith("cpu") and facts["batch size"] == "5"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"]) and "lm_eval 0." in facts["versions"]


def test_the_page_holds_the_same_documents_of_all_points(swept: Path, reported: Path) -> None:
    (task,) = [task for task in collect.read([swept], 0.1) if task.task == "tiny_generate"]
    index = [found["title"].endswith("tiny_generate") for found in page_data(reported)["tasks"]].index(True)
    shown = page_data(reported, "texts")[index]
    places = [[sample["doc_id"] for sample in task.full.samples].index(found["id"]) for found in shown["documents"]]
    for point in task.points:
        answers = shown["answers"][point.name]
        assert [answer["same"] for answer in answers] == [point.answers[i] == task.full.answers[i] for i in places]
        assert ["".join(answer["tokens"]) for answer in answers] == ["".join(point.pieces[i] or []) for i in places]


def test_consistency() -> None:
    found = consistency(["The cat sat", "yes", ""], ["the cat lay down", "yes ", ""])
    assert found["exact"] == [0, 1, 1]
    f1 = 2 * 2 / (3 + 4)
    assert found["token_f1"] == pytest.approx([f1, 1, 1])
    assert found["rouge_l"] == pytest.approx([f1, 1, 1])
    assert token_f1("a b", "c") == 0
    assert consistency([None, None], [None, None]) == {}
    assert consistency([1, 2, 0], [1, 0, 0]) == {"exact": [1, 0, 1]}


def test_degenerate_points_are_marked_and_left_out(swept: Path, tmp_path: Path) -> None:
    (task,) = [task for task in collect.read([swept], 0.1) if task.task == "tiny_generate"]
    assert all(point.valid for point in task.points)
    for path in swept.rglob(POINT_NAME):
        point = json.loads(path.read_text())
        home = tmp_path / path.parent.name
        home.mkdir()
        for name in (POINT_NAME, "responses.jsonl", point["results"], *point["samples"].values()):
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text((path.parent / name).read_text())
        if point["point"] == "state-skip-0.3":
            data = json.loads((home / point["results"]).read_text())
            data["compute"]["by_task"]["tiny_generate"]["degenerate_rate"] = 0.4
            (home / point["results"]).write_text(json.dumps(data))
            vouch_for_nothing(home)
    (task,) = [task for task in collect.read([tmp_path], 0.3) if task.task == "tiny_generate"]
    assert [point.name for point in task.points if not point.valid] == ["state-skip-0.3"]
    (reason,) = [point.invalid_because for point in task.points if not point.valid]
    assert reason.startswith("40% of its texts repeat themselves, more than 30% above the full model's ")
    table = collect.tidy([task])
    assert not table.set_index("point").loc["state-skip-0.3", "valid"], "it stays in the data"
    (task,) = [task for task in collect.read([tmp_path], 0.5) if task.task == "tiny_generate"]
    assert all(point.valid for point in task.points)


def test_points_that_hit_the_token_limit_too_often(swept: Path, tmp_path: Path) -> None:
    """The tiny model never stops by itself, so every generation does."""
    for limit, valid in {0.5: False, 1.0: True}.items():
        (task,) = [
            task for task in collect.read([swept], 0.1, lambda _, share=limit: share) if task.task == "tiny_generate"
        ]
        assert task.full.valid and {point.valid for point in task.points[1:]} == {valid}
    given = {"folders": [str(swept)], "output": str(tmp_path / "report"), "bootstrap": 20}
    report(ReportOptions(**given, max_token_limit="tiny_generate=0.05"))
    table = pd.read_csv(tmp_path / "report" / "points.csv")
    exits = table[table["family"] == "exits"]
    assert not exits[exits["task"] == "tiny_generate"]["valid"].any()
    assert exits[exits["task"] != "tiny_generate"]["valid"].all()
    for wrong, message in {"some": "must be a number", "other=0.1": "there is no task other"}.items():
        with pytest.raises(UserError, match=message):
            report(ReportOptions(**given, max_token_limit=wrong))


def test_points_that_are_not_finished_are_named(swept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(swept, tmp_path / "sweep")
    report(ReportOptions([str(folder)], bootstrap=20))
    assert "Not finished" not in (folder / "report" / "report.md").read_text(encoding="utf-8")
    shutil.rmtree(folder / "points" / "state-skip-0.6")
    (folder / "points" / "pruning-deepest-1" / POINT_NAME).unlink()
    report(ReportOptions([str(folder)], bootstrap=20))
    names = "state-skip-0.6, pruning-deepest-1"
    assert f"2 points are not finished and left out: {names}" in caplog.text
    assert f"**Not finished yet, and left out (2):** {names}" in (folder / "report" / "report.md").read_text("utf-8")
    assert page_data(folder / "report")["missing"] == names.split(", ")


def test_answers_that_rounding_alone_changed_are_told_apart(swept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(swept, tmp_path / "sweep")
    shutil.rmtree(folder / "report", ignore_errors=True)
    (point,) = [point for point in finished_points(folder) if point["point"] == "state-skip-0.6"]
    data = json.loads((point["folder"] / point["results"]).read_text(encoding="utf-8"))
    path = point["folder"] / point["samples"]["tiny_generate"]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    lines[0]["resps"][0][0] = "another text"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    for histogram, expected in (({"6": 40}, True), ({"2": 1, "6": 39}, False)):
        data["compute"]["by_task"]["tiny_generate"]["exit_histogram"] = histogram
        (point["folder"] / point["results"]).write_text(json.dumps(data))
        vouch_for_nothing(point["folder"])
        report(ReportOptions([str(folder)], bootstrap=20, draws=20))
        table = pd.read_csv(folder / "report" / "points.csv")
        found = table[(table["point"] == "state-skip-0.6") & (table["task"] == "tiny_generate")]["only_rounding"]
        assert set(found) == {expected}
        text = (folder / "report" / "report.md").read_text(encoding="utf-8")
        assert ("No token left early under state-skip-0.6" in text) == expected


def test_texts_may_hold_any_line_separator(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(swept, folder)
    (task,) = [task for task in collect.read([folder], 0.1) if task.task == "tiny_generate"]
    (whole,) = [point for point in finished_points(folder) if point["point"] == "full"]
    path = whole["folder"] / whole["samples"]["tiny_generate"]
    lines = path.read_text(encoding="utf-8").split("\n")
    sample = json.loads(lines[0])
    sample["resps"][0][0] = "one\u2028two\x85three"
    path.write_text("\n".join([json.dumps(sample, ensure_ascii=False), *lines[1:]]), encoding="utf-8")
    vouch_for_nothing(whole["folder"])
    (after,) = [task for task in collect.read([folder], 0.1) if task.task == "tiny_generate"]
    assert sample["resps"][0][0] in after.full.answers
    assert len(after.full.answers) == len(task.full.answers)


def test_help_needs_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    assert "--max_degenerate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["--metrics", "tiny_generate=bleu"], "bleu"),
        (["--metrics", "tiny_other=acc"], "tiny_other"),
        (["--metrics", "acc"], "--metrics"),
        (["--metric", "a=b"], "--metrics"),
    ],
)
def test_refusals(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folders = [] if arguments == ["nowhere"] else [str(swept)]
    assert main(["report", *folders, *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_labels_of_figures(tmp_path: Path) -> None:
    files = plots.plot(made_results(), "acc,none", tmp_path / plots.file_stem(made_results(), "acc,none"))
    svg = next(file for file in files if file.suffix == ".svg").read_text()
    for text in ("full model", "Pareto front", "calm, skip", ">1.5<", "hollow: left out"):
        assert (text in svg) == (text != "hollow: left out"), text
    task = made_results()
    task.points[1].valid = False
    plots.plot(task, "acc,none", tmp_path / "left-out")
    assert "hollow: left out, texts repeat or do not end (1)" in (tmp_path / "left-out.svg").read_text()


def varied(value: float, rouge: tuple[float, ...] = (1.0, 0.5, 0.25)) -> TaskResults:
    """Points whose own metric has one value, and whose answers differ."""
    task = made_results()
    for found, likeness in zip(task.points, rouge, strict=True):
        found.samples = [{**sample, "acc": value, "f1": likeness / 2} for sample in found.samples]
        found.scores = {"acc,none": (value, 0.0), "f1,none": (likeness / 2, 0.0)}
        found.similarity = {"consistency_rouge_l": [likeness] * len(found.samples)}
        found.scores["consistency_rouge_l"] = (likeness, 0.0)
    return task


def test_a_metric_that_is_the_same_everywhere_does_not_begin_a_task() -> None:
    task = varied(0.0)
    assert is_flat(task, "acc,none") and not is_flat(task, "f1,none")
    assert opening_metric(task, "acc,none") == "consistency_rouge_l"
    assert opening_metric(task, "f1,none") == "f1,none"
    del task.points[0].scores["consistency_rouge_l"]
    assert opening_metric(task, "acc,none") == "f1,none", "there is no similarity of answers"
    assert opening_metric(varied(0.0, (1.0, 1.0, 1.0)), "acc,none") == "acc,none", "nothing varies"
    task = varied(0.5)
    for found, right in zip(task.points, (0, 1, 0), strict=True):
        found.samples = [{**sample, "acc": float(i % 2 == right)} for i, sample in enumerate(found.samples)]
    assert not is_flat(task, "acc,none"), "other documents are right"
    task.points = task.points[:1]
    assert not is_flat(task, "acc,none"), "one point is the same as nothing"


def test_of_a_metric_that_is_the_same_everywhere_one_line_is_said(swept: Path, tmp_path: Path) -> None:
    title = "### Exact match (`exact_match`), "
    line = "Exact match is 0.000 at every point and on every document: it tells no points apart."
    for metrics, opened in ((None, "consistency_rouge_l"), ("tiny_generate=exact_match", "exact_match,none")):
        report(ReportOptions([str(swept)], output=str(tmp_path), metrics=metrics, bootstrap=20, draws=20))
        (shown,) = [task for task in page_data(tmp_path)["tasks"] if task["title"].endswith("tiny_generate")]
        assert shown["metric"] == opened, "what was asked for stays"
        assert shown["flat"]["exact_match,none"] == "Exact match is 0.000 at every point."
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        section = text[text.index(title) :].partition("\n###")[0]
        assert line in section and "|" not in section
        assert "### Against the full model, exact_match" not in text
        assert "### ROUGE-L with the full model" in text


def test_a_front_of_one_point_is_not_named(tmp_path: Path) -> None:
    task = made_results()
    task.points = [task.full, task.points[1]]
    for axis_point in task.points[1:]:
        axis_point.compute["compute_reduction"] = 0.9
        axis_point.samples = [{**sample, "macs": {**sample["macs"], "total": 120.0}} for sample in axis_point.samples]
    plots.plot(task, "acc,none", tmp_path / "one")
    svg = (tmp_path / "one.svg").read_text()
    assert "full model" in svg and "Pareto front" not in svg
