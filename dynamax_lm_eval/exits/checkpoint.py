"""Exit checkpoints: a folder with ``config.json`` and ``exits.safetensors``, how it is written, found and checked.

One checkpoint holds one or more kinds of classifiers for one backbone. Its configuration says what it was
trained for, so that what does not fit is refused before weights load. Knows files; knows no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from dynamax_lm_eval.errors import UserError, changed_settings
from dynamax_lm_eval.exits.adapters import check_adapter
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.state_maps import StateMapOptions, check_state_maps
from dynamax_lm_eval.files import JsonFormat, file_checksum, naming, write_tensors, write_text
from dynamax_lm_eval.models.fingerprint import tensors_fingerprint
from dynamax_lm_eval.types import ClassifierKind, LabelKind

logger = logging.getLogger(__name__)

FORMAT = JsonFormat(
    name="dynamax-exits",
    version=1,
    what="an exit checkpoint",
    remedy="train exits again, or have the folder again",
    by_hand=True,
)
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "exits.safetensors", "README.md"
#: The key of the weights' checksum in the configuration's file.
_WEIGHTS_CHECKSUM = "weights_checksum"


@dataclass(frozen=True)
class BackboneIdentity:
    """The backbone that exits belong to."""

    #: As the user named it; an alias, a Hub id or a folder's name.
    id: str
    revision: str
    model_type: str
    hidden_size: int
    num_layers: int
    #: The fingerprint of its weight files, the same in every dtype (``models.fingerprint``).
    fingerprint: str


@dataclass(frozen=True)
class ExitConfig:
    """The configuration of a checkpoint: what it says of itself."""

    backbone: BackboneIdentity
    exit_layers: tuple[int, ...]
    #: Kinds in the order of preference: the first is used unless the user names another.
    classifiers: tuple[str, ...]
    activation: str
    options: ClassifierOptions = field(default_factory=ClassifierOptions)
    #: Block L runs after an exit, before norm and LM head.
    final_block: bool = False
    #: Correction of the read-outs at exits: ``none``, ``affine`` or ``lowrank:R``.
    adapter: str = "none"
    #: Maps that predict the states of tokens that left; None: there are none.
    states: StateMapOptions | None = None
    #: They have what confirms proposals by the classifier and the read-out together.
    confirms: bool = False
    #: Label 1: the exit's arg-max is among the k most probable tokens of the full model, or the other way round.
    top_k: int = 1
    label: LabelKind = "exit_in_full"
    #: With a final block: labels were made of read-outs behind it; else of the state at the exit.
    label_final_block: bool = True
    #: How it was trained; not needed to use it.
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def serves_every_confidence(self) -> bool:
        """Whether these exits have something that training-free confidences use as well, where exits are named."""
        return self.adapter != "none" or self.states is not None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT.name, "format_version": FORMAT.version, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitConfig:
        """Reads and checks a configuration.

        Args:
            data: as :meth:`to_json` gives it, without format and version.

        Raises:
            UserError: it is no such configuration.
        """
        fields = dict(data)
        try:
            fields["backbone"] = BackboneIdentity(**fields["backbone"])
            fields["options"] = ClassifierOptions(**fields["options"])
            for name in ("exit_layers", "classifiers"):
                fields[name] = tuple(fields[name])
            if (states := fields.get("states")) is not None:
                fields["states"] = StateMapOptions(states["kind"], tuple((int(i), int(o)) for i, o in states["sizes"]))
            config = cls(**fields)
            config.check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"its configuration is damaged ({error})") from error
        return config

    def check(self) -> None:
        """Raises UserError where the configuration contradicts itself or asks for what does not exist."""
        if not isinstance(self.backbone.fingerprint, str):
            raise UserError("its fingerprint is not a text")
        for name in ("final_block", "confirms"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"its {name} is not true or false")
        if self.confirms and self.final_block:
            raise UserError("it has both final_block and confirms, which exclude each other")
        layers, depth = self.exit_layers, self.backbone.num_layers
        if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] < depth:
            raise UserError(f"its exit_layers {list(layers)} are not rising numbers in 1..{depth - 1}")
        kinds = get_args(ClassifierKind)
        if not self.classifiers or not set(self.classifiers) <= set(kinds):
            raise UserError(f"its classifiers {list(self.classifiers)} are not some of {', '.join(kinds)}")
        if self.activation not in ACT2FN:
            raise UserError(f"its activation {self.activation!r} is unknown to transformers")
        check_adapter(self.adapter)
        if self.label not in get_args(LabelKind):
            raise UserError(f"its label {self.label!r} is not one of {', '.join(get_args(LabelKind))}")
        if self.states is not None:
            check_state_maps(self.states.kind)
            if len(self.states.sizes) != depth or not any(min(size) > 0 for size in self.states.sizes):
                raise UserError(f"its states have no sizes for each of {depth} blocks")

    def build(self, seed: int = 0) -> ExitClassifiers:
        """Makes the modules, freshly initialised."""
        return ExitClassifiers(
            self.classifiers,
            self.exit_layers,
            self.backbone.hidden_size,
            self.activation,
            self.options,
            seed,
            self.adapter,
            self.states,
            self.confirms,
        )


@dataclass(frozen=True)
class ExitCheckpoint:
    """A checkpoint on disk whose configuration was read; its weights are read by :meth:`load`."""

    path: Path
    config: ExitConfig
    #: The checksum of the weights' file; None where the configuration does not say.
    weights_checksum: str | None = None

    @classmethod
    def open(cls, path: Path) -> ExitCheckpoint:
        """Reads the configuration of the checkpoint in a folder.

        Raises:
            UserError: the folder holds no checkpoint, or one that cannot be read.
        """
        file, called = path / CONFIG_NAME, f"exits={str(path)!r}"
        if not file.is_file():
            raise UserError(f"{called}: there is no {CONFIG_NAME} in that folder")
        data = FORMAT.read(file, f"{called}: {CONFIG_NAME}")
        weights_checksum = data.pop(_WEIGHTS_CHECKSUM, None)
        try:
            return cls(path, ExitConfig.from_json(data), weights_checksum)
        except UserError as error:
            raise UserError(f"{called} cannot be used: {' '.join(str(error).split())}") from error

    def load(self, device: torch.device | str = "cpu") -> ExitClassifiers:
        """Loads the classifiers in float32, ready for inference.

        Raises:
            UserError: the weights are missing, damaged, or not those of the configuration.
        """
        file = self.path / WEIGHTS_NAME
        self._check_weights(file)
        modules = self.config.build()
        try:
            tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
            modules.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"exits={str(self.path)!r}: {WEIGHTS_NAME} cannot be used: {reason}") from error
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"exits={str(self.path)!r}: {WEIGHTS_NAME} cannot be used: {', '.join(sorted(broken)[:3])} "
                f"({len(broken)} of {len(tensors)} tensors) hold values that are not finite; train these exits again"
            )
        return modules.requires_grad_(False).eval().to(device)

    def _check_weights(self, file: Path) -> None:
        """Compares the file of the weights with the configuration before anything of their size is made."""
        called = f"exits={str(self.path)!r}: {WEIGHTS_NAME} cannot be used"
        try:
            with torch.device("meta"):
                expected = {name: list(tensor.shape) for name, tensor in self.config.build().state_dict().items()}
            with safe_open(file, framework="pt") as opened:
                stored = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
            changed = self.weights_checksum is not None and file_checksum(file) != self.weights_checksum
        except (OSError, SafetensorError, RuntimeError, OverflowError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{called} ({reason}); {FORMAT.remedy}") from error
        if different := changed_settings(stored, expected):
            raise UserError(
                f"{called}: its tensors are not of the sizes that {CONFIG_NAME} asks for: {different[:300]}"
            )
        if changed:
            raise UserError(
                f"{called}: it is damaged, or was changed after it was written (its checksum is not that in "
                f"{CONFIG_NAME}); {FORMAT.remedy}"
            )

    def trained_on(self, documents: Collection[str]) -> int:
        """Returns how many documents of tasks, known by the harness's hashes, gave prompts to the training."""
        return len(set(self.config.training.get("prompt_documents", ())).intersection(documents))

    def fingerprint(self) -> str:
        """Returns the identity of the classifiers' weights, whatever dtype they are stored in."""
        tensors = load_file(self.path / WEIGHTS_NAME)
        return tensors_fingerprint((name, tensor.float()) for name, tensor in tensors.items())

    def check_fits(self, model_type: str, hidden_size: int | None, num_layers: int) -> None:
        """Raises UserError where the checkpoint was trained for a backbone of another shape; None: not known."""
        trained = self.config.backbone
        for what, theirs, ours in (
            ("hidden size", trained.hidden_size, hidden_size),
            ("number of blocks", trained.num_layers, num_layers),
            ("architecture", trained.model_type, model_type),
        ):
            if ours is not None and theirs != ours:
                raise UserError(
                    f"exits={str(self.path)!r} do not fit this backbone: {what} is {theirs!r} there and {ours!r} here; "
                    f"they were trained for {trained.id!r}"
                )

    def check_fingerprint(self, fingerprint: str, strict: bool = True, former: Collection[str] = ()) -> None:
        """Raises UserError where the checkpoint was trained for other weights; warns if not ``strict``.

        ``former``: the fingerprints that earlier versions made of the same weights.
        """
        trained = self.config.backbone
        if trained.fingerprint in (fingerprint, *former):
            return
        problem = (
            f"exits={str(self.path)!r} were trained for other weights ({trained.id!r}, fingerprint "
            f"{trained.fingerprint[:12]}, here {fingerprint[:12]})"
        )
        if strict:
            raise UserError(
                f"{problem}; train exits for this backbone, or add exits_check=false to use them all the same"
            )
        logger.warning("%s; they are used because of exits_check=false", problem)


def save(
    folder: Path,
    config: ExitConfig,
    modules: ExitClassifiers,
    files: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExitCheckpoint:
    """Writes a checkpoint as a whole: its weights first, and last its configuration, which readers look for."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in modules.state_dict().items()}
    partial = folder / f".{WEIGHTS_NAME}.partial"
    partial.unlink(missing_ok=True)
    write_tensors(partial, tensors, {"format": "pt"})
    weights_checksum = file_checksum(partial)
    partial.replace(folder / WEIGHTS_NAME)
    for name, text in (files or {}).items():
        with naming(folder / name):
            write_text(folder / name, text)
    FORMAT.write(folder / CONFIG_NAME, {**config.to_json(), _WEIGHTS_CHECKSUM: weights_checksum})
    return ExitCheckpoint(folder, config, weights_checksum)
