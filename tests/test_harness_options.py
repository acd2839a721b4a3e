"""Options of the harness: each does with our model what it does with ``--model hf``."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
from helpers import TASKS, tiny_model, train_tokenizer
from helpers_harness import EXIT_ARGS, dynamax, evaluate, generation_requests, responses
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.lm import DynamaxLM

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


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
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_tag", write_out=True)
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
    by_instance = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate")
    assert by_string["results"] == by_instance["results"]
    assert by_string["compute"]["by_task"] == by_instance["compute"]["by_task"]


def test_results_keep_the_rules_of_leaderboards(model_folder: Path, manager: TaskManager) -> None:
    """docs/result_files.md: numbers under "metric,filter", compute after the metrics, plain keys."""
    results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_group", "tiny_rolling")
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

    @staticmethod
    def rows(folder: Path) -> dict[str, float]:
        """The rows of the result file that a run wrote, as loggers name them; a filter "none" is left out of a name."""
        (path,) = folder.rglob("results_*.json")
        metrics = json.loads(path.read_text(encoding="utf-8"))["results"]["tiny_generate"]
        return {
            f"tiny_generate/{key.removesuffix(',none')}": value
            for key, value in metrics.items()
            if "," in key and isinstance(value, (int, float))
        }

    def test_wandb_offline(self, run: Any, tmp_path: Path) -> None:
        wandb = pytest.importorskip("wandb", reason="needs wandb")
        assert "compute_reduction" in run("--wandb_args", f"project=tests,mode=offline,dir={tmp_path}")
        wandb.teardown()  # its own process writes the file: this waits until that has ended
        (summary,) = tmp_path.rglob("*.wandb")
        # Blocks of 32 KiB of records, each behind its checksum (4 bytes), length (2) and type (1); 7 bytes come before.
        data, content, place = summary.read_bytes(), b"", 7
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length = int.from_bytes(data[place + 4 : place + 6], "little")
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
        rows = self.rows(tmp_path / "out")
        assert len(rows) > 8
        for name, value in rows.items():
            # A record of the history: the name, and behind it the value as JSON.
            behind = [re.match(rb"[^\d]{1,4}?(\d[\d.e-]*)", part) for part in content.split(name.encode())[1:]]
            assert value in [float(found.group(1)) for found in behind if found], name

    def test_trackio(self, run: Any, tmp_path: Path) -> None:
        pytest.importorskip("trackio", reason="needs trackio")
        from trackio.sqlite_storage import SQLiteStorage

        assert "compute_reduction" in run("--trackio_args", "project=rows,name=first")
        kept: dict[str, Any] = {}
        for entry in SQLiteStorage.get_logs("rows", "first"):
            kept |= entry
        rows = self.rows(tmp_path / "out")
        assert len(rows) > 8
        assert {name: kept.get(name) for name in rows} == pytest.approx(rows)

    def test_nemo_evaluator(self, run: Any, tmp_path: Path) -> None:
        """What NVIDIA's parser of ``results*.json`` asks: one file, numbers, and names that stay apart.

        It takes every key with a comma and without "stderr" for a metric, names it metric__filter (the metric alone
        where the filter is none), and wants a number as its value, and a number or "N/A" as its standard error.
        """
        run()
        (path,) = (tmp_path / "out").rglob("results*.json")
        data = json.loads(path.read_text(encoding="utf-8"))
        for metrics in (*data["results"].values(), *data.get("groups", {}).values()):
            names = [key for key in metrics if "," in key and "stderr" not in key]
            assert {key.partition(",")[0] for key in names} > {"exact_match", "compute_reduction", "mean_exit_layer"}
            for key in names:
                assert key.count(",") == 1
                assert isinstance(metrics[key], (int, float)) and not isinstance(metrics[key], bool), key
                metric, _, harness_filter = key.partition(",")
                stderr = metrics.get(f"{metric}_stderr,{harness_filter}")
                assert stderr in (None, "N/A") or isinstance(stderr, (int, float)), key
            shown = [key.removesuffix(",none").replace(",", "__") for key in names]
            assert len(set(shown)) == len(names)


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
