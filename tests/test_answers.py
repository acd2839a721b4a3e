"""Training on what the backbone writes: the pool of its answers, mixtures, prompts of tasks, and exits simulated."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, TASKS, random_ids
from helpers_engine import CLASSIFIERS, EXITS, engine_with_exits, exits_config, run_score
from helpers_training import ROWS, frozen, make_trainer, train, training_options
from lm_eval.tasks import TaskManager

from dynamax_lm_eval import DynamaxLM
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import exit_probability
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.model import FrozenBackbone, load_backbone
from dynamax_lm_eval.frozen.passes import SimulatedExits
from dynamax_lm_eval.harness import describe, prompts, tasks
from dynamax_lm_eval.training import answers as pools
from dynamax_lm_eval.training import command
from dynamax_lm_eval.training.answers import Prompt
from dynamax_lm_eval.training.batches import Answer, MicroBatches, first_to_leave, labelled, row_of
from dynamax_lm_eval.training.options import RunOptions

PROMPTS = [Prompt(f"Question {i}: what is the capital?", max_new_tokens=6, document=f"d{i}") for i in range(150)]


@pytest.fixture(scope="module")
def backbone(model_folder: Path) -> FrozenBackbone:
    return load_backbone(training_options(model_folder, Path("x")).reading(RunOptions(device="cpu")))


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_AT_ONCE", 64)


def pool_of(folder: Path, backbone: FrozenBackbone, count: int = 10**6, **changes: Any) -> list[Answer]:
    options = training_options(Path("x"), Path("self"), seq_len=24, self_tokens=count, prompts="t", **changes)
    return pools.answers(folder, backbone.engine, backbone.tokenizer, options, PROMPTS, "fingerprint")


def test_the_pool_is_the_greedy_answers_and_goes_on_where_it_was_cut(
    tmp_path: Path, backbone: FrozenBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pool_of(tmp_path / "a", backbone)
    assert len(whole) == len(PROMPTS)
    model = backbone.engine.backbone.model
    for answer in whole[:3]:
        prompt = torch.tensor([answer[: answer.prompt_tokens]])
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        ended = backbone.tokenizer.eos_token_id in answer[answer.prompt_tokens :]
        assert list(answer) == expected.tolist() or ended
    text = (tmp_path / "a" / pools.POOL_NAME).read_text()
    for cut in (len(text) - 5, len(text) // 2, text.index("\n") + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / pools.POOL_NAME).write_text(text[:cut])
        assert pool_of(folder, backbone) == whole
        assert (folder / pools.POOL_NAME).read_text() == text
    monkeypatch.setattr(pools, "generate_all", lambda *_: pytest.fail("all answers are there"))
    assert pool_of(tmp_path / "a", backbone) == whole
    assert pools.documents_used(whole[:5], PROMPTS, 0) == sorted(
        PROMPTS[i].document for i in np.random.default_rng(0).permutation(150)[:5]
    )
    with pytest.raises(UserError, match="damaged, or of another training"):
        pool_of(tmp_path / "a", backbone, seed=1)
    (tmp_path / "a" / pools.POOL_NAME).write_text(text.replace("[", "(", 3))
    with pytest.raises(UserError, match="damaged, or of another training"):
        pool_of(tmp_path / "a", backbone)


def test_a_pool_of_so_many_tokens(tmp_path: Path, backbone: FrozenBackbone) -> None:
    pool = pool_of(tmp_path, backbone, count=100)
    assert len(pool) == 64, "the first group has more than that"
    first, second = (list(pools.pool_documents(pool, 3)(epoch, 0)) for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(pool)
    assert list(pools.pool_documents(pool, 3)(1, 60)) == second[60:]


def test_a_mixture_has_its_share_at_every_place() -> None:
    def own(epoch: int, first: int) -> Any:
        return iter([Answer([epoch] * (3 + i), 2) for i in range(5)][first:])

    def corpus(epoch: int, first: int) -> Any:
        return iter([[9] * 10 for _ in range(20)][first:])

    whole = list(pools.mixed(own, corpus, 0.25, 4)(0, 0))
    written = sum(len(part) - 2 for part in whole if isinstance(part, Answer))
    read = sum(len(part) for part in whole if not isinstance(part, Answer))
    assert read == 200
    assert written == pytest.approx(200 / 3, abs=5)
    assert max(len(part) for part in whole if not isinstance(part, Answer)) == 4
    assert list(pools.mixed(own, corpus, 0.25, 4)(0, 17)) == whole[17:]
    assert [list(part) for part in whole] != [list(part) for part in pools.mixed(own, corpus, 0.25, 4)(1, 0)]


def test_only_answers_after_their_prompts_are_labelled() -> None:
    answer = Answer(range(10), 6)
    whole, begun, rest = row_of(answer, 0, 10), row_of(answer, 0, 8), row_of(answer, 8, 10)
    assert (
        labelled([whole, [1, 2], begun, rest]).tolist()
        == [False] * 6 + [True] * 6 + [False] * 6 + [True] * 2 + [False] * 2
    )
    assert first_to_leave([whole, [1, 2], rest]).tolist() == [6, 1, 2]
    batches = MicroBatches(lambda *_: iter([[0, 1, 2], answer]), 8, 8)
    rows = next(batches)
    assert [getattr(row, "prompt_tokens", None) for row in rows] == [None, 6]
    # What is left of the answer has no prompt, so nothing of it is learned.
    assert next(batches)[0].prompt_tokens == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["calm", "mamba"])
@pytest.mark.parametrize("mode", ["recompute", "skip"])
def test_simulated_exits_are_those_of_a_run(kind: str, mode: Any) -> None:
    pass_ = frozen()
    rows = [random_ids(12, 40), random_ids(7, 41)]
    policy = policy_of_exits(exits_config(), kind, 0.5, state_mode=mode, exit_scope="all")
    results = run_score(engine_with_exits(), policy, [(row[:1], [*row[1:], 3]) for row in rows], 2)
    layers = torch.cat([torch.tensor([LAYERS, *result.trace.exit_layers]) for result in results])
    assert len(layers.unique()) > 2
    simulated = SimulatedExits(CLASSIFIERS, kind, np.full(2, 0.5), np.ones(2, dtype=np.int64), mode)
    batch = pass_.run(rows, simulated)
    assert batch.reached is not None
    for layer in EXITS:
        assert torch.equal(batch.reached[layer], layers >= layer)
    torch.testing.assert_close(batch.last, pass_.run(rows).last)
    # What a classifier says at an exit is what it said when the token left there.
    everywhere = torch.arange(len(layers))
    for layer in EXITS:
        confidence = exit_probability(batch.classified(CLASSIFIERS.at(kind, layer), layer, everywhere))
        may_leave = batch.reached[layer] & (everywhere != 0) & (everywhere != 12)
        assert torch.equal(confidence[may_leave] >= 0.5, (layers == layer)[may_leave])


def test_labels_at_exits_that_are_not_reached_do_not_count() -> None:
    pass_ = frozen()
    simulated = SimulatedExits(CLASSIFIERS, "calm", np.full(len(ROWS), 0.5), np.ones(len(ROWS), dtype=np.int64), "skip")
    batch = pass_.run(ROWS, simulated)
    positions = torch.arange(sum(map(len, ROWS)))
    labels = pass_.label(batch, positions)
    for i, layer in enumerate(EXITS):
        assert batch.reached is not None and not labels.within_k[i][~batch.reached[layer]].any()
        reached = batch.reached[layer].nonzero()[:, 0]
        best = pass_.backbone.readout(batch.last[reached]).argmax(-1)
        own = pass_.backbone.readout(batch.exits[layer][reached]).argmax(-1)
        assert torch.equal(labels.agrees[i][reached], own == best)


def test_every_other_micro_batch_is_simulated_after_the_first_steps() -> None:
    trainer, batches = make_trainer(("calm", "mamba"), simulate_exits=True, max_tokens=20 * 128)
    seen: list[Any] = []
    run = trainer.frozen.run
    trainer.frozen.run = lambda rows, simulated=None: seen.append(simulated) or run(rows, simulated)  # type: ignore[method-assign,func-returns-value]
    for step in range(0, 20, 4):
        trainer.step(step, batches)
    kinds = [simulated and simulated.kind for simulated in seen]
    assert kinds == [None, None] * 2 + ["mamba", None] * 3
    assert all(0.4 <= value <= 0.95 for simulated in seen[4::2] for value in simulated.thresholds)


def test_training_on_answers_and_a_corpus_with_learned_states(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    options = {"states": "linear", "states_tokens": 200, "simulate_exits": True, "self_tokens": 50}
    mixture = Path(f"self:0.5+{texts}")
    assert training_options(model_folder, mixture, **options).self_share == 0.5
    saved = train(model_folder, mixture, tmp_path / "a", **options)
    assert saved.config.states is not None and saved.config.states.kind == "linear"
    measured = json.loads((saved.path / "evaluation.json").read_text())
    assert measured["state_mode"] == "learned"
    r2 = measured["states"]["2"]["6"]
    assert r2["learned"] > r2["recompute"]
    lm = DynamaxLM(backbone=str(model_folder), exits=str(saved.path), threshold=0.5, device="cpu", dtype="float32")
    assert lm.policy.state_mode == "learned"


def prompts_for(model_folder: Path, **changes: Any) -> list[Prompt]:
    given = {"prompts": "tiny_generate", "prompts_include_path": str(TASKS), **changes}
    return prompts.prompts_of(training_options(model_folder, Path("self"), **given))


def test_prompts_are_those_of_a_task(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Indexing the harness's own tasks takes most of the time.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(prompts, "task_manager", tasks.task_manager.__wrapped__)
    found = prompts_for(model_folder, prompts_documents="1:3")
    assert len(found) == 2
    assert all(prompt.document and prompt.until for prompt in found)
    with pytest.raises(UserError, match="there is no task nothing"):
        prompts_for(model_folder, prompts="nothing")
    with pytest.raises(UserError, match="has no training documents; give --prompts_documents"):
        prompts_for(model_folder)
    for wrong in ("3", "3:1", "a:b"):
        with pytest.raises(UserError, match="must be first:last"):
            prompts_for(model_folder, prompts_documents=wrong)
    with pytest.raises(UserError, match="has only"):
        prompts_for(model_folder, prompts_documents="5000:6000")


def test_results_tell_of_documents_that_exits_were_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    config = exits_config(training={"prompt_documents": ["a", "b"], "options": {}})
    exits = ExitCheckpoint(Path("x"), config)
    assert describe.documents_trained_on(exits, ["t", "u"], {"t": ["b", "c"], "u": ["c"]}.__getitem__) == {
        "t": 1,
        "u": 0,
    }
    assert "trained on answers to documents that are evaluated here: 1 of t" in caplog.text
    assert describe.documents_trained_on(None, ["t"], lambda _: ["a"]) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "self:1+x"}, "nothing is left for 'x'"),
        ({"dataset": "self:0+x"}, "the share of self"),
        ({"dataset": "self:a+x"}, "the share of self"),
        ({"dataset": "x", "prompts": "t"}, "--prompts has no effect without --dataset self"),
        ({"dataset": "x", "self_tokens": 5}, "--self_tokens has no effect"),
        ({"dataset": "self", "prompts_documents": "1:2"}, "--prompts_documents has no effect without --prompts"),
        ({"states": "affine"}, "states must be none, linear or lowrank:R"),
        ({"states_tokens": 5}, "--states_tokens has no effect without --states"),
        ({"simulate_exits": True, "final_block": True}, "--simulate_exits and --final_block exclude each other"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    options = training_options(Path("x"), Path("x"))
    with pytest.raises(UserError, match=message):
        replace(options, **given)


def test_prompts_that_nobody_made_and_exits_that_are_not_there_end_before_weights_load(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("weights were loaded"))
    run = RunOptions(output=str(tmp_path / "out"), device="cpu")
    with pytest.raises(UserError, match="--prompts t: its prompts have to be given"):
        command.train(training_options(model_folder, Path("self"), prompts="t"), run)
    with pytest.raises(UserError, match="there is no such folder"):
        command.train(training_options(model_folder, Path("x"), init="./nothing"), run)
