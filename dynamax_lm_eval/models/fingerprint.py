"""Fingerprints of a model's weights, in memory and in files.

They serve two purposes. :func:`weights_fingerprint` identifies what answered a request, by every bit of the model as it
was loaded. :class:`Fingerprints` identify the backbone that trained exits, prune profiles and certificates belong to,
before weights load and whatever dtype they load in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models import placement
from dynamax_lm_eval.models.fingerprint_cache import FingerprintFile
from dynamax_lm_eval.models.weight_files import (
    dequantised,
    find_folder,
    find_weight_files,
    model_of_folder,
    named_tensors,
)

#: Of :attr:`Fingerprints.current`. Format 1 saw samples of tensors in safetensors, and of the bytes of other files.
FORMAT = 2

#: Elements that are converted and hashed at once; bounds memory, and keeps the conversion inside the processor's cache.
_AT_ONCE = 1 << 18
_AT_ONCE_FROM_DEVICE = 1 << 24
#: What fingerprints call the LM head's weights: families' files call them otherwise than transformers, and releases of
#: transformers otherwise than each other.
_LM_HEAD = "lm_head.weight"

#: Values or blocks that format 1 looks at.
_SAMPLES = 64
#: Bytes that format 1 reads at each sampled offset of a file that is not safetensors.
_SAMPLED_BYTES = 4096
_OTHER_FILES = ("*.gguf", "pytorch_model*.bin")

#: Settings of a PEFT adapter that say where it came from, not what it computes.
_ORIGIN = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type")


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of a backbone's weights.

    They are the same in every dtype and file format that holds the values' bfloat16 rounding.

    Attributes:
        current: what this version writes: a hash over name, shape and all values, rounded to bfloat16, of every
            parameter of the model that transformers makes; tied weights count once, buffers not at all.
        former: what earlier versions wrote for the same weights (format 1).
    """

    current: str
    former: tuple[str, ...] = ()

    def check(self, backbone: str, fingerprint: str, made: str, remedy: str) -> None:
        """Raises UserError where a file belongs to other weights than these.

        Args:
            backbone: whose weights it belongs to, as its maker named it.
            fingerprint: of these, by this or an earlier version.
            made: the file and how it was made: "prune_profile='p.json' was measured on".
            remedy: what to do about it.
        """
        if fingerprint not in (self.current, *self.former):
            raise UserError(
                f"{made} other weights ({backbone!r}, fingerprint {fingerprint[:12]}, here {self.current[:12]}); "
                f"{remedy}"
            )

    def changed_by(self, what: Any) -> Fingerprints:
        """Returns fingerprints of these weights with something put on top, which no exits or profiles were made for."""
        return Fingerprints(f"{self.current} changed by {what}")

    def with_adapter(self, adapter: str) -> Fingerprints:
        """Returns fingerprints of these weights under a PEFT adapter with this :func:`adapter_fingerprint`."""
        return Fingerprints(xxhash.xxh3_128(f"{self.current}|{adapter}\n".encode()).hexdigest())


def weights_fingerprint(model: nn.Module) -> str:
    """Returns a hash over names, shapes, types and every bit of all weights and buffers, as they are now.

    Raises:
        UserError: some are not in memory.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return _of_tensors(tensors, lambda name: placement.in_memory(model, name, tensors[name]))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a hash over names, shapes, types and every bit of named tensors."""
    named = dict(tensors)
    return _of_tensors(named, named.__getitem__)


def _of_tensors(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Returns :func:`tensors_fingerprint` of tensors that are read one after the other, since all may not fit."""
    digest = xxhash.xxh3_128()
    for name in sorted(names):
        tensor = read(name)
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{_hash(name, tensor)}\n".encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Returns :attr:`Fingerprints.current` of a model in memory."""
    return model_fingerprints(model).current


def files_fingerprint(source: str, options: Mapping[str, Any]) -> str | None:
    """Returns :attr:`Fingerprints.current` of files, see :func:`files_fingerprints`."""
    fingerprints = files_fingerprints(source, options)
    return None if fingerprints is None else fingerprints.current


def model_fingerprints(model: nn.Module) -> Fingerprints:
    """Returns the fingerprints of a model in memory.

    Raises:
        UserError: some weights are not in memory.
    """
    names = _names(model)
    described, samples = {}, []
    for name, parameter in model.named_parameters():
        tensor = placement.in_memory(model, name, parameter)
        described[names[name]] = _described(name, tensor)
        samples.append((name, _samples(name, tensor)))
    return Fingerprints(_combined(described), (_sampled(samples),))


def files_fingerprints(source: str, options: Mapping[str, Any]) -> Fingerprints | None:
    """Returns the fingerprints of the weight files of a folder or of a model in the Hub's cache.

    Files whose names fit the model (safetensors or ``.bin``, in one file or in shards) are hashed where they lie. GGUF
    files are loaded, in bfloat16 on the CPU. Of quantised files what is stored is hashed, which is not what it becomes
    in memory. The result is kept in the cache folder until name, size or time of a file changes.

    Args:
        source: folder or Hub id.
        options: arguments of ``from_pretrained`` that choose files (revision, subfolder, gguf_file, cache_dir).

    Returns:
        None where the files are not on this machine, do not hold all of the model, or hold tensors that transformers
        renames, splits or joins: then only the loaded model tells, see :func:`model_fingerprints`.

    Raises:
        UserError: a file is damaged.
    """
    folder = find_folder(source, options)
    files = [] if folder is None else find_weight_files(folder, options.get("gguf_file"))
    if folder is None or not files:
        return None
    cached = FingerprintFile(folder, files, FORMAT)
    if (values := cached.read()) is not None:
        return Fingerprints(values[0], values[1:])
    fingerprints = _of_files(folder, files, options)
    if fingerprints is not None:
        cached.write(fingerprints.current, fingerprints.former)
    return fingerprints


def fetched_files_fingerprints(source: str, options: Mapping[str, Any]) -> Fingerprints | None:
    """Returns the fingerprints of a model on the Hub, whose weight files are downloaded as loading would."""
    from huggingface_hub import snapshot_download

    if Path(source).expanduser().is_dir():
        return None
    folder = f"{options['subfolder']}/" if options.get("subfolder") else ""
    formats = [["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin", "pytorch_model.bin.*"]]
    if gguf := options.get("gguf_file"):
        formats = [[str(gguf)]]
    for names in formats:
        try:
            snapshot_download(
                source,
                revision=str(options.get("revision") or "main"),
                cache_dir=options.get("cache_dir"),
                token=options.get("token"),
                allow_patterns=[f"{folder}{name}" for name in ("config.json", *names)],
            )
        except (OSError, ValueError):
            return None  # loading the model will say what is wrong
        downloaded = find_folder(source, options)
        if downloaded is not None and find_weight_files(downloaded, gguf):
            return files_fingerprints(source, options)
    return None


def adapter_fingerprint(adapter: str, revision: str = "main") -> str:
    """Returns a hash over a PEFT adapter: its settings, and its weights as :attr:`Fingerprints.current` sees weights.

    Args:
        adapter: its folder or Hub id, as ``peft=`` names it.
        revision: of a Hub id.

    Raises:
        UserError: it cannot be read.
    """
    from peft.utils import load_peft_weights
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(adapter, revision=revision)
        stored = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        tensors = load_peft_weights(adapter, device="cpu", revision=revision)
    except Exception as error:  # whatever PEFT, the Hub or the files bring up
        reason = " ".join(str(error).split())
        raise UserError(f"peft={adapter!r} could not be read ({type(error).__name__}: {reason})") from error
    # PEFT keeps names of modules as sets, and writes these in any order.
    settings = {
        name: sorted(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value
        for name, value in stored.items()
        if name not in _ORIGIN
    }
    weights = _combined({name: _described(name, tensor) for name, tensor in tensors.items()})
    return xxhash.xxh3_128(f"{json.dumps(settings, sort_keys=True)}|{weights}\n".encode()).hexdigest()


def _described(name: str, tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}|{_hash(name, tensor, rounded=True)}"


def _hash(name: str, tensor: Tensor, rounded: bool = False) -> str:
    """Returns a hash of all values of a tensor; ``rounded``: of floating point numbers, their bfloat16 rounding."""
    if tensor.device.type == "meta":
        raise UserError(
            f"the weights {name!r} are neither in memory nor offloaded by accelerate, so it cannot be told which they "
            "are; load the model whole"
        )
    digest = xxhash.xxh3_128()
    flat = tensor.detach().reshape(-1)
    at_once = _AT_ONCE if flat.device.type == "cpu" else _AT_ONCE_FROM_DEVICE
    for start in range(0, len(flat), at_once):
        part = flat[start : start + at_once]
        if rounded and part.is_floating_point():
            part = part.to(torch.bfloat16)
        values: Any = part.cpu().contiguous().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def _combined(described: Mapping[str, str]) -> str:
    digest = xxhash.xxh3_128(f"dynamax-weights-{FORMAT}\n".encode())
    for name, text in sorted(described.items()):
        digest.update(f"{name}|{text}\n".encode())
    return digest.hexdigest()


def _of_files(folder: Path, files: Collection[Path], options: Mapping[str, Any]) -> Fingerprints | None:
    """Returns the fingerprints of weight files, hashed now; None as for :func:`files_fingerprints`."""
    if options.get("gguf_file"):
        loaded = dequantised(folder, str(options["gguf_file"]))
        if loaded is None:
            return None
        fingerprints = model_fingerprints(loaded)
        return Fingerprints(fingerprints.current, (*fingerprints.former, _sampled_bytes(files)))
    model = model_of_folder(folder, options)
    if model is None:
        return None
    quantised = getattr(model.config, "quantization_config", None) is not None
    names = {name: name for name, _ in named_tensors(files)} if quantised else _parameters(model, files)
    if names is None:
        return None
    described: dict[str, str] = {}
    for name, tensor in named_tensors(files):
        if name in names:
            parameter, text = names[name], _described(name, tensor)
            # Weights that the configuration ties and the files do not are loaded untied.
            if described.setdefault(parameter, text) != text:
                return None
    if all(file.suffix == ".safetensors" for file in files):
        former = [_sampled((name, _samples(name, tensor)) for name, tensor in named_tensors(files))]
    else:
        named = {names[name]: tensor for name, tensor in named_tensors(files) if name in names}
        others = sorted(file for pattern in _OTHER_FILES for file in folder.glob(pattern))
        samples = [(name, _samples(name, tensor)) for name, tensor in named.items()]
        former = [_sampled(samples), _sampled_bytes(others)]
    return Fingerprints(_combined(described), tuple(former))


def _parameters(model: Any, files: Collection[Path]) -> dict[str, str] | None:
    """Returns the parameter of the model that each tensor in files is, by name, without buffers and what is left over.

    The answer is None where the files do not hold all parameters, under their names or those in the base model.
    """
    names = _names(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    parameter_of: dict[str, str] = {}
    others: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors(files):
        meant = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in shapes), None)
        if meant is None:
            others[name] = tuple(tensor.shape)
        elif shapes[meant] != tuple(tensor.shape):
            return None
        else:
            parameter_of[name] = names[meant]
    missing = set(names.values()) - set(parameter_of.values())
    if missing == {_LM_HEAD}:
        (shape,) = {shapes[name] for name in shapes if names[name] == _LM_HEAD}
        candidates = [name for name, other in others.items() if other == shape]
        if len(candidates) == 1:
            return {**parameter_of, candidates[0]: _LM_HEAD}
    return None if missing else parameter_of


def _names(model: nn.Module) -> dict[str, str]:
    """Returns what fingerprints call each parameter: tied weights by one name, the LM head's alike in all families."""
    head: Any = None
    if isinstance(model, transformers.PreTrainedModel):
        loaded: Any = model
        head = getattr(loaded.get_output_embeddings(), "weight", None)
        if head is getattr(loaded.get_input_embeddings(), "weight", None):
            head = None  # tied
    name_of: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = name_of.setdefault(id(parameter), _LM_HEAD if parameter is head else name)
    return names


def _sampled(samples: Iterable[tuple[str, bytes]]) -> str:
    """Returns format 1 of named tensors' samples."""
    return hashlib.sha256(b"".join(part for _, part in sorted(samples))).hexdigest()


def _samples(name: str, tensor: Tensor) -> bytes:
    """Returns what format 1 sees of a tensor: 64 to 127 evenly spaced values, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    samples = flat[:: max(1, len(flat) // _SAMPLES)].cpu().to(torch.bfloat16).contiguous()
    values = samples.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    return f"{name}|{tuple(tensor.shape)}".encode() + values


def _sampled_bytes(files: Iterable[Path]) -> str:
    """Returns format 1 of files that are not safetensors: sizes and evenly spaced blocks."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLED_BYTES) * i // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLED_BYTES))
    return digest.hexdigest()
