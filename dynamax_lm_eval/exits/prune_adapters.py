"""The file of read-outs of pruned models: for each set of pruned blocks an affine map to what the full model would say.

What comes out of the last block that runs becomes h + A h + b before norm and LM head, as at an exit with an adapter,
so that a pruned model is no worse off than exits are. Knows files and tensors; fits nothing.

D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.files import checksum, replacing, write_tensors
from dynamax_lm_eval.models.fingerprint import Fingerprints, tensors_fingerprint

_FORMAT, _VERSION = "dynamax-prune-adapters", "1"
_REMEDY = "make it: dynamax-lm-eval prune-profile --backbone ... --fit_adapters N"


@dataclass(frozen=True)
class PruneAdapters:
    """What the file says of itself.

    Attributes:
        backbone: as the user named it.
        fingerprint: that of its weights.
        num_layers: L.
        hidden_size: D.
        adapters: pruned blocks, joined by ``+`` -> fingerprint of the tensors of their read-out.
        fitted: how, on what, and how well; not needed to use it.
    """

    backbone: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    adapters: Mapping[str, str]
    fitted: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> PruneAdapters:
        """Reads what a file says of itself; raises UserError where it is missing or is no such file."""
        called = _called(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{called} cannot be read ({' '.join(str(error).split())}); {_REMEDY}") from error
        if (metadata.get("format"), metadata.get("format_version")) != (_FORMAT, _VERSION):
            raise UserError(f"{called} is not a file of dynamax-lm-eval prune-profile --fit_adapters; {_REMEDY}")
        try:
            content = json.loads(metadata["content"])
            if metadata["checksum"] != checksum(content):
                raise ValueError("its checksum is not that of its content")
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{called} is damaged ({error}); {_REMEDY}") from error

    def fingerprint_for(self, blocks: Iterable[int], path: Path) -> str:
        """Returns that of the read-out for these pruned blocks (1-based); raises UserError where ``path`` has none."""
        name = blocks_name(blocks)
        if name not in self.adapters:
            raise UserError(
                f"{_called(path)} has no read-out for a model without blocks {name}; it has some for "
                f"{', '.join(self.adapters)}; fit it: dynamax-lm-eval prune-profile --fit_adapters N"
            )
        return self.adapters[name]


def blocks_name(blocks: Iterable[int]) -> str:
    """Returns pruned blocks as the file names them: ``28+29``."""
    return "+".join(map(str, sorted(blocks)))


def load(path: Path, blocks: Iterable[int]) -> Adapter:
    """Loads the read-out for pruned blocks in float32, ready for inference.

    Raises:
        UserError: the file cannot be read, has none for them, or its tensors are not those that it was written with.
    """
    content, name = PruneAdapters.open(path), blocks_name(blocks)
    expected = content.fingerprint_for(blocks, path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {part: file.get_tensor(f"{name}.{part}") for part in ("weight", "bias")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{_called(path)} is damaged ({' '.join(str(error).split())}); {_REMEDY}") from error
    if tensors_fingerprint(tensors.items()) != expected:
        raise UserError(f"{_called(path)} is damaged: the read-out of blocks {name} was changed; {_REMEDY}")
    adapter = Adapter(content.hidden_size, None)
    adapter.up.load_state_dict(tensors)
    return adapter.requires_grad_(False).eval()


def save(path: Path, content: PruneAdapters, tensors: Mapping[str, Mapping[str, Tensor]]) -> PruneAdapters:
    """Writes a file in one step; returns what it says of itself.

    Args:
        path: of the file.
        content: what it says; its ``adapters`` are made from the tensors.
        tensors: pruned blocks as :func:`blocks_name` names them -> ``weight`` (D, D) and ``bias`` (D,), float32.
    """
    own = {item.name: getattr(content, item.name) for item in fields(content)}
    own["adapters"] = {name: tensors_fingerprint(parts.items()) for name, parts in tensors.items()}
    written = PruneAdapters(**own)
    data = asdict(written)
    metadata = {"format": _FORMAT, "format_version": _VERSION, "content": json.dumps(data), "checksum": checksum(data)}
    flat = {f"{name}.{part}": tensor.contiguous() for name, parts in tensors.items() for part, tensor in parts.items()}
    with replacing(path) as partial:
        write_tensors(partial, flat, metadata)
    return written


def check_adapters(path: str | None, fingerprints: Fingerprints | None) -> None:
    """Raises UserError where read-outs were fitted on other weights than these; either may be None, not known."""
    if path is None or fingerprints is None:
        return
    content = PruneAdapters.open(Path(path).expanduser())
    made = f"{_called(Path(path))} was fitted on"
    remedy = "fit one for this backbone: dynamax-lm-eval prune-profile --backbone ... --fit_adapters N"
    fingerprints.check(content.backbone, content.fingerprint, made, remedy)


def _called(path: Path) -> str:
    return f"prune_adapter={str(path)!r}"
