"""How a backbone is loaded or refused: by its configuration, by its structure without weights, and by its files."""

from __future__ import annotations

import builtins
import functools
import json
import logging
import pwd
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import lm_eval.tasks
import pytest
import safetensors
import torch
import transformers as hf
from helpers import save_model, tiny_model, train_tokenizer
from helpers_architectures import ARCHITECTURES
from helpers_harness import dynamax
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.engine.parity import engine_without_weights
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.models import aliases, loading
from dynamax_lm_eval.models.blocks import find_blocks

PAIR = ([5, 9, 14, 3], [7, 21])


def score(lm: Any) -> tuple[float, bool]:
    """Of one continuation."""
    (answer,) = lm._loglikelihood_tokens([(("a", "b"), *PAIR)], disable_tqdm=True)
    return answer


def edit(folder: Path, **changes: Any) -> Path:
    """Changes entries of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "copied")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are read, for a fingerprint too."""
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("weights were read"))


def load_to_train(folder: Path) -> Any:
    return load_backbone(FrozenOptions(backbone=str(folder), seq_len=16, dtype="float32", device="cpu"))


class TestWeights:
    @pytest.mark.parametrize("load", [dynamax, load_to_train])
    def test_missing_ones_are_named(self, copied: Path, load: Any) -> None:
        edit(copied, num_hidden_layers=8)
        with pytest.raises(UserError, match=r"18 of its weights are not in its files.*: model\.layers\.\{6, 7\}\."):
            load(copied)

    @pytest.mark.parametrize("load", [dynamax, load_to_train])
    def test_of_another_size_are_never_made_up(self, copied: Path, load: Any) -> None:
        edit(copied, intermediate_size=64)
        sizes = r"18 weights .* sizes .*0\.mlp\.down_proj\.weight \(32, 48\) and not \(32, 64\)"
        with pytest.raises(UserError, match=sizes):
            load(copied)

    def test_without_a_use_are_named_in_one_warning(self, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
        edit(copied, num_hidden_layers=4)
        with caplog.at_level(logging.WARNING):
            dynamax(copied, exit_layers=[2])
        said = [message for message in caplog.messages if "layers" in message or "REPORT" in message]
        assert len(said) == 1
        assert "18 weights in its files are not used: model.layers.{4, 5}.input_layernorm.weight" in said[0]

    def test_a_shard_that_lacks_a_tensor(self, tmp_path: Path) -> None:
        tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
        train_tokenizer().save_pretrained(tmp_path)
        assert score(dynamax(tmp_path)) == pytest.approx(score(HFLM(str(tmp_path), device="cpu")))
        shard = max(tmp_path.glob("model-*.safetensors"))
        tensors = load_file(shard)
        lost = min(tensors)
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"1 of its weights are not in its files and would be random: {lost}"):
            dynamax(tmp_path)

    def test_tied_ones_and_buffers_are_not_missed(self, tmp_path: Path) -> None:
        config = hf.LlamaConfig(**{**tiny_model("llama").config.to_dict(), "tie_word_embeddings": True})
        hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
        train_tokenizer().save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        assert score(dynamax(tmp_path)) == pytest.approx(score(HFLM(str(tmp_path), device="cpu")))
        edit(tmp_path, tie_word_embeddings=False)
        with pytest.raises(UserError, match=r"1 of its weights .* would be random: lm_head\.weight"):
            dynamax(tmp_path)

    def test_of_a_delta(self, model_folder: Path, copied: Path) -> None:
        edit(copied, num_hidden_layers=8)
        with pytest.raises(UserError, match=r"delta='.*copied': 18 of its weights"):
            dynamax(model_folder, delta=str(copied))

    def test_of_a_gguf_file(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf", reason="needs gguf")
        names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "layers": "blk"}
        names |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
        names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
        names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.": ""}

        def write(name: str, without: str) -> None:
            writer = gguf.GGUFWriter(tmp_path / name, "llama")
            sizes = {"block_count": 6, "context_length": 256, "embedding_length": 32, "feed_forward_length": 48}
            for key, value in {**sizes, "head_count": 4, "head_count_kv": 2, "vocab_size": 97}.items():
                getattr(writer, f"add_{key}")(value)
            writer.add_layer_norm_rms_eps(1e-6)
            for key, tensor in tiny_model("llama").state_dict().items():
                for theirs, ours in names.items():
                    key = key.replace(theirs, ours)
                if without not in key:
                    writer.add_tensor(key, tensor.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        write("whole.gguf", without="nothing")
        write("short.gguf", without="blk.5.")
        tokenizer = train_tokenizer()
        assert dynamax(tmp_path, gguf_file="whole.gguf", tokenizer=tokenizer).engine.backbone.num_layers == 6
        with pytest.raises(UserError, match=r"9 of its weights are not in its files.*layers\.5\.input_layernorm"):
            dynamax(tmp_path, gguf_file="short.gguf", tokenizer=tokenizer)


@pytest.fixture
def own_code(copied: Path) -> Path:
    """A model with code of its own, which leaves a file behind when it is run."""
    (copied / "modeling_mine.py").write_text(
        f"open({str(copied / 'it_ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    return edit(copied, model_type="mine", architectures=["MineForCausalLM"], auto_map=classes)


class TestOwnCode:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["run", "--tasks", "trivia_demo", "--device", "cpu", "--model_args", "backbone={}"],
            ["run", "--tasks", "trivia_demo", "--device", "cpu", "--model_args", "backbone={},trust_remote_code=False"],
            ["train", "--device", "cpu", "--dataset", "self", "--backbone", "{}"],
            ["prune-profile", "--device", "cpu", "--dataset", "none.jsonl", "--backbone", "{}"],
            ["exit-thresholds", "--device", "cpu", "--dataset", "none.jsonl", "--backbone", "{}"],
            ["headroom", "--device", "cpu", "--dataset", "none.jsonl", "--backbone", "{}"],
        ],
    )
    def test_is_neither_run_nor_asked_about(
        self,
        own_code: Path,
        arguments: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        tasks = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", tasks)
        monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the terminal was asked"))
        monkeypatch.chdir(tmp_path)
        assert main([argument.format(own_code) for argument in arguments]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"backbone={str(own_code)!r} needs trust_remote_code=True" in line
        assert not (own_code / "it_ran").exists()

    @pytest.mark.parametrize("value", [None, "false", False])
    def test_is_trusted_by_a_plain_word_only(self, own_code: Path, value: Any) -> None:
        with pytest.raises(UserError, match="needs trust_remote_code=True"):
            dynamax(own_code, trust_remote_code=value)
        with pytest.raises(UserError, match="trust_remote_code must be true or false, got 'maybe'"):
            dynamax(own_code, trust_remote_code="maybe")

    def test_runs_where_it_is_trusted(self, own_code: Path, model_folder: Path) -> None:
        lm = dynamax(own_code, trust_remote_code=True)
        assert type(lm.model).__name__ == "MineForCausalLM"
        assert score(lm) == pytest.approx(score(HFLM(str(model_folder), device="cpu")))

    def test_of_the_model_alone(self, own_code: Path) -> None:
        # A configuration of transformers beside a model class of the folder's own.
        classes = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
        edit(own_code, model_type="vit", auto_map=classes)
        with pytest.raises(UserError, match="needs trust_remote_code=True"):
            dynamax(own_code)

    def test_of_a_tokenizer(self, copied: Path) -> None:
        for file in copied.glob("tokenizer*"):
            file.unlink()
        settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
        (copied / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=r"the tokenizer of backbone='.*' needs trust_remote_code=True"):
            dynamax(copied)


@pytest.mark.usefixtures("no_weights")
class TestNotAModel:
    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ({"d_model": 32, "n_layer": 6, "ssm_cfg": {}}, r"a checkpoint of the package mamba_ssm .* ends in -hf"),
            ({"hidden_size": 32}, "its config.json names no model_type"),
            ({"model_type": "llama9"}, f"model type 'llama9' is not known to transformers {hf.__version__}"),
            ({"model_type": "llama", "hidden_size": "wide"}, r"its configuration could not be read \(\w+: "),
            (["no", "mapping"], "its config.json is no mapping"),
        ],
    )
    def test_configurations(self, tmp_path: Path, stored: Any, message: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match=message) as raised:
            dynamax(tmp_path)
        assert "nor a folder" not in str(raised.value)
        assert "alias" not in str(raised.value)

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("latest_checkpointed_iteration.txt", "holds a checkpoint of Megatron-LM; convert it for transformers"),
            ("iter_0000100/mp_rank_00/model_optim_rng.pt", "holds a checkpoint of Megatron-LM"),
            ("consolidated.00.pth", "holds original weights of the model's makers"),
            ("notes.txt", "has no config.json; give the folder of a saved model"),
        ],
    )
    def test_folders_of_other_programs(self, tmp_path: Path, file: str, message: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        with pytest.raises(UserError, match=message):
            dynamax(tmp_path)

    @pytest.mark.parametrize("beside_a_model", [False, True])
    def test_adapters(self, model_folder: Path, tmp_path: Path, beside_a_model: bool) -> None:
        folder = tmp_path / "adapter"
        folder.mkdir()
        if beside_a_model:  # transformers would apply it without a word
            shutil.copytree(model_folder, folder, dirs_exist_ok=True)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        with pytest.raises(UserError, match=f"is a PEFT adapter .* write backbone=owner/base,peft={folder}"):
            dynamax(folder)


REFUSED = {
    "blt": (hf.BltConfig, "'blt' does not say its number of blocks"),
    "hrm_text": (lambda: hf.HrmTextConfig(num_layers_per_stack=1), "HrmTextForCausalLM has no list of"),
    "bart": (hf.BartConfig, "'bart' is an encoder-decoder"),
    "clip": (hf.CLIPConfig, "'clip' is not a causal language model"),
}


class TestStructure:
    @pytest.mark.usefixtures("no_weights")
    @pytest.mark.parametrize("name", REFUSED)
    def test_is_judged_before_weights(self, tmp_path: Path, name: str) -> None:
        make, message = REFUSED[name]
        make().save_pretrained(tmp_path)
        with pytest.raises(UserError, match=message):
            dynamax(tmp_path, threshold=0.5)  # this policy looks for exits by a fingerprint of the weights
        with pytest.raises(UserError, match=message):
            load_to_train(tmp_path)

    @pytest.mark.usefixtures("no_weights")
    def test_decides_about_state_modes(self, tmp_path: Path) -> None:
        tiny_model("gemma3").config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="state_mode=copy is not possible on Gemma3ForCausalLM"):
            dynamax(tmp_path, confidence="softmax", threshold=0.5, state_mode="copy")

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "mamba2", "mamba", "falcon_mamba"])
    def test_is_that_of_the_loaded_model(self, family: str, tmp_path: Path) -> None:
        config = tiny_model(family).config
        before = config.to_dict()
        engine = engine_without_weights(loading.model_without_weights(config, {}), 64)
        assert engine is not None
        assert config.to_dict() == before
        loaded = dynamax(save_model(family, tmp_path), confidence="softmax").engine.backbone.cost
        ours = engine.backbone.cost
        assert [block.weights for block in ours.blocks] == [block.weights for block in loaded.blocks]
        assert [block.state_recompute for block in ours.blocks] == [block.state_recompute for block in loaded.blocks]
        assert ours.lm_head == loaded.lm_head

    def test_a_vision_tower_as_deep_as_the_text_model_is_no_decoder(self) -> None:
        text = {**tiny_model("gemma3").config.to_dict(), "num_hidden_layers": 6}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6}
        config = hf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
        with torch.device("meta"):
            model = hf.Gemma3ForConditionalGeneration(config)
        assert find_blocks(model, 6, "it") == list(model.model.language_model.layers)
        assert engine_without_weights(loading.model_without_weights(config, {}), 64) is not None

    def test_lists_of_single_layers_are_no_blocks(self) -> None:
        model = torch.nn.Module()
        model.norms = torch.nn.ModuleList(torch.nn.LayerNorm(4) for _ in range(3))
        model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
        assert find_blocks(model, 3, "it") == list(model.layers)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "/no/such/folder"}, r"^tokenizer='/no/such/folder' could not be loaded \(\w+: \S"),
        ({"tokenizer": 7}, r"^tokenizer=7 could not be loaded \(AssertionError: \S"),
        ({"backend": "foo"}, "^backend must be one of .* got 'foo'"),
        ({"device": None}, "^device must be a name"),
        ({"dtype": "float33"}, "^dtype must be one of auto, .* got 'float33'"),
        ({"dtype": "int8"}, "^dtype must be one of auto"),
        ({"softmax_dtype": "auto"}, "^softmax_dtype must be one of float16"),
        ({"mixed_precision_dtype": "nn"}, "^mixed_precision_dtype must be one of float16"),
        ({"enable_thinking": True}, "^enable_thinking=true needs think_end_token="),
        ({"chat_template_args": "short"}, "^chat_template_args must be a mapping"),
        ({"peft": "/no/such/folder"}, r"^peft='/no/such/folder' could not be read \(\w+: \S"),
    ],
)
def test_errors_name_the_argument(model_folder: Path, options: dict[str, Any], message: str) -> None:
    from dynamax_lm_eval.lm import DynamaxLM

    with pytest.raises(UserError, match=message):
        DynamaxLM(str(model_folder), threshold=1, **{"device": "cpu", **options})


def test_an_error_without_words_shows_the_code_that_raised_it() -> None:
    expected = r"^it could not be loaded \(KeyError: in test_\w+: raise KeyError\)$"
    with pytest.raises(UserError, match=expected), loading.naming("it"):
        raise KeyError
    assert loading.described(KeyError()) == "KeyError"


def test_without_a_home_folder_the_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("DYNAMAX_CACHE", "/somewhere")
    assert aliases.cache_dir() == Path("/somewhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", "~/.cache/huggingface")
    for own in ("", "~/mine"):
        monkeypatch.setenv("DYNAMAX_CACHE", own)
        with pytest.raises(UserError, match=r"no home folder .* set DYNAMAX_CACHE="):
            aliases.cache_dir()
    with pytest.raises(UserError, match="there is no home folder; write the whole path"):
        aliases.resolve_backbone("~/model")


def test_experts_that_were_trained_with_a_loss_of_their_router(tmp_path: Path) -> None:
    """``output_router_logits`` asks forward for what only a training needs, and what blocks do not hand over."""
    hf.AutoModelForCausalLM.from_config(ARCHITECTURES["experts"][1]()).save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    plain = score(dynamax(tmp_path))
    assert score(dynamax(edit(tmp_path, output_router_logits=True))) == plain
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.output_router_logits
    lm = DynamaxLM(loaded, tokenizer=str(tmp_path), device="cpu", threshold=1)
    assert score(lm) == pytest.approx(plain)


def test_learned_states_of_experts_are_judged_with_their_weights() -> None:
    """Which projections their states follow from cannot be seen without."""
    config = ARCHITECTURES["experts"][1]()
    config.dtype = torch.bfloat16  # experts are joined there without weights
    structure = loading.model_without_weights(config, {})
    draft = engine_without_weights(structure, 64)
    assert draft is not None
    draft.backbone.check_state_mode("learned", (2, 3))
