"""Models that are spread over devices or lie on disk in part give what they give on one device."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accelerate.hooks import AlignDevicesHook
from helpers import LAYERS, save_model, tiny_model
from helpers_harness import generation_requests, instance, sweep_options
from lm_eval.models.huggingface import HFLM
from torch.utils import backend_registration
from transformers import PreTrainedModel

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.models.fingerprint import model_fingerprints

EXITS = {"threshold": 0.3, "confidence": "state", "exit_layers": [2, 4], "batch_size": 2, "device": "cpu"}
REQUESTS = generation_requests(["The quick", "nobody knows where the time goes", "Paris"], until=[])
PAIRS = [
    instance("loglikelihood", pair, i, ("t", i, 1))
    for i, pair in enumerate([("The quick", " fox"), ("nobody", " knows where"), ("", "Paris is")])
]
#: By family: its decoder, embeddings, final norm and rotary embeddings.
PARTS = {
    "llama": ("model", "embed_tokens", "norm", "rotary_emb"),
    "gpt_neox": ("gpt_neox", "embed_in", "final_layer_norm", "rotary_emb"),
    "mamba2": ("backbone", "embeddings", "norm_f"),
}


def half_on_disk(family: str) -> dict[str, str]:
    """Every other block, the final norm and the LM head on disk."""
    decoder, embeddings, norm, *others = PARTS[family]
    places = {f"{decoder}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    places |= {f"{decoder}.{name}": "cpu" for name in (embeddings, *others)}
    return {**places, f"{decoder}.{norm}": "disk", "lm_head": "disk"}


def answers(lm: DynamaxLM) -> tuple[Any, ...]:
    texts = lm.generate_until(REQUESTS, disable_tqdm=True)
    scores = lm.loglikelihood(PAIRS, disable_tqdm=True)
    keys = request_keys([(request.request_type, request.args) for request in (*REQUESTS, *PAIRS)])
    return texts, scores, [lm.response_ledger.find(key) for key in keys]


@pytest.mark.parametrize("family", PARTS)
def test_blocks_on_disk(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    one = DynamaxLM(str(folder), **EXITS)
    offloaded = DynamaxLM(
        str(folder), device_map=half_on_disk(family), offload_folder=str(tmp_path / "offloaded"), **EXITS
    )
    assert any(parameter.device.type == "meta" for parameter in offloaded.model.parameters())
    assert offloaded.engine.backbone.rung == one.engine.backbone.rung
    assert answers(offloaded) == answers(one)
    # What it costs, and what weights it has, does not hang on where they lie.
    assert offloaded.engine.backbone.cost == one.engine.backbone.cost
    assert offloaded.identity() == one.identity()
    assert model_fingerprints(offloaded.model) == model_fingerprints(one.model)


@pytest.mark.parametrize("family", PARTS)
def test_as_much_on_disk_as_memory_asks_for(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    given = {"parallelize": True, "max_cpu_memory": "100KB", "offload_folder": str(tmp_path / "offloaded")}
    spread = DynamaxLM(str(folder), **given, **EXITS)
    assert "disk" in spread.model.hf_device_map.values()
    assert answers(spread) == answers(DynamaxLM(str(folder), **EXITS))
    ours = DynamaxLM(str(folder), threshold=1, device="cpu", batch_size=1, **given)
    theirs = HFLM(str(folder), device="cpu", batch_size=1, **given)
    assert ours.model.hf_device_map == theirs.model.hf_device_map
    expected = theirs.generate_until(REQUESTS, disable_tqdm=True)
    assert ours.generate_until(REQUESTS, disable_tqdm=True) == expected


def test_in_half_precision(model_folder: Path, tmp_path: Path) -> None:
    """Norms are called there as modules, whose weights are loaded by then."""
    given = {**EXITS, "dtype": "bfloat16"}
    places = {"device_map": half_on_disk("llama"), "offload_folder": str(tmp_path / "offloaded")}
    assert answers(DynamaxLM(str(model_folder), **places, **given)) == answers(DynamaxLM(str(model_folder), **given))


def test_an_adapter_needs_the_weights_in_memory(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    monkeypatch.chdir(tmp_path)  # PEFT leaves files there
    adapted = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    places = {"device_map": half_on_disk("llama"), "offload_folder": str(tmp_path / "offloaded")}
    with pytest.raises(UserError, match="cannot be put on a model that is offloaded in part; give it more memory"):
        DynamaxLM(str(model_folder), peft=str(tmp_path / "adapter"), **places, **EXITS)


def test_weights_are_loaded_once_for_a_block(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules of a block are not loaded again one by one, as they are where the model runs itself."""
    lm = DynamaxLM(
        str(model_folder), device_map=half_on_disk("llama"), offload_folder=str(tmp_path / "offloaded"), **EXITS
    )
    loaded: Counter[Any] = Counter()
    load = AlignDevicesHook.pre_forward

    def counted(hook: AlignDevicesHook, module: Any, *args: Any, **kwargs: Any) -> Any:
        loaded[module] += hook.offload
        return load(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    lm.generate_until(generation_requests(["Paris"], until=[], max_gen_toks=1), disable_tqdm=True)
    of_blocks = {name: loaded[module] for name, module in lm.model.named_modules() if ".layers." in name}
    assert set(of_blocks.values()) <= {0, 1}
    assert of_blocks["model.layers.1.mlp.up_proj"] == of_blocks["model.layers.5.input_layernorm"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_memory_per_gpu": "10GiB"}, "max_memory_per_gpu only acts on a model that is spread .* add parallelize"),
        ({"max_cpu_memory": "10GiB"}, "max_cpu_memory only acts on a model that is spread"),
        ({"offload_folder": "x", "parallelize": "false"}, "offload_folder only acts on a model that is spread"),
        ({"parallelize": True, "max_cpu_memory": "much"}, "max_cpu_memory must be a number of bytes or a size such as"),
        ({"parallelize": True, "max_memory_per_gpu": "0"}, "max_memory_per_gpu must be"),
        ({"parallelize": False, "device_map": "auto"}, "parallelize=false forbids it"),
        ({"device_map": "somewhere"}, r"device_map='somewhere': 'somewhere' does not exist here; there are cpu"),
        ({"device_map": {"": 9}}, r"9 does not exist here"),
        ({"device_map": 3}, "device_map must be auto, balanced"),
    ],
)
def test_refused(model_folder: Path, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        DynamaxLM(str(model_folder), threshold=1, device="cpu", **given)


def test_a_loaded_model_stays_where_it_is(model_folder: Path) -> None:
    model = DynamaxLM(str(model_folder), threshold=1, device="cpu").model
    with pytest.raises(UserError, match="loaded already, and cannot be spread over devices; remove parallelize"):
        DynamaxLM(model, threshold=1, parallelize=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "tp_plan splits a model between processes, and there is one; start more: torchrun"),
        ({"parallelize": True}, "tp_plan and parallelize exclude each other"),
        ({"peft": "x"}, "tp_plan and peft exclude each other"),
        ({"batch_size": "auto"}, "tp_plan needs batch_size=N"),
        ({"target_latency_ms": 3}, "tp_plan and target_latency_ms exclude each other"),
        ({"tp_plan": "some"}, "tp_plan must be auto"),
    ],
)
def test_what_is_not_split_between_processes(model_folder: Path, given: dict[str, Any], message: str) -> None:
    threshold = {} if "target_latency_ms" in given else {"threshold": 1}
    with pytest.raises(UserError, match=message):
        DynamaxLM(str(model_folder), device="cpu", **{"tp_plan": "auto", **threshold, **given})


def test_models_and_processes_that_do_not_fit_a_plan(
    model_folder: Path, mamba_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="tp_plan: 2 K/V heads cannot be split between 4 processes"):
        DynamaxLM(str(model_folder), threshold=1, tp_plan="auto")
    with pytest.raises(UserError, match=r"tp_plan is for models whose blocks are of Llama's kind .* 'mamba2' is none"):
        DynamaxLM(str(mamba_folder), threshold=1, tp_plan="auto")


def test_a_sweep_shares_its_points_between_processes(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must not set tp_plan: processes share the points"):
        sweep_options(model_folder, tmp_path, model_args="tp_plan=auto")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a release of torch in which Python can add a kind of device",
)
def test_two_devices() -> None:
    """In a process of its own, because it adds a kind of device to torch."""
    program = Path(__file__).with_name("two_devices.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 7
