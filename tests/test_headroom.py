"""What early exit could save: read-outs, oracles, fitted adapters, and the states that tokens leave behind."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model, train_tokenizer
from helpers_engine import MODES, engine_for
from helpers_harness import evaluate, exit_model, responses, save_exits
from reference import Reference

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.compute.accounting import ComputeRecord, exit_histogram
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.requests import ScoringRequest
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.options import TextSource
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.regression import Moments
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.headroom.command import FORMAT, JSON_NAME, PLOT_NAME, headroom
from dynamax_lm_eval.headroom.errors import ErrorsByDocument
from dynamax_lm_eval.headroom.fitting import fitted_adapters
from dynamax_lm_eval.headroom.forced import forced_policies, measure
from dynamax_lm_eval.headroom.options import HeadroomOptions
from dynamax_lm_eval.headroom.oracle import allowed_errors, exit_macs, oracle_exits
from dynamax_lm_eval.headroom.reading import ReadOut, read, settled
from dynamax_lm_eval.headroom.summary import share_at, verdict
from dynamax_lm_eval.headroom.text import Row, positions, rows_of
from dynamax_lm_eval.sweep import command as sweep

EVERY = (3, 4, 5)
ROWS = [Row(random_ids(length, 70 + i), prompt) for i, (length, prompt) in enumerate(((11, 1), (9, 4), (8, 1)))]


def options(backbone: Path, output: Path, texts: Path | None = None, **changes: Any) -> HeadroomOptions:
    given: dict[str, Any] = {"exits": "none", "seq_len": 32, "device": "cpu", "batch_size": 3, **changes}
    if texts is not None:
        given |= {"dataset": str(texts), "tokens": given.get("tokens", 300)}
    return HeadroomOptions(backbone=str(backbone), output=str(output), **given)


# A model whose answer is known.


@pytest.fixture(scope="module")
def half_asleep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks 4 to 6 change nothing."""
    folder = tmp_path_factory.mktemp("models") / "half-asleep"
    model = copy.deepcopy(tiny_model("llama"))
    for block in model.model.layers[3:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_whose_later_blocks_change_nothing(half_asleep: Path, texts: Path, tmp_path: Path) -> None:
    result = headroom(options(half_asleep, tmp_path / "out", texts, seq_len=16, exit_layers="2+3+4"))
    agreement = result["read_outs"]["none"]["agreement"]
    assert agreement["2"] < 1
    assert [agreement[layer] for layer in "345"] == [1, 1, 1]
    assert result["read_outs"]["none"]["settled"]["3"] == 1
    assert result["exit_layers"] == {"every": [2, 3, 4], "default": [3, 4, 5]}
    whole = next(p for p in result["oracles"] if p["exit_layers"] == "default" and p["agreement_asked"] == 1)
    # All leave after block 3, the first of these exits: sizes of the model by hand.
    hidden, inner, kv = 32, 48, 2 * 8
    weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    lengths = lengths_of(result, texts)
    context = sum(2 * hidden * (position + 1) for length in lengths for position in range(1, length))
    tokens = sum(length - 1 for length in lengths)
    full = 6 * (tokens * weights + context)
    spent = full // 2 + tokens * 3 * (2 * hidden * kv)
    assert result["text"]["tokens"] == tokens
    assert whole["compute_reduction"] == pytest.approx(full / spent, rel=1e-12)
    assert whole["macs"]["recompute"] == tokens * 3 * (2 * hidden * kv)
    assert whole["exit_histogram"] == {"3": tokens}
    for point in result["oracles"]:
        if point["exit_layers"] == "default":
            assert point["agreement"] == {"full_depth_states": 1, "left_behind": 1}, "states are those of block 3"
            assert point["kept_of_leaving"] == 1
    assert result["full_model_again"] == 1
    assert result["verdict"]["word"] == "worth training"
    assert "the full model is near chance" in result["verdict"]["line"], "it is not trained"
    assert result["verdict"]["saving"] == pytest.approx(1 - spent / full)


def lengths_of(result: dict[str, Any], texts: Path) -> list[int]:
    """Lengths of the rows, from the documents in the command's order."""
    documents = text_documents(TextSource(str(texts), seed=result["seed"]), train_tokenizer())
    return [len(row) for row in held_out(documents, 300, result["text"]["seq_len"], 100)[0]]


# The oracle.


@pytest.mark.parametrize("errors", [0, 1, 2, 4])
@pytest.mark.parametrize("adapter_costs", [False, True])
def test_the_oracle_is_the_best_of_all_choices(errors: int, adapter_costs: bool) -> None:
    engine = engine_for("llama")
    layers, tokens = (2, 4, 5), 5
    policy = ExitPolicy(LAYERS, layers, (0.5,) * 3, confidence="state")
    if adapter_costs:
        adapters = fitted_adapters(engine.backbone, ROWS, layers, 0.1)
        engine, policy = Engine(engine.backbone, adapters), replace(policy, adapter="affine")
    macs = exit_macs(engine, policy, np.asarray([1, 2, 9, 40, 3]))
    generator = np.random.default_rng(errors)
    for _ in range(5):
        agrees = generator.random((3, tokens)) < 0.5
        ends = np.vstack([agrees, np.ones((1, tokens), dtype=bool)])
        choices = (np.asarray(choice) for choice in product(range(4), repeat=tokens))
        best = min(
            int(macs[choice, range(tokens)].sum())
            for choice in choices
            if (~ends[choice, range(tokens)]).sum() <= errors
        )
        left = oracle_exits(agrees, macs, errors)
        assert (~ends[left, range(tokens)]).sum() <= errors
        assert int(macs[left, range(tokens)].sum()) == best


def test_costs_of_leaving_are_those_of_whole_rows() -> None:
    engine = engine_for("mistral")
    policy = ExitPolicy(LAYERS, (2, 4), (0.5, 0.5), confidence="state")
    macs = exit_macs(engine, policy, positions(ROWS))
    chosen = np.random.default_rng(0).integers(0, 3, macs.shape[1])
    layers = np.asarray([2, 4, LAYERS])[chosen]
    measured = measure(engine, ROWS, forced_policies(policy, ROWS, layers), 2, "")
    assert macs[chosen, np.arange(len(chosen))].sum() == measured.record.spent_macs
    assert macs[-1].sum() == measured.record.full_macs


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2 * 8320 + 4 * 1024, 4 * 8320 + 2 * 1024, 6 * 8320]),
        ({"state_mode": "skip"}, [2 * 8320, 4 * 8320, 6 * 8320]),
        ({"final_block": True}, [3 * 8320 + 3 * 1024, 5 * 8320 + 1024, 6 * 8320]),
        ({"adapter": "affine"}, [2 * 8320 + 4 * 1024 + 32 * 32, 4 * 8320 + 2 * 1024 + 32 * 32, 6 * 8320]),
    ],
)
def test_costs_of_leaving_by_hand(changes: dict[str, Any], expected: list[int]) -> None:
    """The tenth token of the tiny Llama: a block takes 7,680 for its weights and 64 a position, K and V 1,024."""
    engine = engine_for("llama")
    if "adapter" in changes:
        engine = Engine(engine.backbone, fitted_adapters(engine.backbone, ROWS, (2, 4), 0.1))
    policy = ExitPolicy(LAYERS, (2, 4), (0.5, 0.5), confidence="state", **changes)
    assert exit_macs(engine, policy, np.asarray([9]))[:, 0].tolist() == expected


def test_errors_are_counted_without_rounding() -> None:
    assert [allowed_errors(0.95, n) for n in (19, 20, 39, 40, 100)] == [0, 1, 1, 2, 5]
    assert allowed_errors(0.9, 10) == 1
    assert allowed_errors(1.0, 10**6) == 0


def test_settled_tokens_agree_from_there_on() -> None:
    agrees = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=bool)
    assert settled(agrees).astype(int).tolist() == [[0, 1, 0], [0, 1, 1], [1, 1, 1]]


# States left behind.


class ForcedReference(Reference):
    """Tokens leave where they are told to."""

    forced: Sequence[int]

    def _exits(self, block: int, before: Any, after: Any, step: int) -> bool:
        return self.forced[step] == block


@pytest.mark.parametrize(
    ("family", "mode", "adapter"),
    [*product(["llama"], MODES, ["none", "affine"]), ("mamba2", "recompute", "none")],
)
def test_states_left_behind_are_those_of_the_reference(family: str, mode: Any, adapter: str) -> None:
    """The oracle's choices, one token at a time by the second implementation; at full depth, its read-outs."""
    model = tiny_model(family)
    engine = engine_for(family)
    adapters = (
        fitted_adapters(engine.backbone, [Row(random_ids(60, 9), 1)], EVERY, 0.1) if adapter == "affine" else None
    )
    engine = Engine(engine.backbone, adapters)
    policy = ExitPolicy(LAYERS, EVERY, (0.5,) * 3, confidence="state", state_mode=mode, adapter=adapter)
    reading = read(engine.backbone, ROWS, [ReadOut("x", EVERY, adapters, adapter)])
    left = oracle_exits(reading.agrees["x"], exit_macs(engine, policy, positions(ROWS)), 3)
    layers = np.asarray([*EVERY, LAYERS])[left]
    measured = measure(engine, ROWS, forced_policies(policy, ROWS, layers), 2, "")
    assert measured.layers.tolist() == layers.tolist()
    best: dict[int, list[int]] = {layer: [] for layer in (*EVERY, LAYERS)}
    expected: list[int] = []
    start = 0
    for row in ROWS:
        end = start + row.num_eligible
        for layer, tokens in best.items():  # only the last token leaves, so that it sees states of full depth
            if layer == LAYERS:
                tokens += referred(model, policy, adapters, row, len(row.ids), [LAYERS] * row.num_eligible)
                continue
            for length in range(row.prompt_length + 1, len(row.ids) + 1):
                forced = [*[LAYERS] * (length - row.prompt_length - 1), layer]
                tokens.append(referred(model, policy, adapters, row, length, forced)[-1])
        expected += referred(model, policy, adapters, row, len(row.ids), layers[start:end].tolist())
        start = end
    assert reading.best.tolist() == best[LAYERS]
    assert reading.agrees["x"].tolist() == [
        [a == b for a, b in zip(best[layer], best[LAYERS], strict=True)] for layer in EVERY
    ]
    assert 0 < (left < len(EVERY)).mean() < 1
    assert measured.best.tolist() == expected


def referred(model: Any, policy: ExitPolicy, adapters: Any, row: Row, length: int, forced: Sequence[int]) -> list[int]:
    """The best tokens of the tokens of a row that may leave, when they leave as told."""
    reference = ForcedReference(model, policy, row.prompt_length, 99, adapters)
    reference.forced = forced
    for token in row.ids[:length]:
        reference.feed(token)
    return [int(logits.argmax()) for logits in reference.row.logits[row.prompt_length :]]


# Fitted adapters.


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_fit_is_that_of_least_squares(ridge: float) -> None:
    torch.manual_seed(3)
    x, last = torch.randn(50, 6) @ torch.randn(6, 6) + 2, torch.randn(50, 6)
    moments = Moments.zero(6, 6, torch.device("cpu"), torch.float64)
    for part in (slice(0, 7), slice(7, 50)):
        moments.add(x[part].double(), last[part].double() - x[part].double())
    a, b = moments.solve(ridge * float(moments.covariance.diagonal().mean()))
    x, y = x.double(), last.double() - x.double()
    penalty = ridge * x.var(0, correction=0).mean() * len(x)
    rows = torch.cat(
        [torch.cat([x, torch.ones(50, 1)], 1), torch.cat([penalty.sqrt() * torch.eye(6), torch.zeros(6, 1)], 1)]
    )
    solution = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(6, 6)])).solution
    torch.testing.assert_close(a, solution[:6].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b, solution[6], rtol=1e-6, atol=1e-8)


def test_adapters_are_fitted_on_the_tokens_that_may_leave() -> None:
    backbone = engine_for("llama").backbone
    rows = [Row(random_ids(60, 200 + i), 5) for i in range(2)]
    adapters = fitted_adapters(backbone, rows, EVERY, 0.0)
    batch = FrozenPass(backbone, EVERY, False, 1).run([row.ids for row in rows])
    tokens = [*range(5, 60), *range(65, 120)]
    for layer in EVERY:
        x, y = batch.exits[layer][tokens].double(), batch.last[tokens].double()
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
        adapter = adapters.adapter(layer)
        assert adapter is not None
        expected = torch.cat([x, torch.ones(len(x), 1)], 1) @ solution
        torch.testing.assert_close(adapter(batch.exits[layer][tokens]), expected.float(), rtol=1e-3, atol=1e-3)
    assert adapters.adapter_macs() == dict.fromkeys(EVERY, 32 * 32)


@pytest.mark.parametrize("task", [None, "tiny_generate"])
def test_adapters_are_fitted_on_other_documents(
    task: str | None, model_folder: Path, texts: Path, tmp_path: Path, manager: Any
) -> None:
    lm = exit_model(model_folder, threshold=1)
    given: dict[str, Any] = {"fit_adapters": True, "seed": 3}
    if task is None:
        measured, fitting = rows_of(lm, None, options(model_folder, tmp_path, texts, fit_tokens=500, **given))
        documents = list(text_documents(TextSource(str(texts), seed=3), lm.tokenizer)(0, 0))
        of_document = [next(i for i, d in enumerate(documents) if begins_in(row.ids, d)) for row in measured + fitting]
        assert max(of_document[: len(measured)]) < min(of_document[len(measured) :])
        assert sum(len(row.ids) for row in fitting) in (499, 500)
    else:
        measured, fitting = rows_of(lm, manager, options(model_folder, tmp_path, tasks=task, **given))
        every, none = rows_of(lm, manager, options(model_folder, tmp_path, tasks=task, seed=3))
        assert none == []
        assert sorted(map(repr, measured + fitting)) == sorted(map(repr, every))
        assert len(measured) - len(fitting) in (0, 1)


def begins_in(ids: list[int], document: list[int]) -> bool:
    """Whether these are tokens of a document, at a multiple of the longest row."""
    return any(document[start : start + len(ids)] == ids for start in range(0, len(document), 32))


# Errors.


def test_errors_are_those_of_a_ratio_over_documents() -> None:
    rows = [
        Row([0] * (count + 1), 1, ("", document)) for document, count in zip((0, 1, 1, 2), (4, 2, 3, 6), strict=True)
    ]
    errors = ErrorsByDocument(rows)
    has = np.asarray([1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=bool)
    assert errors.documents == 3
    parts = (slice(4), slice(4, 9), slice(9, 15))
    for among in (np.ones(15, dtype=bool), np.arange(15) % 2 == 0):
        counts = np.asarray([(has & among)[part].sum() for part in parts])
        sizes = np.asarray([among[part].sum() for part in parts])
        residuals = counts - counts.sum() / sizes.sum() * sizes
        expected = np.sqrt(3 / 2 * (residuals**2).sum()) / sizes.sum()
        assert errors.stderr(has, among) == pytest.approx(expected)
        assert expected > 0


def test_tokens_of_one_document_are_one_draw() -> None:
    has = np.arange(20) < 10
    alike = ErrorsByDocument([Row([0] * 11, 1, ("", 0)), Row([0] * 11, 1, ("", 1))])
    assert alike.stderr(has) == pytest.approx(0.5), "two documents, one of each"
    assert ErrorsByDocument([Row([0] * 21, 1)]).stderr(has) is None, "one document says nothing of others"
    of_tasks = ErrorsByDocument([Row([0] * 6, 1, (task, number)) for task in "ab" for number in range(2)])
    assert of_tasks.documents == 4
    assert of_tasks.stderr(has) == 0, "tasks are the same in every draw"


@pytest.mark.parametrize("documents", [1, 100])
def test_of_each_document_at_most_a_row(documents: int, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    lm = exit_model(model_folder, threshold=1)
    given = options(model_folder, tmp_path, texts, documents=documents, fit_adapters=True, fit_tokens=300)
    measured, fitting = rows_of(lm, None, given)
    for rows in (measured, fitting):
        assert 298 <= sum(len(row) for row in rows) <= 300
        number = len({row.document for row in rows})
        assert (number == len(rows)) == (documents == 100), "whole documents are longer than a row"


def test_the_cap_of_documents_is_for_text_alone(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--documents has no effect without --dataset"):
        options(model_folder, tmp_path, tasks="tiny_generate", documents=5)


# The command.


def test_files_tables_and_the_line(
    model_folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = save_exits(model_folder, tmp_path / "exits", adapter="affine")
    output = tmp_path / "new" / "out"
    output.parent.mkdir()
    given = ["--backbone", str(model_folder), "--exits", str(exits), "--dataset", str(texts), "--tokens", "300"]
    given += ["--classifier", "calm", "--seq_len", "32", "--thresholds", "0.3,0.6", "--device", "cpu"]
    given += ["--fit_adapters", "True", "--fit_tokens", "400"]
    assert main(["headroom", *given, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    result = FORMAT.read(output / JSON_NAME)
    assert shown.splitlines()[-1] == result["verdict"]["line"]
    assert f"{result['text']['tokens']} tokens in {result['text']['rows']} rows, recompute" in shown
    assert f"; {result['text']['documents']} documents (of each at most a row, or 1/100 of the tokens)" in shown
    assert result["text"]["documents"] > 5 and result["text"]["documents_asked"] == 100
    errors = result["read_outs"]["none"]["agreement_stderr"]
    assert f"{result['read_outs']['none']['agreement']['3']:.4f} ({errors['3']:.4f})" in shown
    assert "agree, fitted adapters" in shown
    assert "threshold (calm)" in shown
    assert (output / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in output.iterdir()) == [JSON_NAME, PLOT_NAME]
    assert result["exit_layers"] == {"every": [3, 4, 5], "exits": [2, 3, 4]}
    assert set(result["read_outs"]["none"]["agreement"]) == set("2345"), "those of the exits, too"
    assert {(p["read_out"], p["exit_layers"]) for p in result["oracles"]} == {
        *product(("none", "fitted"), ("every", "exits")),
        ("exits", "exits"),
    }
    for point in result["oracles"]:
        assert point["agreement"]["full_depth_states"] >= point["agreement_asked"]
        assert point["compute_reduction"] >= 1
    assert main(["headroom", *given, "--output", str(output)]) == 2, "it is not written over"
    assert "--overwrite True" in capsys.readouterr().err
    assert main(["headroom", *given, "--output", str(output), "--overwrite", "True"]) == 0
    again = FORMAT.read(output / JSON_NAME)
    assert again == result, "the seed decides everything"


@pytest.mark.parametrize("final_block", [False, True])
def test_exits_at_hand_do_what_the_engine_does_with_them(
    final_block: bool, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    exits = save_exits(model_folder, tmp_path / "exits", final_block=final_block)
    result = headroom(
        options(model_folder, tmp_path / "out", texts, exits=str(exits), classifier="mamba", thresholds="0.4,0.3+1+1")
    )
    points = result["exits"]["points"]
    assert result["exits"]["classifier"] == "mamba"
    assert set(points[1]["exit_histogram"]) == {"2", str(LAYERS)}
    assert result["read_outs"]["exits"]["final_block"] == final_block
    lm = exit_model(model_folder, exits=str(exits), classifier="mamba", threshold=0.4, exit_scope="all")
    rows = held_out(text_documents(TextSource(str(texts)), lm.tokenizer), 300, 32, 100)[0]
    requests = [ScoringRequest(row, 1, [[0]] * len(row), lm.policy) for row in rows]
    scorings = score_all(lm.engine, requests, 2)
    record = ComputeRecord.sum(lm.engine.account(scoring.trace, lm.policy) for scoring in scorings)
    assert points[0]["compute_reduction"] == pytest.approx(record.compute_reduction)
    assert points[0]["exit_histogram"] == exit_histogram(record)
    with torch.no_grad():
        full = [lm.model(torch.tensor([row])).logits[0, 1:].argmax(-1) for row in rows]
    same = [
        token == best
        for s, b in zip(scorings, full, strict=True)
        for token, best in zip(s.greedy_tokens[1:], b, strict=True)
    ]
    assert points[0]["agreement"]["left_behind"] == pytest.approx(np.mean(same))


@pytest.mark.parametrize("task", ["tiny_generate", "tiny_choice"])
def test_tasks_measure_the_tokens_that_a_run_may_let_leave(
    task: str, model_folder: Path, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "task_manager", lambda *_: manager)
    result = headroom(options(model_folder, tmp_path / "out", tasks=task))
    lm = exit_model(model_folder, threshold=1, logits_cache=False)
    run = evaluate(lm, manager, task, log_samples=True)
    assert result["text"]["tokens"] == run["compute"]["overall"]["tokens"]["eligible_tokens"] > 0
    assert responses(run, task)
    few = headroom(options(model_folder, tmp_path / "few", tasks=task, limit=2, seed=1))
    assert few["text"]["tokens"] < result["text"]["tokens"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": 3}, "--tokens must be at least 100, got 3"),
    ({"seq_len": 1}, "--seq_len must be at least 2"),
    ({"tasks": "t"}, "--tasks and --dataset exclude each other"),
    ({"limit": 3}, "--limit has no effect without --tasks"),
    ({"documents": 0}, "--documents must be at least 1, got 0"),
    ({"fit_tokens": 500}, "--fit_tokens has no effect without --fit_adapters True"),
    ({"ridge": 0.5}, "--ridge has no effect without --fit_adapters True"),
    ({"ridge": -1.0, "fit_adapters": True}, "--ridge must be a finite number of at least 0"),
    ({"classifier": "calm"}, "--classifier has no effect without exits"),
    ({"exits": None, "classifier": "calm"}, "there are no exits for"),
    ({"classifier": "guess"}, "--classifier must be one of"),
    ({"state_mode": "forget"}, "--state_mode must be one of"),
    ({"exit_layers": "3+9"}, "exit_layers must lie in 1..5"),
    ({"exit_layers": "4+3"}, "--exit_layers must be in rising order"),
    ({"exits": "{exits}", "thresholds": "0.5+0.6"}, "there are 3 exit layers"),
    ({"exits": "{exits}", "thresholds": "2"}, "threshold"),
    ({"exits": "/no/such"}, "there is no such folder"),
    ({"dtype": "int3"}, "dtype"),
    ({"output": "{tmp}/file/x"}, "--output: the folder"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_refusals_before_weights(
    model_folder: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    message: str,
) -> None:
    from lm_eval.models.huggingface import HFLM

    exits = save_exits(model_folder, tmp_path / "exits")
    (tmp_path / "file").touch()
    monkeypatch.setattr(HFLM, "_create_model", lambda *_, **__: pytest.fail("weights were loaded"))
    filled = {
        name: value.format(exits=exits, tmp=tmp_path) if isinstance(value, str) else value
        for name, value in changed.items()
    }
    output = filled.pop("output", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        headroom(options(model_folder, Path(output), texts, **filled))


def test_refusals_of_what_is_read(
    model_folder: Path, texts: Path, tmp_path: Path, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"only \d+ tokens of text .* by --documents=100\), and --tokens=90000 are"):
        headroom(options(model_folder, tmp_path / "a", texts, tokens=90_000))
    with pytest.raises(UserError, match=r"only \d+ tokens of text .* by --documents=100\), and --fit_tokens=90000 are"):
        headroom(options(model_folder, tmp_path / "f", texts, fit_adapters=True, fit_tokens=90_000))
    with pytest.raises(UserError, match="--seq_len=999 is more than the model's longest row"):
        headroom(options(model_folder, tmp_path / "b", texts, seq_len=999))
    monkeypatch.setattr(sweep, "task_manager", lambda *_: manager)
    with pytest.raises(UserError, match="there is no task none_such"):
        headroom(options(model_folder, tmp_path / "c", tasks="none_such"))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["headroom", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "--fit_adapters",
        "An oracle that knows this",
        "states that exited tokens leave behind",
        "default: all from",
    ):
        assert words in shown


# The line.


def result_of(every: float, few: float, left_behind: float = 0.8) -> dict[str, Any]:
    """A result with oracles of these savings at an agreement of 0.95, and of this one with the states left behind."""

    def point(name: str, saving: float) -> dict[str, Any]:
        point = {"read_out": "none", "exit_layers": name, "agreement_asked": 0.95, "saving": saving}
        agreement = {"full_depth_states": 0.95, "left_behind": left_behind}
        return point | {"compute_reduction": 1 / (1 - saving), "kept_of_leaving": 0.9, "agreement": agreement}

    return {
        "exit_layers": {"every": [3, 4, 5], "default": [3, 4]},
        "read_outs": {"none": {"settled": {"3": 0.1, "4": 0.5, "5": 0.8}}},
        "oracles": [point("every", every), point("default", few)],
        "exits": None,
        "text": {"documents": 30},
        "full_model": {"loss": 3.0, "entropy": 2.8, "chance": 10.0},
    }


@pytest.mark.parametrize(
    ("documents", "full_model", "expected"),
    [
        (30, {"loss": 8.99, "entropy": 8.99}, []),
        (29, {}, ["29 documents only, others may differ"]),
        (1, {}, ["1 document only, others may differ"]),
        (30, {"loss": 9.0}, ["the full model is near chance (its loss is 9.00 nats per token, chance is 10.00)"]),
        (30, {"loss": None, "entropy": 9.5}, ["the full model is near chance (its entropy is 9.50"]),
        (5, {"loss": 12.0, "entropy": 9.9}, ["5 documents only", "the full model is near chance (its loss is 12.00"]),
    ],
)
def test_the_line_says_where_a_verdict_may_not_hold(
    documents: int, full_model: dict[str, float], expected: list[str]
) -> None:
    result = result_of(0.5, 0.2)
    result["text"]["documents"] = documents
    result["full_model"] |= full_model
    found = verdict(result)
    assert found["word"] == "worth training"
    assert len(found["cautions"]) == len(expected)
    assert all(said.startswith(words) for said, words in zip(found["cautions"], expected, strict=True))
    ending = f"; caution: {', and '.join(found['cautions'])}" if expected else ""
    assert found["line"].endswith(f": worth training{ending}") and "\n" not in found["line"]


def test_loss_and_entropy_of_the_full_model_are_those_of_its_logits() -> None:
    engine, model = engine_for("llama"), tiny_model("llama")
    found = read(engine.backbone, ROWS, [ReadOut("x", EVERY)])
    losses, entropies = [], []
    for row in ROWS:
        with torch.no_grad():
            shares = model(torch.tensor([row.ids])).logits[0].softmax(-1)
        entropies += (-(shares * shares.log()).sum(-1))[row.prompt_length :].tolist()
        for i in range(row.prompt_length, len(row.ids) - 1):
            losses.append(-shares[i, row.ids[i + 1]].log().item())
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-4)
    last = [Row(ROWS[0].ids, len(ROWS[0].ids) - 1)]
    assert math.isnan(read(engine.backbone, last, [ReadOut("x", EVERY)]).loss), "nothing follows"


@pytest.mark.parametrize(
    ("saving", "word"),
    [(0.2, "worth training"), (0.15, "worth training"), (0.149, "perhaps"), (0.05, "perhaps"), (0.049, "not worth")],
)
def test_the_verdict_follows_the_savings_with_few_exits(saving: float, word: str) -> None:
    found = verdict(result_of(0.5, saving))
    assert found["word"].startswith(word)
    reached = f"would reach 2.00 (at an agreement of 0.95; no adapter), after 3, 4 {1 / (1 - saving):.2f}"
    assert reached in found["line"]
    assert "from block 4 on for 50% of tokens" in found["line"]
    assert "90% of the answers of tokens that leave withstand the states left behind (80% of all)" in found["line"]
    assert ("--fit_adapters True" in found["line"]) == (saving < 0.15), "where it may help"


def test_states_that_cost_too_much_leave_it_open() -> None:
    assert verdict(result_of(0.5, 0.3, left_behind=0.74))["word"] == "perhaps"
    assert verdict(result_of(0.5, 0.01, left_behind=0.74))["word"] == "not worth training"


def test_the_share_of_an_oracle_is_read_between_thresholds() -> None:
    def point(agreement: float, saving: float) -> dict[str, Any]:
        return {"agreement": {"full_depth_states": agreement}, "saving": saving}

    points = [point(0.9, 0.2), point(0.97, 0.06)]
    assert share_at(points, 0.97, 0.3) == pytest.approx(0.2)
    assert share_at(points, 0.935, 0.3) == pytest.approx(0.13 / 0.3)
    assert share_at(points, 0.985, 0.3) == pytest.approx(0.1), "from the full model on"
    assert share_at(points, 0.5, 0.4) == pytest.approx(0.5), "no threshold lets more leave"
    assert share_at(points, 0.97, 0.0) is None
    assert json.dumps(points)


def test_without_a_device_the_model_finds_one(model_folder: Path, tmp_path: Path) -> None:
    assert "device" not in options(model_folder, tmp_path, device=None, tasks="t").model_arguments
    assert options(model_folder, tmp_path, device="cpu", tasks="t").model_arguments["device"] == "cpu"
