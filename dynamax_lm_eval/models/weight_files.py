"""The weight files of a model in a folder or in the Hub's cache: which there are, and the tensors in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from torch import Tensor

from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


def find_folder(source: str, options: Mapping[str, Any]) -> Path | None:
    """Returns the folder in which the files of a folder or Hub id lie; None where they are not on this machine.

    ``options``: arguments of ``from_pretrained`` that choose files (revision, subfolder, gguf_file, cache_dir).
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        name = "config.json" if not options.get("gguf_file") else str(options["gguf_file"])
        name = f"{options['subfolder']}/{name}" if options.get("subfolder") else name
        revision = str(options.get("revision") or "main")
        file = try_to_load_from_cache(source, name, cache_dir=options.get("cache_dir"), revision=revision)
        return Path(file).parent if isinstance(file, str) else None
    return folder / str(options["subfolder"]) if options.get("subfolder") else folder


def find_weight_files(folder: Path, gguf: Any) -> list[Path]:
    """Returns the files that transformers would read, in its order of preference; none where one is missing.

    ``gguf``: name of a GGUF file, where that is what is read.
    """
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


def named_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of safetensors and ``.bin`` files, mapped into memory.

    Raises:
        UserError: a file is damaged.
    """
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


def model_of_folder(folder: Path, options: Mapping[str, Any]) -> Any:
    """Returns the model that a folder's configuration describes, without weights; None where it describes none."""
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


def dequantised(folder: Path, gguf: str) -> Any:
    """Returns the model in a GGUF file, in bfloat16; None where it cannot be loaded or is not whole."""
    logger.info("Reading %s once, to know its weights again", folder / gguf)
    factory: Any = transformers.AutoModelForCausalLM
    arguments: dict[str, Any] = {"gguf_file": gguf, "dtype": torch.bfloat16, "output_loading_info": True}
    # Releases that know it may leave weights packed, for which they have kernels on some machines.
    if (configuration := getattr(transformers, "GgufConfig", None)) is not None:
        arguments["quantization_config"] = configuration(dequantize=True)
    try:
        with torch.random.fork_rng(devices=[]):
            model, information = factory.from_pretrained(folder, **arguments)
    except Exception as error:  # as in model_of_folder
        logger.debug("%s could not be loaded: %s", folder / gguf, error)
        return None
    return None if information.get("missing_keys") or information.get("mismatched_keys") else model


def _unpickled(file: Path) -> dict[str, Any]:
    """Returns a ``.bin`` file's weights, and nothing else that a pickle could hold."""
    with file.open("rb") as opened:
        mapped = opened.read(2) == b"PK"  # files of torch before 1.6 cannot be mapped
    weights: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    return weights
