"""The schemas of what this package adds to result files: real results are valid, and the documentation shows them."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers_harness import EXIT_ARGS, dynamax, evaluate, sweep_options
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from dynamax_lm_eval import schema
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep.files import finished_points

VALIDATORS = {name: jsonschema.Draft202012Validator(schema.load(name)) for name in schema.NAMES}


def check(name: str, data: Any) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in VALIDATORS[name].iter_errors(data)]
    assert not errors, errors[:5]


@pytest.mark.parametrize("name", schema.NAMES)
def test_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.load(name))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"threshold": 1},
        {"threshold": 1, "prune_layers": 1, "prune_scope": "generated"},
        {"preset": "paper", "final_block": False, "exit_scope": "all"},
        {"vocab_subset": 9, "prompt_exit_layer": 3, "static_segments": True, "batch_size": 2},
        {"threshold": None, "target_reduction": 1.1},
    ],
)
def test_real_results_are_valid(model_folder: Path, manager: TaskManager, given: dict[str, Any]) -> None:
    changes = {"batch_size": 3, "device": "cpu", **EXIT_ARGS, **given}
    lm = DynamaxLM(str(model_folder), **{name: value for name, value in changes.items() if value is not None})
    results = evaluate(lm, manager, "tiny_group", "tiny_rolling")
    written = json.loads(json.dumps(results, default=handle_non_serializable))
    check("results", written)
    for samples in written["samples"].values():
        for sample in samples:
            check("samples", sample)


def test_points_of_sweeps_are_valid(model_folder: Path, tmp_path: Path) -> None:
    command.sweep(sweep_options(model_folder, tmp_path, limit=1))
    points = finished_points(tmp_path)
    names = set()
    for point in points:
        data = json.loads((point["folder"] / point["results"]).read_text(encoding="utf-8"))
        check("results", data | {"compute": {**data["compute"], "overall": data["compute"]["overall"]}})
        names.add(data["model_name"])
        assert data["config"]["model_args"] and data["config"]["batch_size"] and data["config"]["device"] == "cpu"
        assert data["total_evaluation_time_seconds"] is None, "points are answered together"
        assert data["model_source"] == "dynamax"
    assert len(names) == len(points), "one name for each"


def test_every_model_argument_has_a_place(model_folder: Path) -> None:
    """An argument that is not in ``config.dynamax`` by its name is there, or in ``compute``, by what it led to."""
    elsewhere = {
        "threshold": "policy.thresholds",
        "certificate": "certificate",
        "certificate_any_task": "certificate",
        "fastest": "budget",
        "target_reduction": "budget",
        "target_latency_ms": "budget",
        "prune_layers": "policy.pruned_blocks",
        "prune_strategy": "policy.pruned_blocks",
        "prune_profile": "policy.pruned_blocks",
        "verify": "policy.verify_tokens",
        "measure_speed": "compute.overall.speed",
        "roofline": "compute.overall.roofline",
    }
    results = schema.load("results")["properties"]
    described = results["config"]["properties"]["dynamax"]["properties"]
    for argument in fields(DynamaxArgs):
        place = elsewhere.get(argument.name, argument.name)
        if place.startswith("compute."):
            assert f"`{place}`" in schema.field_table("results")
            continue
        known = described if place in described else described["policy"]["properties"]
        assert place.removeprefix("policy.") in known, argument.name
    settings = dynamax(
        model_folder, **EXIT_ARGS, degenerate_ngram=4, degenerate_tokens=9, prefix_caching=False, rebatch=False
    ).get_model_info()["dynamax"]
    assert (settings["degenerate_ngram"], settings["degenerate_tokens"]) == (4, 9)
    assert (settings["prefix_caching"], settings["rebatch"], settings["mamba_kernels"]) == (False, False, None)


def test_what_is_wrong_is_found(model_folder: Path, manager: TaskManager) -> None:
    results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate")
    written = json.loads(json.dumps(results, default=handle_non_serializable))
    for damage in (
        lambda data: data["compute"]["overall"]["macs"].pop("total"),
        lambda data: data["config"]["dynamax"].update(unknown=1),
        lambda data: data["results"]["tiny_generate"].update({"compute_reduction,none": "1.2"}),
        lambda data: data["config"]["dynamax"]["policy"].update(exit_scope=3),
    ):
        damaged = copy.deepcopy(written)
        damage(damaged)
        assert not VALIDATORS["results"].is_valid(damaged)


@pytest.mark.parametrize("name", schema.NAMES)
def test_the_documentation_shows_every_field(name: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "result_files.md").read_text(encoding="utf-8")
    table = text.partition(f"<!-- fields of {name}, by dynamax_lm_eval.schema.field_table -->\n")[2]
    assert table.partition("<!-- end of fields -->")[0] == schema.field_table(name)
