"""Every parameter of HFLM does what it does with ``--model hf``, or is refused by its name."""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_tokenizer
from helpers_harness import dynamax, generation_requests, instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.hflm import beside
from dynamax_lm_eval.lm import DynamaxLM

#: For every parameter of HFLM, values that do what they do with hf (and how near scores come).
_TOKENIZER = train_tokenizer()
HONOURED: dict[str, list[tuple[Any, float]]] = {
    "pretrained": [],  # every test
    "backend": [("default", 1e-4), ("causal", 1e-4)],
    "revision": [("main", 1e-4), (None, 1e-4)],
    "subfolder": [("", 1e-4)],  # and below
    "tokenizer": [(_TOKENIZER, 1e-4)],
    "truncation": [(True, 1e-4)],
    "logits_cache": [(False, 1e-4)],
    "max_length": [(20, 1e-4)],
    "device": [("cpu", 1e-4)],
    "dtype": [("float64", 1e-4), (torch.float32, 1e-4), ("auto", 1e-4), ("bfloat16", 0.2)],
    "softmax_dtype": [("float64", 1e-4), (torch.float32, 1e-4)],
    "mixed_precision_dtype": [("bfloat16", 0.2)],
    "batch_size": [(2, 1e-4), ("2", 1e-4)],
    "max_batch_size": [(8, 1e-4)],
    "trust_remote_code": [(True, 1e-4)],
    "use_fast_tokenizer": [(True, 1e-4)],
    "add_bos_token": [(True, 1e-4), (False, 1e-4)],
    "prefix_token_id": [(7, 1e-4)],
    "think_end_token": [("e", 1e-4), (40, 1e-4), ("40", 1e-4)],
    "enable_thinking": [(False, 1e-4)],
    "chat_template_args": [({"x": 1}, 1e-4)],
    "parallelize": [(False, 1e-4), (True, 1e-4), ("true", 1e-4)],
}
#: Values that are refused: before weights load, in one line that names the parameter (or the package it needs).
REFUSED: dict[str, list[Any]] = {
    "backend": ["seq2seq", "foo", 1],
    "subfolder": [3],
    "tokenizer": ["/nowhere", 3],
    "truncation": ["maybe", 1],
    "logits_cache": ["no", 0],
    "max_length": [64.0, "64.0", -5, "-5", 0, True, "many", [64]],
    "device": ["xyz", "cuda:7", "cpu:0", "", 0],
    "dtype": ["xyz", "nn", "int8", "int64", 32, torch.int8],
    "softmax_dtype": ["xyz", "auto", "nn"],
    "mixed_precision_dtype": ["xyz", "auto", torch.int32],
    "batch_size": [0, -1, 2.5, "many", "auto:x", True],
    "max_batch_size": [0, "many", 2.5],
    "trust_remote_code": ["perhaps"],
    "use_fast_tokenizer": ["perhaps"],
    "add_bos_token": ["perhaps"],
    "prefix_token_id": [99999, 97, "97", -1, 7.0, True, "x"],
    "think_end_token": [97, "97", -1, 2.5, True],
    "enable_thinking": ["perhaps", True],
    "chat_template_args": ["x", 3],
    "parallelize": ["perhaps", 1],
    "max_memory_per_gpu": ["10GiB", 0],  # they need parallelize, see test_devices
    "max_cpu_memory": ["10GiB", 1],
    "offload_folder": ["./offload", 3],
    "tp_plan": ["auto", {}],
    "peft": [3, "/nowhere"],
    "delta": [3],
    "gguf_file": [3],
    "autogptq": [True],
    "gptqmodel": [True, "perhaps"],
}
REQUESTS = generation_requests(["The quick", "nobody knows where the time goes"], until=[])
PAIRS = [
    instance("loglikelihood", pair, i, ("t", i, 1))
    for i, pair in enumerate([("The quick", " fox"), ("nobody", " knows where"), ("", "Paris is")])
]


class TestParametersOfHFLM:
    def test_every_parameter_is_known(self) -> None:
        parameters = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
        assert set(HONOURED) | set(REFUSED) == parameters

    @pytest.mark.parametrize(("name", "value", "near"), [(n, *v) for n, values in HONOURED.items() for v in values])
    def test_honoured(
        self, model_folder: Path, name: str, value: Any, near: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)  # parallelize makes a folder there
        given = {"device": "cpu", "batch_size": 1, name: value}
        theirs, ours = HFLM(str(model_folder), **given), DynamaxLM(str(model_folder), threshold=1, **given)
        expected = theirs.loglikelihood(PAIRS, disable_tqdm=True)
        found = ours.loglikelihood(PAIRS, disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=near)
        if near < 0.1:
            texts = theirs.generate_until(REQUESTS, disable_tqdm=True)
            assert ours.generate_until(REQUESTS, disable_tqdm=True) == texts

    @pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
    def test_refused_by_name(self, model_folder: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        if name not in ("autogptq", "gptqmodel"):
            monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(UserError, match=rf"{name}|gptq") as caught:
            DynamaxLM(str(model_folder), **{"device": "cpu", "threshold": 1, name: value})
        assert "\n" not in str(caught.value)
        assert "backbone=" not in str(caught.value) or name in ("autogptq", "gptqmodel")

    def test_text_is_understood(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, max_length="64", prefix_token_id="7", dtype="torch.float64", max_batch_size="4")
        assert (lm.max_length, lm.prefix_token_id, lm.model.dtype, lm.max_batch_size) == (64, 7, torch.float64, 4)

    def test_a_folder_inside(self, model_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(model_folder, tmp_path / "a" / "b")
        ours = dynamax(tmp_path, subfolder="a/b")
        theirs = HFLM(str(tmp_path), subfolder="a/b", device="cpu", batch_size=1)
        texts = theirs.generate_until(REQUESTS, disable_tqdm=True)
        assert ours.generate_until(REQUESTS, disable_tqdm=True) == texts

    def test_weights_that_are_added(self, model_folder: Path) -> None:
        given = {"delta": str(model_folder), "device": "cpu", "batch_size": 1}
        expected = HFLM(str(model_folder), **given).loglikelihood(PAIRS, disable_tqdm=True)
        found = dynamax(model_folder, **given).loglikelihood(PAIRS, disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"peft": "a", "delta": "b"}, "peft and delta exclude each other"),
            ({"autogptq": True, "gptqmodel": True}, "autogptq and gptqmodel exclude each other"),
            ({"enable_thinking": True}, "enable_thinking=true needs think_end_token="),
        ],
    )
    def test_what_does_not_go_together(self, model_folder: Path, given: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            dynamax(model_folder, **given)

    def test_thinking_has_no_scores(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, enable_thinking=True, think_end_token="e")
        with pytest.raises(UserError, match="enable_thinking=true is for generations only, and t asks for scores"):
            lm.loglikelihood(PAIRS, disable_tqdm=True)

    def test_only_the_default_device_is_replaced(
        self, model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        caplog.set_level(logging.INFO)
        for given, level in (({}, "INFO"), ({"device": "cuda:0"}, "WARNING")):
            caplog.clear()
            assert DynamaxLM(str(model_folder), threshold=1, **given).device.type == "cpu"
            (record,) = [record for record in caplog.records if "no CUDA device here" in record.getMessage()]
            assert record.levelname == level
        caplog.clear()
        made = DynamaxLM.create_from_arg_obj(
            {"backbone": str(model_folder), "threshold": 1},
            {"device": "cuda:0"},  # as the harness names it unasked
        )
        assert made.device.type == "cpu"
        assert "WARNING" not in caplog.text
        with pytest.raises(UserError, match=r"device='cuda' does not exist here; give one of cpu"):
            DynamaxLM(str(model_folder), threshold=1, device="cuda")


def test_model_arguments_that_the_command_has_options_for() -> None:
    options = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    assert beside({"device": "cpu", "threshold": 0.8}, options) == {"batch_size": 1, "max_batch_size": None}
    assert beside({}, options) == options
    assert beside({"batch_size": "4"}, {"batch_size": 4, "device": "cpu"}) == {"device": "cpu"}
    with pytest.raises(UserError, match="--device cpu and device=cuda in --model_args differ; give one of them"):
        beside({"device": "cuda"}, {"device": "cpu"})
