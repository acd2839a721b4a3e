"""Short identities of a model: of its weights in memory, of its weight files, and of its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.config import UserError

_SAMPLES = 64
#: Bytes read at each sampled place of a file that is not safetensors.
_BLOCK = 4096
_OTHER_FILES = ("*.gguf", "pytorch_model*.bin")


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, types and up to 64 evenly spaced values of every weight and buffer.

    It tells models apart that differ by training, merging or quantisation, in a fraction of a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            digest.update(_sample(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """As weights_fingerprint, but the same in every dtype that holds the values' bfloat16 rounding.

    Exits are trained for one backbone; they fit it in whatever dtype it is loaded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(_sample(tensor).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_fingerprint(source: str, options: Mapping[str, Any]) -> str | None:
    """The same for the weight files of a folder or of a model in the Hub's cache, without loading the model.

    Args:
        source: folder or Hub id.
        options: arguments of ``from_pretrained`` that choose files (revision, subfolder, gguf_file, cache_dir).

    Returns:
        None where the files are not on this machine.
    """
    folder = _folder(source, options)
    if folder is None:
        return None
    if gguf := options.get("gguf_file"):
        return _bytes_fingerprint([folder / str(gguf)]) if (folder / str(gguf)).is_file() else None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors",) if (folder / name).is_file()]
    files = [folder / name for name in names]
    if files and all(file.is_file() for file in files):
        return tensors_fingerprint(_tensors(files))
    others = sorted(file for pattern in _OTHER_FILES for file in folder.glob(pattern))
    return _bytes_fingerprint(others) if others else None


def fetched_files_fingerprint(source: str, options: Mapping[str, Any]) -> str | None:
    """As files_fingerprint, for a model on the Hub, whose weight files are downloaded (as loading would)."""
    from huggingface_hub import snapshot_download

    if Path(source).expanduser().is_dir() or options.get("gguf_file"):
        return None
    folder = f"{options['subfolder']}/" if options.get("subfolder") else ""
    patterns = [f"{folder}{name}" for name in ("config.json", "model*.safetensors", "model.safetensors.index.json")]
    try:
        snapshot_download(
            source,
            revision=str(options.get("revision") or "main"),
            cache_dir=options.get("cache_dir"),
            token=options.get("token"),
            allow_patterns=patterns,
        )
    except (OSError, ValueError):
        return None  # loading the model will say what is wrong
    return files_fingerprint(source, options)


def model_fingerprint(model: nn.Module) -> str:
    """The same for a model that has no files: tied weights count once, buffers not at all."""
    return tensors_fingerprint(model.named_parameters())


def config_fingerprint(config: Any) -> str:
    """sha256 over a transformers configuration, without paths and versions: rope settings, windows and so on."""
    settings = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous()


def _folder(source: str, options: Mapping[str, Any]) -> Path | None:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        name = "config.json" if not options.get("gguf_file") else str(options["gguf_file"])
        name = f"{options['subfolder']}/{name}" if options.get("subfolder") else name
        revision = str(options.get("revision") or "main")
        found = try_to_load_from_cache(source, name, cache_dir=options.get("cache_dir"), revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return folder / str(options["subfolder"]) if options.get("subfolder") else folder


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} could not be loaded: {error}") from error


def _bytes_fingerprint(files: Iterable[Path]) -> str:
    """sha256 over sizes and evenly spaced blocks of files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(max(0, size - _BLOCK) * i // (_SAMPLES - 1))
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
