"""``dynamax-lm-eval exits``, exits that hide those of the package, and classifiers that learned nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_engine import exits_config
from helpers_harness import save_exits

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import listing, lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.training.card import model_card
from dynamax_lm_eval.training.log import near_chance


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
    return tmp_path / "exits"


def test_lists_what_runs_look_at(home: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_exits(model_folder, home / "mine", classifiers=("calm",))
    (home / "damaged").mkdir()
    (home / "damaged" / "config.json").write_text("{")
    assert main(["exits"]) == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if line.startswith("| mine ")]
    assert all(part in row for part in ("cache", "calm", "2+3+4", str(model_folder)))
    assert any("damaged" in line and "cannot be read" in line for line in shown.splitlines())
    assert {folder.name for place, folder, _ in listing.known_exits() if place == "package"} >= {"tiny-llama"}
    assert "| tiny-llama " in shown


def test_shows_and_removes(home: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_exits(model_folder, home / "mine")
    for name in ("mine", str(folder), "tiny-llama"):
        assert main(["exits", "--show", name]) == 0
        assert json.loads(capsys.readouterr().out)["exit_layers"]
    assert main(["exits", "--remove", "mine"]) == 0
    assert not folder.exists()
    for name in ("mine", "tiny-llama", "../exits", "."):
        assert main(["exits", "--remove", name]) == 2
        assert "there are no such exits" in capsys.readouterr().err
    with pytest.raises(UserError, match="exclude each other"):
        listing.ExitsOptions("a", "b")


def test_exits_in_the_cache_that_hide_those_of_the_package_are_announced(
    home: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = ExitCheckpoint.open(lookup.shipped_home() / "tiny-llama")
    fingerprint = shipped.config.backbone.fingerprint
    assert lookup.find("tiny-llama", fingerprint) == shipped and not caplog.records
    own = save_exits(model_folder, home / "mine", fingerprint=fingerprint)
    found = lookup.find("tiny-llama", fingerprint)
    assert found is not None and found.path == own
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"hide those of the package for this backbone; name them (exits={shipped.path})" in record.getMessage()


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_metadata_of_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is known, as the Hub reads it; a folder is no data set of the Hub, and a licence is for people to give."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books" / "train").mkdir(parents=True)
    training = {"tokens": 5, "steps": 1, "seconds": 1.0, "tokens_per_second": 5.0, "hardware": "h", "dtype": "float32"}
    evaluation = {"tokens": 10, "documents": 3, "classifiers": {}}

    def card(backbone: str, dataset: str, license_id: str | None = None) -> dict[str, Any]:
        config = exits_config(training={**training, "options": {"dataset": dataset, "prompts": None}})
        named = replace(config, backbone=replace(config.backbone, id=backbone))
        return front_matter(model_card(named, evaluation, license_id=license_id))

    assert card("smollm2", "self:0.5+owner/texts", "mit") == {
        "library_name": "dynamax-lm-eval",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "mit",
        "datasets": ["owner/texts"],
        "tags": ["early-exit", "dynamax"],
    }
    for dataset in ("books/train", "self", "/somewhere/texts.jsonl", "texts/part.jsonl.gz"):
        assert set(card("./folder", dataset)) == {"library_name", "tags"}, dataset


def test_shipped_cards_name_a_licence() -> None:
    for path in aliases.shipped_dir().glob("*/*/README.md"):
        text = path.read_text(encoding="utf-8")
        found = front_matter(text)
        assert found["license"] == ("apache-2.0" if path.parts[-3] == "exits" else "cc-by-4.0")
        assert "[dynamax-lm-eval](https://arxiv" not in text and "datasets" not in found


def test_classifiers_that_learned_nothing_are_named() -> None:
    quality: dict[str, Any] = {"macs_per_evaluation": {"2": 1, "3": 1}, "curve": []}

    def exits(*areas: float | None) -> dict[str, Any]:
        reached = {"0.8": {"share": 0.5, "auroc": None}}
        pairs = zip(("2", "3"), areas, strict=True)
        return {layer: {"auroc": area, "auroc_stderr": 0.1, "reaching": reached} for layer, area in pairs}

    measured = {"calm": {**quality, "exits": exits(0.52, 0.7)}, "ffn": {**quality, "exits": exits(None, 0.549)}}
    evaluation = {"tokens": 10, "documents": 3, "classifiers": measured}
    assert near_chance(evaluation) == ["calm at exit layer 2 (0.520)", "ffn at exit layer 3 (0.549)"]
    options = {"dataset": "d", "classifier": "calm", "prompts": None}
    training = {"tokens": 5, "steps": 1, "seconds": 1.0, "tokens_per_second": 5.0, "hardware": "h", "dtype": "float32"}
    config = exits_config(exit_layers=(2, 3), training={**training, "options": options})
    card = model_card(config, evaluation)
    assert "Hardly better than chance (AUROC): calm at exit layer 2 (0.520)" in card
    assert "10 tokens of 3 documents" in card and "| ffn | - | 0.549 ± 0.100 |" in card and "- (50 %)" in card


def test_a_name_of_the_list_is_a_name_for_runs(
    model_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home.parent)
    mine = save_exits(model_folder, lookup.exits_home() / "mine")
    assert lookup.open_exits("mine").path == mine
    assert lookup.open_exits("tiny-llama").path == lookup.shipped_home() / "tiny-llama"
    with pytest.raises(UserError, match="no such name in dynamax-lm-eval exits"):
        lookup.open_exits("yours")
    assert main(["exits"]) == 0
    assert lookup.open_exits("mine").fingerprint()[:12] in capsys.readouterr().out
