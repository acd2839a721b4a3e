"""``dynamax-lm-eval export``: results for leaderboards, model cards and tables, in their formats."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.export.options import ExportOptions
from dynamax_lm_eval.export.results import ResultFile, read
from dynamax_lm_eval.files import check_writable, write_text

logger = logging.getLogger(__name__)


def export(options: ExportOptions) -> Path:
    """Writes results in another format; returns the folder or the table.

    Raises:
        UserError: there are no results, or a package is missing.
    """
    folder = Path(options.folder).expanduser()
    found = read(folder)
    output = Path(options.output).expanduser() if options.output else folder / f"export-{options.format}"
    if options.format in ("csv", "parquet"):
        output = output if output.suffix == f".{options.format}" else output / f"results.{options.format}"
    check_writable(output if output.suffix == "" else output.parent, "--output: the folder", "choose another")
    logger.info("%d result files", len(found))
    if options.format in ("csv", "parquet"):
        _table(found, output)
    elif options.format == "eee":
        _every_eval_ever(found, output, options)
    else:
        for name, files in _by_backbone(found).items():
            _for_the_hub(files, output / name.replace("/", "__"), options.format)
    return output


def command(options: ExportOptions) -> str:
    """Exports results; returns where they are, for the terminal."""
    return f"{export(options)}\n"


def _table(found: Iterable[ResultFile], file: Path) -> None:
    table = pd.DataFrame([row for result in found for row in result.rows()])
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        write_text(file, table.to_csv(index=False))
    else:
        table.to_parquet(file, index=False)


def _by_backbone(found: Iterable[ResultFile]) -> dict[str, list[ResultFile]]:
    """Returns the files of each backbone, the full model first."""
    groups: dict[str, list[ResultFile]] = {}
    for result in sorted(found, key=lambda result: result.settings["label"] != "full"):
        groups.setdefault(result.settings["backbone_name"], []).append(result)
    return groups


def _for_the_hub(files: list[ResultFile], folder: Path, kind: str) -> None:
    """Writes what a model's repository on the Hub takes: one entry per operating point, which its notes name."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "model-index":
        write_text(folder / "README.md", f"---\n{_yaml(_model_index(files))}---\n")
        return
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise UserError("--format hf-eval-results needs a newer huggingface_hub; run: pip install -U it") from error
    entries: dict[str, list[Any]] = {}
    for result in files:
        for task, row in _main_rows(result):
            dataset = result.data.get("configs", {}).get(task, {}).get("dataset_path") or f"lm-eval/{task}"
            entry = EvalResultEntry(
                dataset_id=str(dataset), task_id=task, value=row["value"], date=result.date, notes=_notes(result, row)
            )
            entries.setdefault(task, []).append(entry)
    (folder / ".eval_results").mkdir(exist_ok=True)
    for task, of_task in entries.items():
        write_text(folder / ".eval_results" / f"{task}.yaml", _yaml(eval_result_entries_to_yaml(of_task)))


def _main_rows(result: ResultFile) -> list[tuple[str, dict[str, Any]]]:
    """Returns each task's first metric, which is its own."""
    first: dict[str, dict[str, Any]] = {}
    for row in result.rows():
        first.setdefault(row["task"], row)
    return list(first.items())


def _notes(result: ResultFile, row: dict[str, Any]) -> str:
    """Returns what one line has to say of an operating point."""
    of_all = row["documents_of_task"]
    limited = f" of {of_all}" if of_all is not None and of_all != row["documents"] else ""
    basis = [f"{row['documents']}{limited} documents"] if row["documents"] is not None else []
    basis += [f"{row['n_shot']}-shot"] if row["n_shot"] is not None else []
    basis += [row["dtype"]] if row["dtype"] is not None else []
    if result.settings["label"] == "full":
        return "; ".join([f"full model, {row['metric']}", *basis])
    compute = f"compute_reduction {row['compute_reduction']:.3f}, total {row['compute_reduction_total']:.3f}"
    return "; ".join([f"early exit {result.settings['label']}, {row['metric']}", compute, *basis])


def _model_index(files: list[ResultFile]) -> dict[str, Any]:
    """Returns the ``model-index`` of a model card (the layout of huggingface_hub's ``EvalResult``)."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = []
    for result in files:
        for task, first in _main_rows(result):
            for row in (row for row in result.rows() if row["task"] == task and row["filter"] == first["filter"]):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=f"{task} ({result.settings['label']})",
                        metric_type=row["metric"],
                        metric_name=f"{row['metric']}, {_notes(result, row)}",
                        metric_value=row["value"],
                        dataset_config=result.settings["label"],
                    )
                )
    return {"model-index": eval_results_to_model_index(files[0].settings["backbone_name"], results)}


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _every_eval_ever(found: Iterable[ResultFile], output: Path, options: ExportOptions) -> None:
    """Converts by the package's own command, adds policy and compute to the records, and lets it validate them."""
    if importlib.util.find_spec("every_eval_ever") is None:
        raise UserError("--format eee needs Python 3.12 or newer and: pip install every_eval_ever")
    assert options.organization is not None
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for result in found:
        before = set(output.glob("data/**/*.json"))
        _run(
            output,
            ["convert", "lm_eval", "--log_path", str(result.path.resolve()), "--output_dir", "data"],
            ["--source_organization_name", options.organization, "--evaluator_relationship", options.relationship],
            ["--eval_library_name", "lm_eval", "--eval_library_version", importlib.metadata.version("lm_eval")],
            ["--include_samples"] if list(result.path.parent.glob("samples_*.jsonl")) else [],
        )
        for file in sorted(set(output.glob("data/**/*.json")) - before):
            _enrich(file, result)
            written += [file, *file.parent.glob(f"{file.stem}_samples.jsonl")]
    _run(output, ["validate", *(str(file.relative_to(output)) for file in written)])


def _enrich(file: Path, result: ResultFile) -> None:
    """Adds what the converter does not know of: how tokens leave, and all compute."""
    record = json.loads(file.read_text(encoding="utf-8"))
    task = str(record["evaluation_id"]).partition("/")[0]
    details = record["model_info"].setdefault("additional_details", {})
    details["dynamax_label"] = result.settings["label"]
    details["dynamax_policy"] = json.dumps(result.settings["policy"])
    details["dynamax_compute"] = json.dumps(result.data["compute"]["by_task"].get(task))
    record["model_info"]["inference_engine"] = {"name": "dynamax-lm-eval", "version": result.settings["version"]}
    write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _run(folder: Path, *arguments: list[str]) -> None:
    """Runs Every Eval Ever; raises UserError with what it says where it fails."""
    line = [sys.executable, "-m", "every_eval_ever", *(part for some in arguments for part in some)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())[-500:]
        raise UserError(f"every_eval_ever {arguments[0][0]} failed: {said}")
