"""Fingerprints: equal for the same weights and tokenizer wherever they lie, and changed by everything that counts."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import FAMILIES, tiny_model, train_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import processors

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.models import aliases, fingerprint
from dynamax_lm_eval.models.fingerprint import (
    files_fingerprint,
    files_fingerprints,
    model_fingerprint,
    model_fingerprints,
    tensors_fingerprint,
    weights_fingerprint,
)
from dynamax_lm_eval.models.identity import generation_settings, tokenizer_fingerprint


def test_the_fingerprint_of_files_is_that_of_the_weights_in_any_dtype(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model("qwen2")).to(torch.bfloat16)
    expected = model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        assert files_fingerprint(str(tmp_path / str(dtype)), {}) == expected
    assert model_fingerprint(tiny_model("qwen3")) != expected
    assert files_fingerprint("nobody/nothing", {}) is None


def test_fingerprint_tells_weights_apart() -> None:
    import copy

    model = tiny_model("llama")
    other = copy.deepcopy(model)
    assert weights_fingerprint(model) == weights_fingerprint(other)
    other.model.layers[3].mlp.down_proj.weight.data *= 1.01
    assert weights_fingerprint(model) != weights_fingerprint(other)


#: What format 1 gave for the backbones that come with the package.
FORMER = {
    "tiny-llama": "3d5f499802b26a0e24507c6bb071a860080a50ea0fbdfa1ac9fc1029b2efcf16",
    "tiny-mamba2": "44d6fb4fab071749f64db70a19db2262c1fa6ba05011c4d9a76663baf48cf618",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fingerprints"


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_known_by_what_they_become_in_memory(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert files_fingerprint(str(tmp_path), {}) == model_fingerprint(tiny_model(family))


def _bin(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer that old files hold
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _old_bin(folder: Path) -> None:
    torch.save(
        load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folder / "model.safetensors").unlink()


def _shards(folder: Path) -> None:
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "x", max_shard_size="20KB")
    assert len(list((folder / "x").glob("model-*.safetensors"))) > 2
    (folder / "model.safetensors").unlink()
    for file in (folder / "x").iterdir():
        shutil.move(file, folder / file.name)


def _bin_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def _renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("change", [_bin, _old_bin, _shards, _bin_shards, _renamed])
def test_every_format_of_files_gives_the_same(change: Callable[[Path], None], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path)
    found = files_fingerprints(str(tmp_path), {})
    assert found is not None
    assert found.current == model_fingerprint(hf.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert found.current == model_fingerprint(tiny_model("llama"))


def test_gguf_files_are_known_by_their_values(tmp_path: Path, cache: Path) -> None:
    import gguf

    tiny_model("llama").save_pretrained(tmp_path)
    config, writer = tiny_model("llama").config, gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("m")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tiny_model("llama").state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if count := heads.get(name.split(".")[-2]):  # as llama.cpp orders them for its rotary angles
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert files_fingerprint(str(tmp_path), {"gguf_file": "m.gguf"}) == model_fingerprint(tiny_model("llama"))


def test_tied_weights_count_once_wherever_they_are_stored(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.tie_word_embeddings = True
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    expected = model_fingerprint(model)
    assert files_fingerprint(str(tmp_path), {}) == expected
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert files_fingerprint(str(tmp_path), {}) == expected
    # Tied in the configuration only: transformers does not tie them, so only the loaded model tells.
    save_file({**tensors, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    assert files_fingerprint(str(tmp_path), {}) is None


def test_files_that_do_not_hold_the_whole_model_have_none(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert files_fingerprint(str(tmp_path), {}) is None
    (tmp_path / "model.safetensors").unlink()
    assert files_fingerprint(str(tmp_path), {}) is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=name):
        files_fingerprint(str(tmp_path), {})


def test_one_changed_value_of_any_tensor_is_seen() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    seen = {(model_fingerprint(model), weights_fingerprint(model))}
    count = 0
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        place = 1 + (len(flat) // 64) * 3 if len(flat) >= 128 else 1  # between the samples of format 1
        before = flat[place].clone()
        flat[place] += 1
        seen.add((model_fingerprint(model), weights_fingerprint(model)))
        flat[place] = before
        count += 1
    assert len({current for current, _ in seen}) == len({exact for _, exact in seen}) == 1 + count
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama"))


def test_what_answered_is_told_exactly_and_what_exits_fit_by_rounding() -> None:
    model = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    fits, exact = model_fingerprint(model), weights_fingerprint(model)
    assert model_fingerprint(model.float()) == fits
    assert weights_fingerprint(model) != exact, "another dtype answers otherwise"
    exact = weights_fingerprint(model)
    model.model.norm.weight.data[3] *= 1 + 1e-6
    assert model_fingerprint(model) == fits
    assert weights_fingerprint(model) != exact


def test_buffers_that_are_saved_decide_answers_too() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.register_buffer("scale", torch.ones(3))
    exact, fits = weights_fingerprint(model), model_fingerprint(model)
    model.scale[1] = 2
    assert weights_fingerprint(model) != exact
    assert model_fingerprint(model) == fits == model_fingerprint(tiny_model("llama"))


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with pytest.raises(UserError, match=r"'lm_head\.weight' are neither in memory nor offloaded"):
        weights_fingerprint(copy.deepcopy(tiny_model("llama")).to("meta"))


def test_every_value_of_all_sizes_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors longer than what is hashed at once, views with gaps, scalars, and none at all."""
    monkeypatch.setattr(fingerprint, "_AT_ONCE", 16)
    long = torch.arange(101.0)
    whole = tensors_fingerprint([("a", long)])
    assert tensors_fingerprint([("a", torch.stack([long, long], 1)[:, 1])]) == whole
    for place in (0, 15, 16, 100):
        changed = long.clone()
        changed[place] += 0.5
        assert tensors_fingerprint([("a", changed)]) != whole
    others = [long.reshape(1, 101), long.double(), torch.tensor(1.0), torch.ones(0), torch.ones(3, dtype=torch.bool)]
    assert len({tensors_fingerprint([("a", tensor)]) for tensor in others}) == len(others)


@pytest.mark.parametrize("name", sorted(FORMER))
def test_shipped_exits_and_those_of_earlier_versions_are_found(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = aliases.shipped_backbones()[name]
    found = files_fingerprints(str(folder), {})
    assert found is not None
    shipped = lookup.find("another name", found.current)
    assert shipped is not None and shipped.path == lookup.shipped_home() / name
    assert found.former == (FORMER[name],)
    assert model_fingerprints(hf.AutoModelForCausalLM.from_pretrained(folder)) == found
    # Exits that a user trained with an earlier version.
    shutil.copytree(shipped.path, cache.parent / "exits" / "own")
    config = cache.parent / "exits" / "own" / "config.json"
    stored = json.loads(config.read_text().replace(found.current, FORMER[name]))
    del stored["checksum"]  # earlier versions wrote none
    config.write_text(json.dumps(stored))
    own = lookup.find("another name", found.current, found.former)
    assert own is not None and own.path == config.parent
    own.check_fingerprint(found.current, former=found.former)
    with pytest.raises(UserError, match="trained for other weights"):
        own.check_fingerprint(found.current)
    args = DynamaxArgs(name, threshold=(0.5,))
    known = lookup.for_run(args, hf.AutoConfig.from_pretrained(folder), found)
    assert known is not None and known.path == config.parent


class TestKept:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Files that were not written just now."""
        tiny_model("llama").save_pretrained(tmp_path / "m")
        self.age(tmp_path / "m", 100)
        return tmp_path / "m"

    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        of_files = fingerprint._of_files
        monkeypatch.setattr(fingerprint, "_of_files", lambda *given: (calls.append(given), of_files(*given))[1])
        return calls

    def age(self, folder: Path, seconds: int) -> None:
        for file in folder.iterdir():
            moment = file.stat().st_mtime_ns - seconds * 10**9
            os.utime(file, ns=(moment, moment))

    def test_weights_are_read_once(self, folder: Path, cache: Path, hashed: list[Any]) -> None:
        first = files_fingerprints(str(folder), {})
        assert files_fingerprints(str(folder), {}) == first
        assert len(hashed) == 1
        assert len(list(cache.iterdir())) == 1

    def test_a_change_of_time_or_size_is_seen(self, folder: Path, cache: Path, hashed: list[Any]) -> None:
        first = files_fingerprint(str(folder), {})
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][5, 5] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.age(folder, 50)
        changed = files_fingerprint(str(folder), {})
        assert changed != first
        saved = (folder / "model.safetensors").stat()
        tensors["lm_head.weight"][5, 5] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "longer": "x"})
        os.utime(folder / "model.safetensors", ns=(saved.st_mtime_ns, saved.st_mtime_ns))
        assert files_fingerprint(str(folder), {}) not in (first, changed)
        assert len(hashed) == 3

    def test_files_that_may_still_change_are_not_kept(self, folder: Path, cache: Path, hashed: list[Any]) -> None:
        (folder / "model.safetensors").touch()
        assert files_fingerprint(str(folder), {}) == files_fingerprint(str(folder), {})
        assert len(hashed) == 2

    @pytest.mark.parametrize("damage", ["", "{", "[1]", '{"format": 2}', '{"format": 1, "files": {}}'])
    def test_a_damaged_file_counts_as_none_and_is_written_again(
        self, folder: Path, cache: Path, hashed: list[Any], damage: str
    ) -> None:
        first = files_fingerprints(str(folder), {})
        (kept,) = cache.iterdir()
        whole = kept.read_text()
        kept.write_text(damage)
        assert files_fingerprints(str(folder), {}) == first
        assert len(hashed) == 2
        assert kept.read_text() == whole

    def test_a_cache_that_cannot_be_written_does_no_harm(self, folder: Path, cache: Path) -> None:
        cache.parent.write_text("a file where the folder should be")
        assert files_fingerprint(str(folder), {}) == model_fingerprint(tiny_model("llama"))


class TestTokenizer:
    def test_another_place_or_use_changes_nothing(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer()
        before = tokenizer_fingerprint(tokenizer)
        for place in ("a", "b"):
            tokenizer.save_pretrained(tmp_path / place)
            assert tokenizer_fingerprint(hf.AutoTokenizer.from_pretrained(tmp_path / place)) == before
        tokenizer(["The quick", "brown"], padding=True, truncation=True, max_length=2)
        tokenizer.padding_side, tokenizer.model_max_length = "left", 7
        assert tokenizer_fingerprint(tokenizer) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: setattr(
                t.backend_tokenizer,
                "post_processor",
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ),
            lambda t: t.add_tokens(["brown fox"]),
            lambda t: setattr(t, "bos_token", "</s>"),
            lambda t: setattr(t, "chat_template", "{{ messages }}"),
            lambda t: setattr(t, "clean_up_tokenization_spaces", True),
            lambda t: setattr(t.backend_tokenizer.pre_tokenizer, "add_prefix_space", True),
        ],
        ids=["post-processor", "added token", "bos", "chat template", "clean up", "prefix space"],
    )
    def test_what_changes_texts_or_tokens_is_seen(self, change: Callable[[Any], Any]) -> None:
        tokenizer = train_tokenizer()
        before = tokenizer_fingerprint(tokenizer)
        change(tokenizer)
        assert tokenizer_fingerprint(tokenizer) != before

    def test_vocabularies_of_the_same_size(self) -> None:
        tokenizer, other = train_tokenizer(), train_tokenizer()
        model = json.loads(other.backend_tokenizer.to_str())
        model["model"]["merges"] = model["model"]["merges"][::-1]
        other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(model))
        assert len(tokenizer) == len(other)
        assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)

    def test_tokenizers_that_are_written_in_python(self, tmp_path: Path) -> None:
        def made(folder: Path, merges: str) -> Any:
            folder.mkdir()
            (folder / "vocab.json").write_text(json.dumps({"a": 0, "b</w>": 1, "a b</w>": 2, "<unk>": 3}))
            (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
            return hf.CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

        one = tokenizer_fingerprint(made(tmp_path / "one", "a b</w>"))
        assert tokenizer_fingerprint(made(tmp_path / "same", "a b</w>")) == one
        assert tokenizer_fingerprint(made(tmp_path / "other", "b a</w>")) != one
        assert tokenizer_fingerprint(hf.ByT5Tokenizer()) != tokenizer_fingerprint(hf.ByT5Tokenizer(extra_ids=7))


def test_generation_settings_say_nothing_of_where_they_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.GenerationConfig(repetition_penalty=1.3, eos_token_id=[2, 5])
    config._from_model_config, config.transformers_version = True, "9.9.9"
    assert generation_settings(config) == {"repetition_penalty": 1.3, "eos_token_id": [2, 5]}
