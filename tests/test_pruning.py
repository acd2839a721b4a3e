"""Angular distances of blocks, the file they are kept in, and the pruning that reads it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.config import DynamaxArgs, parse_model_args
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.exits.resolve import resolve_policy
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.measure.prune_profile import distances, last_states
from dynamax_lm_eval.models import source
from dynamax_lm_eval.models.fingerprint import files_fingerprints
from dynamax_lm_eval.sweep import command as sweep
from dynamax_lm_eval.sweep.options import SweepOptions


def made(**changed: Any) -> PruneProfile:
    """Six blocks, the second of which does least; of two in a row the fourth and fifth."""
    rows = [[0.5, 0.1, 0.4, 0.3, 0.3, 0.6], [0.6, 0.5, 0.5, 0.2, 0.7], *([0.5] * n for n in (4, 3, 2))]
    given: dict[str, Any] = {"backbone": "b", "fingerprint": "f", "num_layers": 6, "distances": rows}
    return PruneProfile(**{**given, "texts": 1, "tokens": 2, "dataset": "d", **changed})


def test_distances_are_angles() -> None:
    turned = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 0.1, 0.5, math.pi)]
    states = torch.stack([torch.stack(turned), 3 * torch.stack(turned)])  # lengths do not matter
    found = distances(states)
    assert [len(row) for row in found] == [3, 2]
    assert found[0] == pytest.approx([0.1 / math.pi, 0.4 / math.pi, 1 - 0.5 / math.pi], abs=1e-6)
    assert found[1] == pytest.approx([0.5 / math.pi, 1 - 0.1 / math.pi], abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_states_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    rows = [random_ids(7, 1), random_ids(12, 2)]
    found = last_states(make_backbone(model, max_length=64), rows)
    layers = (model.model if family == "llama" else model.backbone).layers
    for row, states in zip(rows, found, strict=True):
        seen: list[torch.Tensor] = [model.get_input_embeddings()(torch.tensor([row]))[0, -1]]

        def keep(_: Any, __: Any, out: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        with torch.no_grad():
            model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        assert len(seen) == LAYERS + 1
        torch.testing.assert_close(states, torch.stack(seen), atol=1e-4, rtol=1e-4)


def test_blocks_with_the_least_distance_go() -> None:
    profile = made()
    assert profile.blocks(1) == {2}
    assert profile.blocks(2) == {4, 5}
    assert profile.blocks(3) == {1, 2, 3}, "the first of equals"
    with pytest.raises(UserError, match="prune_layers=6"):
        profile.blocks(6)


def test_policies_read_the_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    made().save(file)
    assert PruneProfile.load(file) == made()
    args = DynamaxArgs(
        backbone="b", threshold=(1.0,), prune_layers=2, prune_strategy="angular", prune_profile=str(file)
    )
    policy = resolve_policy(args, 6)
    assert policy.pruned_blocks == {4, 5}
    with pytest.raises(UserError, match="this backbone has 8"):
        resolve_policy(args, 8)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": "other"}', '{"format": "dynamax-prune-profile", "format_version": [1]}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(UserError, match="prune_profile"):
        PruneProfile.load(file)


@pytest.mark.parametrize(
    "changed", [{"distances": [[0.5]]}, {"distances": [*made().distances[:-1], [0.5, math.nan]]}, {"fingerprint": None}]
)
def test_a_profile_edited_into_nonsense_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    made(**changed).save(tmp_path / "profile.json")
    with pytest.raises(UserError, match=r"profile.json' is damaged .*distances|fingerprint"):
        PruneProfile.load(tmp_path / "profile.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_strategy": "angular", "prune_layers": 2}, "prune-profile"),
        ({"prune_profile": "p.json", "prune_layers": 2}, "prune_strategy=angular"),
        ({"prune_strategy": "angular", "prune_profile": "p.json"}, "prune_layers=N"),
        ({"prune_strategy": "deepest", "prune_layers": [2, 3]}, "prune_layers=N"),
        ({"prune_strategy": "widest", "prune_layers": 2}, "prune_strategy"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_model_args({"backbone": "b", **arguments}, ())


@pytest.mark.parametrize("known_before", [True, False])
def test_a_profile_of_other_weights_is_refused(
    model_folder: Path, tmp_path: Path, known_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = files_fingerprints(str(model_folder), {})
    assert found is not None
    file = tmp_path / "profile.json"
    given = {"threshold": 1, "prune_layers": 2, "prune_strategy": "angular", "prune_profile": str(file)}
    if not known_before:
        for name in ("files_fingerprints", "fetched_files_fingerprints"):
            monkeypatch.setattr(source, name, lambda *_: None)
    for fingerprint in (found.current, *found.former):  # of this version, and of an earlier one
        made(fingerprint=fingerprint).save(file)
        assert DynamaxLM(str(model_folder), device="cpu", **given).policy.pruned_blocks == {4, 5}
    lm = DynamaxLM(str(model_folder), threshold=1, device="cpu")
    made(fingerprint="0" * 32).save(file)
    message = f"profile.json' was measured on other weights .*000000000000, here {found.current[:12]}"
    args = replace(lm.args, prune_layers=2, prune_strategy="angular", prune_profile=str(file))
    with pytest.raises(UserError, match=message):
        lm.use_policy(args)
    if known_before:
        monkeypatch.setattr(DynamaxLM, "_create_model", lambda *_, **__: pytest.fail("the weights are loaded"))
        options = {"tasks": "t", "output": str(tmp_path / "out"), "prune": "2", "device": "cpu"}
        with pytest.raises(UserError, match=message):
            sweep.load(SweepOptions(backbone=str(model_folder), prune_profile=str(file), **options))
    with pytest.raises(UserError, match=message):
        DynamaxLM(str(model_folder), device="cpu", **given)


def test_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "the time goes where the river goes " * 4}) + "\n" for _ in range(3)))
    output = tmp_path / "profile.json"
    given = ["--backbone", str(model_folder), "--dataset", str(texts), "--texts", "2", "--seq_len", "12"]
    given += ["--device", "cpu", "--output", str(output)]
    assert main(["prune-profile", *given]) == 0
    assert "distance" in capsys.readouterr().out
    profile = PruneProfile.load(output)
    assert profile.num_layers == LAYERS
    assert [len(row) for row in profile.distances] == [6, 5, 4, 3, 2]
    assert all(0 <= value <= 1 for row in profile.distances for value in row)
    assert output.with_suffix(".png").is_file()
    assert main(["prune-profile", *given]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["prune-profile", *given, "--overwrite", "True", "--texts", "5"]) == 2
    assert "only 3 documents" in capsys.readouterr().err
