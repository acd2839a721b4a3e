"""Checkpoints of exits: read as they were written, refused where they are damaged or do not fit."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_engine import CLASSIFIERS, HIDDEN, exits_config, varied_classifiers
from safetensors.torch import load_file, save_file

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ClassifierOptions
from dynamax_lm_eval.files import file_checksum
from dynamax_lm_eval.models.fingerprint import model_fingerprint


def test_round_trip(tmp_path: Path) -> None:
    config = exits_config(final_block=True, top_k=3)
    checkpoint.save(tmp_path, config, CLASSIFIERS)
    opened = ExitCheckpoint.open(tmp_path)
    assert opened.config == config
    loaded = opened.load()
    for name, tensor in CLASSIFIERS.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    checkpoint.save(tmp_path / "other", config, config.build(seed=99))
    assert opened.fingerprint() != ExitCheckpoint.open(tmp_path / "other").fingerprint()


def test_checkpoints_from_before_a_size_was_added_are_read(tmp_path: Path) -> None:
    config = exits_config(classifiers=("mamba", "calm"), options=ClassifierOptions(mamba_state=5))
    checkpoint.save(tmp_path, config, varied_classifiers(config))
    options = {"mamba_state": 5, "mamba_expand": 0.25, "mamba_kernel": 4, "ffn_expand": 4.0}
    set_config(tmp_path, options=options)
    opened = ExitCheckpoint.open(tmp_path)
    assert opened.config == config
    assert opened.load().kinds == ("mamba", "calm")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    opened = ExitCheckpoint.open(tmp_path)
    opened.check_fits("llama", HIDDEN, LAYERS)
    with pytest.raises(UserError, match="hidden size is 32 there and 64 here"):
        opened.check_fits("llama", 64, LAYERS)
    with pytest.raises(UserError, match="number of blocks is 6 there and 8 here"):
        opened.check_fits("llama", HIDDEN, 8)
    with pytest.raises(UserError, match="architecture is 'llama' there and 'mistral' here"):
        opened.check_fits("mistral", HIDDEN, LAYERS)
    with pytest.raises(UserError, match=r"trained for other weights.*exits_check=false"):
        opened.check_fingerprint("0" * 64)
    opened.check_fingerprint(model_fingerprint(tiny_model("llama")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be used"),
        (lambda folder: (folder / "config.json").write_text('{"format": "other"}'), "not an exit checkpoint"),
        (lambda folder: set_config(folder, format_version=99), "format_version is 99"),
        (lambda folder: set_config(folder, exit_layers=[3, 2, 4]), "are not rising numbers"),
        (lambda folder: set_config(folder, exit_layers=[2, 6]), "are not rising numbers"),
        (lambda folder: set_config(folder, final_block="no"), "final_block is not true or false"),
        (lambda folder: set_config(folder, classifiers=[]), "are not some of calm, ffn, mamba, hybrid"),
        (lambda folder: set_config(folder, activation="swoosh"), "activation 'swoosh' is unknown"),
        (lambda folder: set_config(folder, exit_layers=[2, 3]), "exits.safetensors cannot be used"),
        (lambda folder: (folder / "exits.safetensors").write_bytes(b"1234"), "exits.safetensors cannot be used"),
        (lambda folder: (folder / "exits.safetensors").unlink(), "exits.safetensors cannot be used"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ExitCheckpoint.open(tmp_path).load()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["by_kind.calm.3.out_proj.weight", "adapters.2.up.bias"])
def test_exits_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    config = exits_config(adapter="affine")
    checkpoint.save(tmp_path, config, config.build(), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "exits.safetensors")
    tensors[name].view(-1)[1] = value
    save_file(tensors, tmp_path / "exits.safetensors")
    set_config(tmp_path, weights_checksum=file_checksum(tmp_path / "exits.safetensors"))
    message = re.escape(f"exits={str(tmp_path)!r}: exits.safetensors cannot be used: {name} (1 of ")
    with pytest.raises(UserError, match=message):
        ExitCheckpoint.open(tmp_path).load()


def test_one_changed_weight_makes_other_exits_and_another_dtype_does_not(tmp_path: Path) -> None:
    classifiers = exits_config().build(3).to(torch.bfloat16)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        checkpoint.save(tmp_path, exits_config(), classifiers, dtype=dtype)
        found.append(ExitCheckpoint.open(tmp_path).fingerprint())
    tensors = load_file(tmp_path / "exits.safetensors")
    tensors["by_kind.ffn.3.in_proj.weight"][70, 5] *= 1.0001
    save_file(tensors, tmp_path / "exits.safetensors")
    found.append(ExitCheckpoint.open(tmp_path).fingerprint())
    assert found[0] == found[1] != found[2]


def set_config(folder: Path, **changes: Any) -> None:
    """Changes a checkpoint by hand: without a checksum nothing vouches for its content."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    file.write_text(json.dumps({**data, **changes}))
