"""Short identities of a tokenizer and of configurations, by their content and not by where they come from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

#: What a configuration says of where it comes from.
_PROVENANCE = frozenset({"transformers_version", "_name_or_path", "_attn_implementation_autoset", "_commit_hash"})

#: Padding and truncation belong to a call; the version is that of the file format.
_TOKENIZER_STATE = ("padding", "truncation", "version")

#: Flags of a tokenizer, beside what is in its model: they decide how texts are encoded and decoded.
_TOKENIZER_FLAGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "split_special_tokens",
)

#: Arguments of a tokenizer that change no token: provenance, and state of a call.
_TOKENIZER_FREE = frozenset(
    {
        "name_or_path",
        "is_local",
        "local_files_only",
        "model_max_length",
        "padding_side",
        "truncation_side",
        "cache_dir",
        "token",
        "revision",
        "trust_remote_code",
        "backend",
        "tokenizer_class",
        "processor_class",
    }
)


def config_fingerprint(config: Any) -> str:
    """Returns the sha256 of a transformers configuration, without paths and versions."""
    return hashlib.sha256(json.dumps(_settings(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def generation_settings(config: Any) -> dict[str, Any]:
    """Returns what a generation configuration sets, without where it comes from."""
    return {name: value for name, value in _settings(config.to_diff_dict()).items() if not name.startswith("_")}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a hash over all that decides how a tokenizer encodes and decodes texts, wherever it lies.

    Vocabulary, merges, normalisation, post-processor, added and special tokens, and the chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for name in _TOKENIZER_STATE:
            content.pop(name, None)
    else:
        content = _slow_tokenizer(tokenizer)
    flags = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_FLAGS}
    # An unset flag and a false one are the same: they depend on how the tokenizer was made.
    content["dynamax:flags"] = [name for name, value in flags.items() if value]
    content["dynamax:special"] = getattr(tokenizer, "special_tokens_map", None)
    content["dynamax:chat_template"] = getattr(tokenizer, "chat_template", None)
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _slow_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Returns all that decides how a tokenizer written in Python works."""
    arguments = getattr(tokenizer, "init_kwargs", {})
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "added": {str(i): repr(token) for i, token in added.items()} if isinstance(added, Mapping) else None,
        "files": _vocabulary_files(tokenizer),
        "arguments": {
            name: value
            for name, value in arguments.items()
            if name not in _TOKENIZER_FREE and not name.startswith("_") and not name.endswith(("_file", "_path"))
        },
    }


def _vocabulary_files(tokenizer: Any) -> list[str]:
    """Returns hashes of the files that a tokenizer's vocabulary and merges are written to."""
    if (sentencepiece := getattr(tokenizer, "sp_model", None)) is not None:
        return [xxhash.xxh3_128(sentencepiece.serialized_model_proto()).hexdigest()]
    whole = Path(str(getattr(tokenizer, "init_kwargs", {}).get("tokenizer_path", "")))
    if whole.is_file():  # those of mistral-common
        return [xxhash.xxh3_128(whole.read_bytes()).hexdigest()]
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_vocabulary(folder)
        except (AttributeError, NotImplementedError):
            return []  # the vocabulary is all there is
        return [
            f"{file.relative_to(folder)}|{xxhash.xxh3_128(file.read_bytes()).hexdigest()}"
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        ]


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration and those inside it without provenance."""
    return {
        name: _settings(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _PROVENANCE
    }
