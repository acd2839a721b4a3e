"""Options of the harness: each does with our model what it does with ``--model hf``."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import torch
from conftest import tiny_model, train_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from test_lm import EXITS, TASKS, dynamax, evaluate, generation_requests, responses

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.lm import DynamaxLM

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    tiny_model("mistral").save_pretrained(folder)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"num_fewshot": 2},
        {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True},
        {"apply_chat_template": True, "system_instruction": "The quick brown fox."},
        {"num_fewshot": 1, "system_instruction": "Paris."},
        {"gen_kwargs": {"max_gen_toks": 3, "until": ["e"]}},
        {"limit": 3},
    ],
)
def test_prompts_and_texts_are_those_of_hf(chat_folder: Path, manager: TaskManager, options: dict[str, Any]) -> None:
    theirs = evaluate(HFLM(str(chat_folder), device="cpu", batch_size=1), manager, "tiny_shots", **options)
    ours = evaluate(dynamax(chat_folder), manager, "tiny_shots", **options)
    assert responses(ours, "tiny_shots") == responses(theirs, "tiny_shots")
    prompts = [[sample["arguments"] for sample in results["samples"]["tiny_shots"]] for results in (ours, theirs)]
    assert prompts[0] == prompts[1]
    assert len(ours["samples"]["tiny_shots"]) == options.get("limit", 8)


def test_samples_that_are_no_file(model_folder: Path) -> None:
    with pytest.raises(UserError, match="--samples"):
        lm_eval.simple_evaluate(
            dynamax(model_folder),
            tasks=["tiny_generate"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            samples="nowhere.json",
        )


def test_tags_write_out_and_integrity_of_the_row(
    model_folder: Path, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        results = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_tag", write_out=True)
    assert set(results["compute"]["by_task"]) == {"tiny_shots", "tiny_tagged"}
    assert any("context prompt" in message for message in caplog.messages)


def test_from_python_with_a_string(model_folder: Path, manager: TaskManager) -> None:
    by_string = lm_eval.simple_evaluate(
        "dynamax",
        model_args=f"pretrained={model_folder},threshold=0.1,exit_layers=2+4",
        tasks=["tiny_generate"],
        task_manager=manager,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    by_instance = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_generate")
    assert by_string["results"] == by_instance["results"]
    assert by_string["compute"]["by_task"] == by_instance["compute"]["by_task"]


def test_results_keep_the_rules_of_leaderboards(model_folder: Path, manager: TaskManager) -> None:
    """docs/result_files.md: numbers under "metric,filter", compute after the metrics, plain keys."""
    results = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_group", "tiny_rolling")
    for task, row in results["results"].items():
        for key, value in row.items():
            assert "/" not in key
            if "," in key and "_stderr" not in key:
                assert isinstance(value, (int, float)), (task, key)
        metrics = [key for key in row if "," in key]
        compute = [
            key.startswith(("compute_", "mean_exit", "generated_", "token_limit", "degenerate")) for key in metrics
        ]
        assert compute == sorted(compute), "compute stands last"
        for name in ("compute_reduction", "compute_reduction_total", "compute_reduction_paper"):
            assert results["higher_is_better"][task][name] is True
    json.dumps(results["compute"], allow_nan=False)
    json.dumps(results["config"]["dynamax"], allow_nan=False)


class TestPeft:
    @pytest.fixture
    def adapted(self, model_folder: Path, tmp_path: Path) -> Any:
        peft = pytest.importorskip("peft", reason="needs peft")
        import copy

        def save(config: Any, name: str) -> str:
            torch.manual_seed(5)
            model = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.3)
                if "ia3_l" in key or "ln_tuning" in key:
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
            model.save_pretrained(tmp_path / name)
            return str(tmp_path / name)

        return peft, save

    def test_lora_runs_as_with_hf(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]), "lora")
        requests = generation_requests(["The quick", "nobody knows"])
        plain = dynamax(model_folder).generate_until(requests, disable_tqdm=True)
        theirs = HFLM(str(model_folder), peft=adapter, device="cpu", batch_size=1)
        ours = dynamax(model_folder, peft=adapter)
        expected = theirs.generate_until(requests, disable_tqdm=True)
        assert ours.generate_until(requests, disable_tqdm=True) == expected
        assert expected != plain
        # The adapter's weights are counted, in the block and in the K and V that recompute projects.
        base = dynamax(model_folder).engine.backbone.cost.blocks[0]
        block = dynamax(model_folder, peft=adapter, **EXITS).engine.backbone.cost.blocks[0]
        assert block.weights == base.weights + 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 48))
        assert block.state_recompute == base.state_recompute + 4 * 2 * (32 + 16)

    @pytest.mark.parametrize("kind", ["ia3", "layer norms"])
    def test_adapters_of_vectors_run_as_with_hf_and_cost_nothing(
        self, model_folder: Path, adapted: Any, kind: str
    ) -> None:
        peft, save = adapted
        config = {
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
            "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        }[kind]
        adapter = save(config(), "vectors")
        pairs = [(("a", "b"), [5, 9, 14, 3], [7, 21])]
        ((plain, _),) = dynamax(model_folder)._loglikelihood_tokens(pairs, disable_tqdm=True)
        theirs = HFLM(str(model_folder), peft=adapter, device="cpu", batch_size=1)
        ((expected, _),) = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
        ours = dynamax(model_folder, peft=adapter)
        ((found, _),) = ours._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-5)
        assert abs(found - plain) > 0.01
        # What recompute projects was compared with what the blocks write, through the adapted modules.
        exiting = dynamax(model_folder, peft=adapter, **EXITS)
        assert exiting.engine.recomputes_states
        base = dynamax(model_folder).engine.backbone.cost
        assert exiting.engine.backbone.cost == base

    def test_missing_weights_are_refused(self, model_folder: Path, adapted: Any, tmp_path: Path) -> None:
        peft, save = adapted
        adapter = Path(save(peft.LoraConfig(r=4, target_modules=["k_proj"]), "lora"))
        file = adapter / "adapter_model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(file).items() if ".5." not in name}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"^peft='.*lora': 2 of its weights are not in its files.*layers\.5\."):
            dynamax(model_folder, peft=str(adapter))

    def test_adapters_that_cannot_be_counted_are_refused(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.VeraConfig(target_modules=["k_proj"], r=4), "vera")
        with pytest.raises(UserError, match="is VERA, whose compute the cost model cannot count"):
            dynamax(model_folder, peft=adapter)

    def test_prompt_tuning_is_refused(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt")
        with pytest.raises(UserError, match="adds virtual tokens"):
            dynamax(model_folder, peft=adapter)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_loading(tmp_path: Path, bits: int) -> None:
    """Blocks are quantised, the layer loop agrees with the model's forward, and the counted MACs stay the same."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes with a CPU back end")
    import transformers as hf

    # bitsandbytes wants rows that are multiples of its block size.
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    plain = dynamax(tmp_path, threshold=0.1, dtype="float32")
    quantised = dynamax(tmp_path, threshold=0.1, dtype="float32", **{f"load_in_{bits}bit": True})
    kinds = {type(module).__name__ for module in quantised.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    assert quantised.engine.backbone.cost == plain.engine.backbone.cost
    assert quantised.generate_until(generation_requests(["The quick", "Paris"]), disable_tqdm=True)


def test_quantisation_settings_without_quantisation_are_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="bnb_4bit_quant_type: needs load_in_4bit=True"):
        dynamax(model_folder, bnb_4bit_quant_type="nf4")


class TestTrackers:
    """The harness's loggers take our results; it only logs their errors, so the log is looked at."""

    @pytest.fixture
    def run(
        self, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        )

        def run(*extra: str) -> str:
            command = ["run", "--model_args", f"backbone={model_folder},threshold=0.1,exit_layers=2+4"]
            command += ["--tasks", "tiny_generate", "--include_path", str(TASKS), "--device", "cpu"]
            assert main([*command, "--output_path", str(tmp_path / "out"), "--log_samples", *extra]) == 0
            captured = capfd.readouterr()
            assert "failed" not in captured.err.lower(), captured.err
            return captured.out

        return run

    def test_wandb_offline(self, run: Any, tmp_path: Path) -> None:
        wandb = pytest.importorskip("wandb", reason="needs wandb")
        assert "compute_reduction" in run("--wandb_args", f"project=tests,mode=offline,dir={tmp_path}")
        wandb.teardown()  # its own process writes the file: this waits until that has ended
        (summary,) = tmp_path.rglob("*.wandb")
        assert b"compute_reduction" in summary.read_bytes()

    def test_trackio(self, run: Any) -> None:
        pytest.importorskip("trackio", reason="needs trackio")
        assert "compute_reduction" in run("--trackio_args", "project=tests")


class TestBrokenFiles:
    @pytest.fixture
    def copied(self, model_folder: Path, tmp_path: Path) -> Path:
        return shutil.copytree(model_folder, tmp_path / "copy")

    def test_truncated_weights(self, copied: Path) -> None:
        weights = copied / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        with pytest.raises(UserError, match="could not be loaded"):
            dynamax(copied)

    def test_a_configuration_without_weights(self, copied: Path) -> None:
        (copied / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"could not be loaded.*model\.safetensors"):
            dynamax(copied)

    def test_a_folder_without_a_tokenizer(self, copied: Path) -> None:
        for file in copied.glob("token*"):
            file.unlink()
        with pytest.raises(UserError, match="could not be loaded"):
            dynamax(copied)

    def test_a_tokenizer_with_more_tokens_than_embeddings(self, model_folder: Path) -> None:
        tokenizer = train_tokenizer()
        tokenizer.add_tokens(["Zanzibar"])
        lm = DynamaxLM(str(model_folder), tokenizer=tokenizer, threshold=1, device="cpu", batch_size=2)
        assert lm.generate_until(generation_requests(["The quick"]), disable_tqdm=True)
        for call in (
            lambda: lm.generate_until(generation_requests(["The Zanzibar"]), disable_tqdm=True),
            lambda: lm._loglikelihood_tokens([(("a", "b"), [3, 97], [4])], disable_tqdm=True),
        ):
            with pytest.raises(UserError, match="only 97 embeddings"):
                call()

    def test_empty_prompts_and_continuations(self, model_folder: Path) -> None:
        lm = dynamax(model_folder)
        with pytest.raises(UserError, match="empty prompt"):
            lm.generate_until(generation_requests([""]), disable_tqdm=True)
        with pytest.raises(UserError, match="empty continuation"):
            lm._loglikelihood_tokens([(("a", ""), [3, 4], [])], disable_tqdm=True)
        with pytest.raises(UserError, match="longer than max_length"):
            dynamax(model_folder, max_length=8)._loglikelihood_tokens([(("a", "b"), [3], [4] * 9)], disable_tqdm=True)


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
    "parallelize": [True, "true", 1],
    "max_memory_per_gpu": ["10GiB", 0],
    "max_cpu_memory": ["10GiB", 1],
    "offload_folder": ["./offload", "x"],
    "tp_plan": ["auto", {}],
    "peft": [3, "/nowhere"],
    "delta": [3],
    "gguf_file": [3],
    "autogptq": [True],
    "gptqmodel": [True, "perhaps"],
}


REQUESTS = generation_requests(["The quick", "nobody knows where the time goes"], until=[])
PAIRS = [
    Instance("loglikelihood", {}, pair, i, ("t", i, 1))
    for i, pair in enumerate([("The quick", " fox"), ("nobody", " knows where"), ("", "Paris is")])
]


class TestParametersOfHFLM:
    def test_every_parameter_is_known(self) -> None:
        parameters = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
        assert set(HONOURED) | set(REFUSED) == parameters

    @pytest.mark.parametrize(("name", "value", "near"), [(n, *v) for n, values in HONOURED.items() for v in values])
    def test_honoured(self, model_folder: Path, name: str, value: Any, near: float) -> None:
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
            never = "transformers.modeling_utils.PreTrainedModel.from_pretrained"
            monkeypatch.setattr(never, lambda *_, **__: pytest.fail("weights were loaded"))
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
        for given in ({}, {"device": "cuda:0"}):  # what the harness gives where the user says nothing
            caplog.clear()
            assert DynamaxLM(str(model_folder), threshold=1, **given).device.type == "cpu"
            assert "no CUDA device here" in caplog.text
        with pytest.raises(UserError, match=r"device='cuda' does not exist here; give one of cpu"):
            DynamaxLM(str(model_folder), threshold=1, device="cuda")
