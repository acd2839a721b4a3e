"""Short identities of a model: of its weights in memory and in files, of its tokenizer, and of its configurations.

Two questions are asked of weights. What answered a request is told by :func:`weights_fingerprint`, over every bit of
the model as it was loaded. Which backbone trained exits, prune profiles and certificates belong to is told by
:class:`Fingerprints`, before weights load and whatever dtype they load in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.models.aliases import cache_dir

logger = logging.getLogger(__name__)

#: Of :attr:`Fingerprints.current`. Format 1 saw samples of tensors in safetensors, and of the bytes of other files.
FORMAT = 2

#: Elements that are converted and hashed at once; bounds memory, and keeps the conversion inside the processor's cache.
_AT_ONCE = 1 << 18
_AT_ONCE_FROM_DEVICE = 1 << 24
#: Some families' files call it otherwise than transformers, and releases of transformers otherwise than each other.
_LM_HEAD = "lm_head.weight"
#: A file that changed this shortly before it was looked at may change again without another time stamp.
_SETTLED_NS = 2_000_000_000


# Format 1.
_SAMPLES = 64
#: Bytes read at each sampled place of a file that is not safetensors.
_BLOCK = 4096
_OTHER_FILES = ("*.gguf", "pytorch_model*.bin")


@dataclass(frozen=True)
class Fingerprints:
    """Of a backbone's weights, the same in every dtype and file format that hold the values' bfloat16 rounding.

    Attributes:
        current: what this version writes: over the name, shape and all values, rounded to bfloat16, of every parameter
            of the model that transformers makes; tied weights count once, buffers not at all.
        former: what earlier versions wrote for the same weights (format 1).
    """

    current: str
    former: tuple[str, ...] = ()

    def changed_by(self, what: Any) -> Fingerprints:
        """Of these weights with something put on top, which is nothing that anything was made for."""
        return Fingerprints(f"{self.current} changed by {what}")


def weights_fingerprint(model: nn.Module) -> str:
    """Hash over names, shapes, types and every bit of all weights and buffers, as they are now.

    Raises:
        UserError: some are not in memory.
    """
    return tensors_fingerprint(item for item in model.state_dict().items() if isinstance(item[1], Tensor))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash over names, shapes, types and every bit of named tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{_hash(name, tensor)}\n".encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """:attr:`Fingerprints.current` of a model in memory."""
    return model_fingerprints(model).current


def files_fingerprint(source: str, options: Mapping[str, Any]) -> str | None:
    """:attr:`Fingerprints.current` of files, see :func:`files_fingerprints`."""
    found = files_fingerprints(source, options)
    return None if found is None else found.current


def model_fingerprints(model: nn.Module) -> Fingerprints:
    """Of a model in memory.

    Raises:
        UserError: some weights are not in memory.
    """
    names = _names(model)
    described = {names[name]: _described(name, parameter) for name, parameter in model.named_parameters()}
    return Fingerprints(_combined(described), (_sampled(model.named_parameters()),))


def files_fingerprints(source: str, options: Mapping[str, Any]) -> Fingerprints | None:
    """The same for the weight files of a folder or of a model in the Hub's cache.

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
    folder = _folder(source, options)
    files = [] if folder is None else _weight_files(folder, options.get("gguf_file"))
    if folder is None or not files:
        return None
    state = _state([*files, folder / "config.json"])
    kept = _kept_at(folder, files)
    if (known := _recall(kept, state)) is not None:
        return known
    seen = time.time_ns()
    found = _of_files(folder, files, options)
    if found is not None and all(changed + _SETTLED_NS < seen for _, changed in state.values()):
        _keep(kept, state, found)
    return found


def fetched_files_fingerprints(source: str, options: Mapping[str, Any]) -> Fingerprints | None:
    """As files_fingerprints, for a model on the Hub, whose weight files are downloaded (as loading would)."""
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
        found = _folder(source, options)
        if found is not None and _weight_files(found, gguf):
            return files_fingerprints(source, options)
    return None


def _described(name: str, tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}|{_hash(name, tensor, rounded=True)}"


def _hash(name: str, tensor: Tensor, rounded: bool = False) -> str:
    """Of all values of a tensor; ``rounded``: of their bfloat16 rounding where they are floating point numbers."""
    if tensor.device.type == "meta":
        raise UserError(
            f"the weights {name!r} are not in memory (offloaded), so it cannot be told which they are; load the model "
            "without offloading"
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


def _weight_files(folder: Path, gguf: Any) -> list[Path]:
    """The files that transformers would read, in its order of preference; none where one is missing."""
    if gguf:
        return [folder / str(gguf)] if (folder / str(gguf)).is_file() else []
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} could not be read: {' '.join(str(error).split())}") from error
            files = [folder / str(shard) for shard in shards]
            return files if all(file.is_file() for file in files) else []
    return []


def _of_files(folder: Path, files: Collection[Path], options: Mapping[str, Any]) -> Fingerprints | None:
    if options.get("gguf_file"):
        loaded = _dequantised(folder, str(options["gguf_file"]))
        if loaded is None:
            return None
        found = model_fingerprints(loaded)
        return Fingerprints(found.current, (*found.former, _sampled_bytes(files)))
    model = _skeleton(folder, options)
    if model is None:
        return None
    quantised = getattr(model.config, "quantization_config", None) is not None
    names = {name: name for name, _ in _tensors(files)} if quantised else _parameters(model, files)
    if names is None:
        return None
    described: dict[str, str] = {}
    for name, tensor in _tensors(files):
        if name in names:
            parameter, text = names[name], _described(name, tensor)
            # Weights that the configuration ties and the files do not are loaded untied.
            if described.setdefault(parameter, text) != text:
                return None
    if all(file.suffix == ".safetensors" for file in files):
        former = [_sampled(_tensors(files))]
    else:
        named = {names[name]: tensor for name, tensor in _tensors(files) if name in names}
        others = sorted(file for pattern in _OTHER_FILES for file in folder.glob(pattern))
        former = [_sampled(named.items()), _sampled_bytes(others)]
    return Fingerprints(_combined(described), tuple(former))


def _skeleton(folder: Path, options: Mapping[str, Any]) -> Any:
    """The model that the folder's configuration describes, without weights; None where it describes none."""
    trusted = bool(options.get("trust_remote_code"))
    factory: Any = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = factory.from_config(config, trust_remote_code=trusted)
        model.tie_weights()
    except Exception as error:  # whatever a model's code may raise; loading the weights will say what is wrong
        logger.debug("no model could be made of %s: %s", folder, error)
        return None
    return model


def _parameters(model: Any, files: Collection[Path]) -> dict[str, str] | None:
    """The parameter of the model that each tensor in files is, by name; without buffers and what is left over.

    None where the files do not hold all parameters, under their names or those in the base model.
    """
    names = _names(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    others: dict[str, tuple[int, ...]] = {}
    for name, tensor in _tensors(files):
        meant = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in shapes), None)
        if meant is None:
            others[name] = tuple(tensor.shape)
        elif shapes[meant] != tuple(tensor.shape):
            return None
        else:
            found[name] = names[meant]
    missing = set(names.values()) - set(found.values())
    if missing == {_LM_HEAD}:
        (shape,) = {shapes[name] for name in shapes if names[name] == _LM_HEAD}
        candidates = [name for name, other in others.items() if other == shape]
        if len(candidates) == 1:
            return {**found, candidates[0]: _LM_HEAD}
    return None if missing else found


def _names(model: nn.Module) -> dict[str, str]:
    """What fingerprints call each parameter: tied weights by one name, those of the LM head alike in all families."""
    head: Any = None
    if isinstance(model, transformers.PreTrainedModel):
        loaded: Any = model
        head = getattr(loaded.get_output_embeddings(), "weight", None)
        if head is getattr(loaded.get_input_embeddings(), "weight", None):
            head = None  # tied
    known: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = known.setdefault(id(parameter), _LM_HEAD if parameter is head else name)
    return names


def _dequantised(folder: Path, gguf: str) -> Any:
    """The model in a GGUF file, in bfloat16; None where it cannot be loaded or is not whole."""
    logger.info("Reading %s once, to know its weights again", folder / gguf)
    factory: Any = transformers.AutoModelForCausalLM
    chosen: dict[str, Any] = {"gguf_file": gguf, "dtype": torch.bfloat16, "output_loading_info": True}
    # Releases that know it may leave weights packed, for which they have kernels on some machines.
    if (configuration := getattr(transformers, "GgufConfig", None)) is not None:
        chosen["quantization_config"] = configuration(dequantize=True)
    try:
        with torch.random.fork_rng(devices=[]):
            model, information = factory.from_pretrained(folder, **chosen)
    except Exception as error:  # as in _skeleton
        logger.debug("%s could not be loaded: %s", folder / gguf, error)
        return None
    return None if information.get("missing_keys") or information.get("mismatched_keys") else model


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of safetensors and ``.bin`` files, mapped into memory."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a mapping
                        yield name, opened.get_tensor(name)
            else:
                yield from ((name, t) for name, t in _unpickled(file).items() if isinstance(t, Tensor))
        except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{file} could not be loaded: {' '.join(str(error).split())[:300]}") from error


def _unpickled(file: Path) -> dict[str, Any]:
    """A ``.bin`` file's weights, and nothing else that a pickle could hold."""
    with file.open("rb") as opened:
        mapped = opened.read(2) == b"PK"  # files of torch before 1.6 cannot be mapped
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    return found


def _state(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each of these files that is there."""
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}


def _kept_at(folder: Path, files: Iterable[Path]) -> Path:
    """The file in the cache folder that keeps the fingerprints of these."""
    folder = folder.resolve()
    names = "\n".join([str(folder), *(file.name for file in files)])
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in folder.name)[:60]
    return cache_dir() / "fingerprints" / f"{name}-{xxhash.xxh3_64(names.encode()).hexdigest()}.json"


def _recall(kept: Path, state: Mapping[str, tuple[int, int]]) -> Fingerprints | None:
    """What was kept, if it is of files in this state; a file that cannot be read counts as none."""
    try:
        data = json.loads(kept.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["files"] != {name: list(values) for name, values in state.items()}:
            return None
        current, former = data["current"], data["former"]
        if not all(isinstance(value, str) for value in (current, *former)):
            return None
        return Fingerprints(current, tuple(former))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(kept: Path, state: Mapping[str, tuple[int, int]], found: Fingerprints) -> None:
    data = {"format": FORMAT, "files": state, "current": found.current, "former": found.former}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        logger.debug("%s could not be written, weights will be read again: %s", kept, error)


def _sampled(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Format 1 of named tensors: 64 to 127 evenly spaced values of each, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, len(flat) // _SAMPLES)].cpu().to(torch.bfloat16).contiguous()
        digest.update(chosen.view(torch.uint8).numpy().tobytes() if len(flat) else b"")
    return digest.hexdigest()


def _sampled_bytes(files: Iterable[Path]) -> str:
    """Format 1 of files that are not safetensors: sizes and evenly spaced blocks."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(max(0, size - _BLOCK) * i // (_SAMPLES - 1))
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
