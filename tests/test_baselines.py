"""What exits are compared with: read-outs of pruned models, fitted and used, and exits at which every token leaves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import EXITS, FULL, HIDDEN, PROMPTS, engine_for, exits_config, model_scores, run_generate, run_score
from helpers_harness import dynamax, evaluate, responses, results_of, save_exits, sweep_options
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost, ExitCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import DynamaxArgs, parse_model_args
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.prune_adapters import PruneAdapters, blocks_name, load, save
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.exits.resolve import resolve_policy
from dynamax_lm_eval.frozen.text import HeldOut
from dynamax_lm_eval.measure.options import ProfileOptions
from dynamax_lm_eval.measure.prune_adapters import end_states, fit, split
from dynamax_lm_eval.models.fingerprint import files_fingerprint
from dynamax_lm_eval.sweep.command import sweep
from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.grid import grid
from dynamax_lm_eval.sweep.options import SweepOptions

DEEPEST = frozenset({4, 5})
HEALED = ExitPolicy(LAYERS, pruned_blocks=DEEPEST, prune_adapter="a")


def some_adapter(seed: int = 3) -> Adapter:
    """One that changes most tokens."""
    torch.manual_seed(seed)
    adapter = Adapter(HIDDEN, None)
    torch.nn.init.normal_(adapter.up.weight, std=0.2)
    torch.nn.init.normal_(adapter.up.bias, std=0.2)
    return adapter.requires_grad_(False).eval()


def model_without(blocks: frozenset[int], adapter: Adapter | None = None, family: str = "llama") -> Any:
    """The model of transformers without some blocks, whose final norm is given what the adapter makes."""
    model = copy.deepcopy(tiny_model(family))
    inner = model.model if family == "llama" else model.backbone
    inner.layers = torch.nn.ModuleList([x for i, x in enumerate(inner.layers, start=1) if i not in blocks])
    model.config.use_cache = False
    if adapter is not None:
        norm = inner.norm if family == "llama" else inner.norm_f
        norm.register_forward_pre_hook(lambda _, given: (adapter(given[0]), *given[1:]))
    return model


def healing_engine(family: str, adapter: Adapter) -> Engine:
    engine = engine_for(family)
    engine.add_prune_adapter("a", lambda: adapter)
    return engine


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_texts_and_scores_are_those_of_the_model_that_is_left(family: str) -> None:
    """In batches with rows of other policies, generated step by step and scored at once."""
    adapter = some_adapter()
    engine, theirs = healing_engine(family, adapter), model_without(DEEPEST, adapter, family)
    plain = replace(HEALED, prune_adapter=None)
    policies, prompts = [HEALED, plain, FULL] * 2, [PROMPTS[i] for i in (0, 0, 0, 2, 2, 2)]
    found = run_generate(engine, policies, prompts, 4)
    for first in (0, 3):
        assert len({tuple(row.tokens) for row in found[first : first + 3]}) == 3, "each policy says something else"
        prompt, tokens = prompts[first], found[first].tokens
        scores, best = model_scores(theirs, prompt, tokens)
        assert best == tokens
        (scored,) = run_score(engine, HEALED, [(prompt, tokens)], 2)
        assert [row[0] for row in scored.log_probs] == pytest.approx(scores, abs=1e-4)
    assert run_score(engine, plain, [(prompts[0], found[1].tokens)], 2)[0].log_probs[0][0] == pytest.approx(
        model_scores(model_without(DEEPEST, None, family), prompts[0], found[1].tokens)[0][0], abs=1e-4
    )


def test_a_prompt_at_full_depth_is_read_out_as_it_is() -> None:
    engine = healing_engine("llama", some_adapter())
    policy = replace(HEALED, prune_scope="generated")
    (healed,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    (plain,) = run_generate(engine, [replace(policy, prune_adapter=None)], PROMPTS[:1], 1)
    (full,) = run_generate(engine, [FULL], PROMPTS[:1], 1)
    assert healed.tokens[0] == plain.tokens[0] == full.tokens[0]
    assert healed.tokens[1] != plain.tokens[1]
    (scored,) = run_score(engine, policy, [(PROMPTS[0], healed.tokens)], 1)
    (one_less,) = run_score(engine, policy, [(PROMPTS[0], healed.tokens[:2])], 1)
    assert [row[0] for row in one_less.log_probs] == pytest.approx([row[0] for row in scored.log_probs[:2]], abs=1e-5)
    expected = model_scores(tiny_model("llama"), PROMPTS[0], full.tokens[:1])[0]
    assert scored.log_probs[0][0] == pytest.approx(expected[0], abs=1e-4)


COST = BackboneCost((BlockCost(100, 2, None, 10), BlockCost(100, 2, None, 10)), lm_head=30)


@pytest.mark.parametrize(("spares_prompt", "first_eligible"), [(False, 3), (False, 1), (True, 3)])
def test_counted_by_hand(spares_prompt: bool, first_eligible: int) -> None:
    """Three tokens of prompt, four generated, of which the last is not fed; block 2 is pruned; an adapter of 7 MACs."""
    trace = Trace(3, 6, 4, (2,) * (6 - first_eligible), generated=True)
    terms = ExitCost((), (), False, False, frozenset({2}), first_eligible, prunes_eligible_only=spares_prompt)
    plain, healed = (account(trace, replace(terms, prune_adapter_macs=macs), COST) for macs in (0, 7))
    # Logits come from tokens 2 to 5. Token 2 is of the prompt, and may leave where all may.
    eligible, read = (4 if first_eligible == 1 else 3), (3 if spares_prompt else 4)
    assert (plain.adapter_macs, healed.adapter_macs) == (0, eligible * 7)
    assert healed.spent_macs == plain.spent_macs + eligible * 7
    assert healed.total_macs == plain.total_macs + read * 7
    assert healed.weights_read == plain.weights_read + read * 7
    assert (healed.full_macs, healed.full_total_macs) == (plain.full_macs, plain.full_total_macs)


def test_the_engine_counts_the_adapter_of_each_policy() -> None:
    engine = healing_engine("llama", some_adapter())
    trace = Trace(3, 6, 4, (LAYERS,) * 3, generated=False)
    healed, plain = (engine.account(trace, policy) for policy in (HEALED, replace(HEALED, prune_adapter=None)))
    assert healed.adapter_macs == 3 * HIDDEN**2
    assert healed.total_macs - plain.total_macs == 4 * HIDDEN**2


def text_of(documents: int, seed: int) -> HeldOut:
    rows = [random_ids(60, seed + i) for i in range(documents)]
    return HeldOut(rows, list(range(documents)), documents)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_states_without_blocks_are_those_of_the_model_that_is_left(family: str) -> None:
    rows = [random_ids(7, 1), random_ids(12, 2)]
    model = model_without(DEEPEST, None, family)
    seen: list[torch.Tensor] = []
    norm = model.model.norm if family == "llama" else model.backbone.norm_f
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    found = end_states(make_backbone(tiny_model(family), max_length=64), rows, DEEPEST)
    torch.testing.assert_close(found, torch.cat(seen), atol=1e-4, rtol=1e-4)


def test_a_fit_comes_closer_on_other_text() -> None:
    backbone = make_backbone(tiny_model("llama"), max_length=64)
    sets = [frozenset({5}), DEEPEST]
    found = fit(backbone, *split(text_of(25, 100)), sets, 0.01)
    assert list(found) == sets
    others = [random_ids(60, 900 + i) for i in range(6)]
    full = end_states(backbone, others)
    for blocks, fitted in found.items():
        pruned = end_states(backbone, others, blocks)
        before, after = (float((states - full).square().mean()) for states in (pruned, fitted.adapter(pruned)))
        assert after < 0.9 * before
        # What it says of itself, of documents that it was not fitted on, is much the same.
        variance = float((full - full.mean(0)).square().mean())
        assert fitted.error == pytest.approx((before / variance, after / variance), rel=0.2)
    # One block less is nearer to the full model.
    assert found[sets[0]].error[1] < found[sets[1]].error[1]


def test_every_fifth_document_is_measured_on() -> None:
    """The fit does not see it, and the numbers are of it alone."""
    backbone = make_backbone(tiny_model("llama"), max_length=64)
    text = text_of(10, 300)
    other = HeldOut([*text.rows[:4], random_ids(60, 999), *text.rows[5:9], text.rows[9]], text.document, 10)
    mine, theirs = (fit(backbone, *split(rows), [DEEPEST], 0.01)[DEEPEST] for rows in (text, other))
    torch.testing.assert_close(mine.adapter.up.weight, theirs.adapter.up.weight)
    assert mine.error != theirs.error
    full, pruned = (end_states(backbone, [text.rows[4], text.rows[9]], blocks) for blocks in (frozenset(), DEEPEST))
    best = backbone.readout(full).argmax(-1)
    for states, share in zip((pruned, mine.adapter(pruned)), mine.agreement, strict=True):
        assert share == pytest.approx(float((backbone.readout(states).argmax(-1) == best).float().mean()))
    with pytest.raises(UserError, match="come from 4 documents"):
        split(text_of(4, 0))


def written(folder: Path, fingerprint: str = "f", blocks: frozenset[int] = DEEPEST, num_layers: int = LAYERS) -> Path:
    tensors = {blocks_name(blocks): dict(some_adapter().up.state_dict())}
    save(folder / "a.safetensors", PruneAdapters("b", fingerprint, num_layers, HIDDEN, {}), tensors)
    return folder / "a.safetensors"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = load(path, DEEPEST)
    torch.testing.assert_close(found.up.state_dict(), some_adapter().up.state_dict())
    assert list(PruneAdapters.open(path).adapters) == ["4+5"]
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    policy = resolve_policy(DynamaxArgs("b", threshold=(1.0,), prune_layers=2, prune_adapter=str(path)), LAYERS)
    assert policy.describe()["prune_adapter"] == PruneAdapters.open(path).adapters["4+5"]
    assert "prune_adapter" not in FULL.describe()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prune_layers": 1}, r"has no read-out for a model without blocks 5; it has some for 4\+5"),
        ({"threshold": (0.5,)}, "prune_adapter and early exits exclude each other"),
        ({"prompt_exit_layer": 2}, "prune_adapter and early exits exclude each other"),
        ({"prune_adapter": "missing.safetensors"}, "cannot be read"),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    args = DynamaxArgs("b", threshold=(1.0,), prune_layers=2, prune_adapter=str(written(tmp_path)))
    with pytest.raises(UserError, match=message):
        resolve_policy(replace(args, **changed), LAYERS)


def test_files_that_do_not_fit_are_refused(tmp_path: Path, model_folder: Path) -> None:
    given = {"backbone": "b", "prune_adapter": "x"}
    with pytest.raises(UserError, match="prune_adapter has no effect without prune_layers"):
        parse_model_args(given, ())
    args = DynamaxArgs("b", threshold=(1.0,), prune_layers=2, prune_adapter=str(written(tmp_path)))
    with pytest.raises(UserError, match="with 6 blocks; this backbone has 8"):
        resolve_policy(args, 8)
    with pytest.raises(UserError, match="was fitted on other weights"):
        dynamax(model_folder, prune_layers=2, prune_adapter=str(written(tmp_path)))
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes([content[-4] ^ 64]) + content[-3:])
    with pytest.raises(UserError, match=r"is damaged: the read-out of blocks 4\+5 was changed"):
        load(path, DEEPEST)
    path.write_bytes(content.replace(b"num_layers", b"num_lawyer"))
    with pytest.raises(UserError, match="is damaged"):
        PruneAdapters.open(path)
    exits = save_exits(model_folder, tmp_path / "exits")
    with pytest.raises(UserError, match="is not a file of dynamax-lm-eval prune-profile"):
        PruneAdapters.open(exits / "exits.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fit_tokens": 100}, "--fit_tokens has no effect without --fit_adapters"),
        ({"fit_adapters": "1,x"}, "--fit_adapters must be numbers of blocks"),
        ({"fit_adapters": "0"}, "--fit_adapters must be numbers of blocks"),
        ({"fit_adapters": "1", "ridge": -1.0}, "--ridge must be a number of at least 0"),
    ],
)
def test_options_that_make_no_sense(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProfileOptions("b", **changed)


@pytest.mark.slow
def test_from_the_command_to_a_sweep(
    model_folder: Path, tmp_path: Path, manager: TaskManager, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    words = ["the", "time", "goes", "where", "the", "river", "goes", "and", "nobody", "knows"]
    rng = np.random.default_rng(0)
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 40))}) + "\n" for _ in range(20)))
    output, adapters = tmp_path / "profile.json", tmp_path / "profile.safetensors"
    line = [
        "prune-profile",
        "--backbone",
        str(model_folder),
        "--dataset",
        str(texts),
        "--texts",
        "4",
        "--seq_len",
        "24",
    ]
    line += [
        "--device",
        "cpu",
        "--output",
        str(output),
        "--fit_adapters",
        "1",
        "--fit_tokens",
        "1000",
        "--fit_documents",
        "10",
    ]
    assert main(line) == 0
    assert "with read-out" in capsys.readouterr().out
    angular = PruneProfile.load(output).blocks(1)
    content = PruneAdapters.open(adapters)
    assert set(content.adapters) == {"5", blocks_name(angular)}
    assert content.fingerprint == files_fingerprint(str(model_folder), {})
    assert set(content.fitted["error"]) == set(content.adapters)
    assert main(line) == 2
    assert "--overwrite" in capsys.readouterr().err

    exits = save_exits(model_folder, tmp_path / "exits", adapter="affine")
    options = sweep_options(
        model_folder,
        tmp_path / "sweep",
        tasks="tiny_generate",
        thresholds="0.9",
        state_modes="skip",
        static_exits="3",
        prune_profile=str(output),
        prune_adapter=str(adapters),
        model_args=f"exits={exits}",
    )
    sweep(options)
    points = {point["point"]: point for point in finished_points(tmp_path / "sweep")}
    names = {"pruning-deepest-1", "pruning-angular-1", "pruning-deepest-healed-1", "pruning-angular-healed-1"}
    assert set(points) == {"full", "state-skip-0.9", "static-skip-3", *names}
    assert points["static-skip-3"]["family"] == "static" and points["static-skip-3"]["line"] == "static exit, skip"
    assert points["pruning-deepest-healed-1"]["policy"]["prune_adapter"] == content.adapters["5"]
    found = results_of(tmp_path / "sweep")
    healed, plain = (found[f"pruning-deepest-{name}1"]["tiny_generate"] for name in ("healed-", ""))
    assert healed["compute_reduction,none"] < plain["compute_reduction,none"]
    data = json.loads((points["static-skip-3"]["folder"] / points["static-skip-3"]["results"]).read_text())
    static = data["compute"]["by_task"]["tiny_generate"]
    assert set(static["exit_histogram"]) == {"3"}
    assert static["macs"]["exits"]["adapters"] > 0 == static["macs"]["exits"]["classifiers"]

    given = {"prune_layers": 1, "prune_adapter": str(adapters)}
    direct = evaluate(dynamax(model_folder, **given), manager, "tiny_generate")
    assert direct["results"]["tiny_generate"]["compute_reduction,none"] == healed["compute_reduction,none"]
    static_run = {"exits": str(exits), "exit_layers": 3, "threshold": 0, "confidence": "state", "state_mode": "skip"}
    direct = evaluate(dynamax(model_folder, **static_run), manager, "tiny_generate")
    compute = direct["compute"]["by_task"]["tiny_generate"]
    assert (compute["macs"], compute["exit_histogram"]) == (static["macs"], static["exit_histogram"])
    assert responses(direct, "tiny_generate")


def test_static_exits_use_those_that_are_found(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))
    save_exits(model_folder, tmp_path / "cache" / "exits" / "own", adapter="affine")
    changed = {"tasks": "tiny_generate", "thresholds": "0.9", "state_modes": "skip", "prune": "", "limit": 1}
    sweep(sweep_options(model_folder, tmp_path / "sweep", static_exits="2,4", **changed))
    points = {point["point"]: point["policy"] for point in finished_points(tmp_path / "sweep")}
    assert set(points) == {"full", "state-skip-0.9", "static-skip-2", "static-skip-4"}
    assert points["static-skip-2"]["adapter"] == "affine" and points["static-skip-2"]["exit_layers"] == [2]
    assert points["state-skip-0.9"]["adapter"] == "none", "a confidence without training uses exits that are named"
    with pytest.raises(UserError, match=r"point static-skip-5: exit_layers \[5\] have no trained classifier"):
        sweep(sweep_options(model_folder, tmp_path / "other", static_exits="5", **changed))


def test_static_points_of_a_grid() -> None:
    full = DynamaxArgs("b", threshold=(1.0,))
    options = SweepOptions("b", "t", "o", thresholds="0.5", confidences="state", static_exits="4,2")
    points = grid(options, full, exits_config(adapter="affine"), folder="f")
    assert [point.name for point in points][2:] == ["static-recompute-2", "static-recompute-4"]
    assert points[2].args == replace(
        full, exits="f", exit_layers=(2,), threshold=(0.0,), confidence="state", state_mode="recompute"
    )
    # Nothing that they could use.
    assert grid(options, full, exits_config(), folder="f")[2].args.exits is None
    assert grid(options, full, None)[2].args.exits is None
    several = grid(replace(options, state_modes="copy,verify,skip", static_exits="2"), full, None)
    assert [point.series for point in several if point.kind == "static"] == ["static exit, copy", "static exit, skip"]
    with pytest.raises(UserError, match="--state_modes needs another one beside verify"):
        grid(replace(options, state_modes="verify"), full, None)
    with pytest.raises(UserError, match="--static_exits must be whole numbers"):
        grid(replace(options, static_exits="2+4"), full, None)
    with pytest.raises(UserError, match="--prune_adapter has no effect without --prune"):
        grid(replace(options, prune_adapter="x"), full, None)
    assert EXITS == (2, 3, 4)
