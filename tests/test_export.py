"""Results in the formats of other readers, read back by these readers' own code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import yaml
from helpers_harness import sweep_options

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.export import command as exporting
from dynamax_lm_eval.export.options import ExportOptions
from dynamax_lm_eval.export.results import read
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep.files import finished_points

#: An interpreter that has every_eval_ever, which needs a newer Python than this package does.
INTERPRETER = os.environ.get("EVERY_EVAL_EVER_PYTHON")


@pytest.fixture(scope="module")
def swept(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.sweep(sweep_options(model_folder, tmp_path_factory.mktemp("sweep") / "out", limit=3))


def exported(folder: Path, kind: str, output: Path, *more: str) -> Path:
    assert main(["export", str(folder), "--format", kind, "--output", str(output), *more]) == 0
    return output


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_have_every_number(swept: Path, tmp_path: Path, kind: str) -> None:
    exported(swept, kind, tmp_path / "out")
    file = tmp_path / "out" / f"results.{kind}"
    table = pd.read_csv(file) if kind == "csv" else pd.read_parquet(file)
    points = finished_points(swept)
    assert table["model_name"].nunique() == len(points)
    assert set(table["backbone"]) == {"local/tiny-llama-for-tests"}
    for point in points:
        data = json.loads((point["folder"] / point["results"]).read_text(encoding="utf-8"))
        own = table[table["model_name"] == data["model_name"]]
        for task, metrics in data["results"].items():
            numbers = {key: value for key, value in metrics.items() if "," in key and "_stderr" not in key}
            found = own[own["task"] == task].set_index("metric")["value"].to_dict()
            assert found == pytest.approx({key.partition(",")[0]: value for key, value in numbers.items()})


def test_entries_of_the_hub(swept: Path, tmp_path: Path) -> None:
    exported(swept, "hf-eval-results", tmp_path)
    folder = tmp_path / "local__tiny-llama-for-tests" / ".eval_results"
    assert {file.name for file in folder.iterdir()} == {"tiny_generate.yaml", "tiny_choice.yaml"}
    found = yaml.safe_load((folder / "tiny_choice.yaml").read_text(encoding="utf-8"))
    entries = huggingface_hub.parse_eval_result_entries(found)
    assert len(entries) == len(finished_points(swept))
    assert len({entry.notes for entry in entries}) == len(entries), "one for each operating point"
    assert str(entries[0].notes).startswith("full model, acc; 3 of ")
    assert str(entries[0].notes).endswith(" documents; 0-shot; float32")
    assert all("compute_reduction" in str(entry.notes) for entry in entries[1:])


def test_metadata_of_a_model_card(swept: Path, tmp_path: Path) -> None:
    exported(swept, "model-index", tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "local__tiny-llama-for-tests" / "README.md")
    results = card.data.eval_results
    labels = {result.dataset_config for result in results}
    assert len(labels) == len(finished_points(swept)) and "full" in labels
    assert any(result.metric_type == "compute_reduction" and result.metric_value > 1 for result in results)


def test_of_several_runs_the_largest_counts_and_then_the_newest(
    swept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first, *_) = read(swept)

    def write(date: int, documents: int, dtype: str = "float32") -> None:
        compute = {**first.data["compute"], "by_task": {"t": {"documents": documents}}}
        config = {**first.data["config"], "dynamax": {**first.settings, "dtype": dtype}}
        changed = {"date": float(date), "results": {"t": {"acc,none": float(date)}}, "compute": compute}
        (tmp_path / f"results_{date}.json").write_text(json.dumps({**first.data, **changed, "config": config}))

    for date, documents in ((1, 100), (2, 100), (3, 1)):
        write(date, documents)
    (tmp_path / "results_other.json").write_text(json.dumps({"config": {"model": "hf"}, "results": {}}))
    (found,) = read(tmp_path)
    assert next(found.rows())["value"] == 2.0 and found.date.startswith("1970-01-01")
    left = [message for message in caplog.messages if "left out" in message]
    assert len(left) == 2 and "results_3.json" in left[1] and "with 100 documents (here 1)" in left[1]
    write(4, 5, "bfloat16")
    assert len(read(tmp_path)) == 2, "in another dtype it is another result"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "xml"}, "--format must be one of csv, parquet"),
        ({"format": "eee"}, "needs --organization"),
        ({"format": "csv", "organization": "me"}, "--organization has no effect"),
        ({"format": "eee", "organization": "me", "relationship": "friend"}, "--relationship must be one of"),
    ],
)
def test_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportOptions("folder", **given)


def test_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--format", "csv"]) == 2
    assert "holds no results_*.json of --model dynamax" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--format", "csv"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_missing_package_is_named(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install every_eval_ever"):
        exporting.export(ExportOptions(str(swept), "eee", str(tmp_path), "me"))


def test_every_eval_ever_takes_the_records(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted and validated by its own code: all rows, compute of every document, one id per operating point."""
    if INTERPRETER is None:
        pytest.importorskip("every_eval_ever", reason="every_eval_ever needs Python 3.12 (EVERY_EVAL_EVER_PYTHON)")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
        monkeypatch.setattr(exporting, "sys", SimpleNamespace(executable=INTERPRETER))
    exported(swept, "eee", tmp_path, "--organization", "me")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("data/**/*.json")]
    points = {point["point"]: point for point in finished_points(swept)}
    assert len(records) == 2 * len(points)
    assert len({record["model_info"]["id"] for record in records}) == len(points)
    for record in records:
        details = record["model_info"]["additional_details"]
        task = record["evaluation_id"].partition("/")[0]
        compute = json.loads(details["dynamax_compute"])
        scores = {
            result["metric_config"]["metric_name"]: result["score_details"]["score"]
            for result in record["evaluation_results"]
        }
        assert scores["compute_reduction"] == pytest.approx(compute["compute_reduction"])
        assert json.loads(details["dynamax_policy"])["num_layers"] == 6
        lines = Path(tmp_path, record["detailed_evaluation_results"]["file_path"]).read_text(encoding="utf-8")
        samples = [json.loads(line) for line in lines.splitlines()]
        of_compute = [line for line in samples if line["evaluation_result_id"].startswith("compute_reduction")]
        assert len(of_compute) == compute["documents"], task
