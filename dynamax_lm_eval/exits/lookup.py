"""Where trained exits are found: in a folder or on the Hub by name, else by the backbone that they were trained for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import FaultError, UserError
from dynamax_lm_eval.exits.checkpoint import CONFIG_NAME, WEIGHTS_NAME, ExitCheckpoint
from dynamax_lm_eval.models.aliases import HUB_ALIASES, cache_dir, shipped_dir
from dynamax_lm_eval.models.fingerprint import Fingerprints

logger = logging.getLogger(__name__)


def exits_home() -> Path:
    """Returns the user's folder of exits, where ``train`` writes by default."""
    return cache_dir() / "exits"


def shipped_home() -> Path:
    """Returns the folder of exits that come with the package."""
    return shipped_dir() / "exits"


def is_shipped(exits: ExitCheckpoint) -> bool:
    """Returns whether exits come with the package."""
    return shipped_home() in exits.path.parents


def default_folder(backbone: str, fingerprint: str) -> Path:
    """Returns the folder where ``train`` writes the exits of a backbone by default."""
    name = Path(backbone).name if Path(backbone).expanduser().is_dir() else backbone.replace("/", "--")
    return exits_home() / f"{name}-{fingerprint[:12]}"


def find(backbone: str, fingerprint: str | None, former: Collection[str] = ()) -> ExitCheckpoint | None:
    """Finds the exits of a backbone: the user's most recent ones, else those that come with the package.

    They are matched by the fingerprint of the weight files, or one that earlier versions made of
    them (``former``); where the files are not on this machine yet (None), by name.
    """
    found: ExitCheckpoint | None = None
    for directory in (exits_home(), shipped_home()):
        matching = [
            checkpoint
            for checkpoint in _readable(directory, fingerprint)
            if (
                checkpoint.config.backbone.fingerprint in (fingerprint, *former)
                if fingerprint is not None
                else _hub_id(checkpoint.config.backbone.id) == _hub_id(backbone)
            )
        ]
        if matching:
            matching.sort(key=lambda checkpoint: (checkpoint.path / CONFIG_NAME).stat().st_mtime, reverse=True)
            if len(matching) > 1:
                others = ", ".join(str(checkpoint.path) for checkpoint in matching[1:])
                logger.info("Using the newest exits, %s; there are also %s", matching[0].path, others)
            found = found or matching[0]
            if found is not matching[0]:
                logger.warning(
                    "The exits in %s hide those of the package for this backbone; name them (exits=%s), or see "
                    "dynamax-lm-eval exits",
                    found.path,
                    matching[0].path,
                )
    return found


def open_exits(name: str) -> ExitCheckpoint:
    """Opens the checkpoint of a folder, or of a Hub id (``user/name`` or ``user/name@revision``), which is downloaded.

    A name as ``dynamax-lm-eval exits`` lists them stands for the folder in the cache or in the package.

    Raises:
        UserError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ExitCheckpoint.open(folder)
    for home in (exits_home(), shipped_home()):
        if Path(name).name == name and (home / name / CONFIG_NAME).is_file():
            return ExitCheckpoint.open(home / name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"exits={name!r}: there is no such folder, no such name in dynamax-lm-eval exits, and it is not a Hub id "
            "(user/name)"
        )
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        path = snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    except (OSError, ValueError) as error:
        raise FaultError(
            f"exits={name!r} is no folder, and could not be downloaded from the Hub: {' '.join(str(error).split())}"
        ) from error
    return ExitCheckpoint.open(Path(path))


def for_run(
    args: DynamaxArgs,
    backbone_config: Any,
    fingerprints: Fingerprints | None,
    num_layers: int | None = None,
    hidden_size: int | None = None,
) -> ExitCheckpoint | None:
    """Opens the exits that a run uses: those it names, else those known for its backbone; None where it needs none.

    Args:
        args: the run's arguments.
        backbone_config: transformers' configuration of the backbone.
        fingerprints: of its weights; None where they are not on this machine yet (check them after loading).
        num_layers: blocks of the backbone; None: as its configuration says.
        hidden_size: of what runs through them, which may be several vectors per token; None: not known yet.

    Raises:
        UserError: the exits cannot be read, or do not fit the backbone.
    """
    if args.exits is not None:
        checkpoint = open_exits(args.exits)
    else:
        if not may_use_exits(args):
            return None
        current, former = (None, ()) if fingerprints is None else (fingerprints.current, fingerprints.former)
        own = find(args.backbone, current, former)
        if own is None:
            return None
        logger.debug("Using the exits in %s", own.path)
        checkpoint = own
    text = backbone_config.get_text_config()
    checkpoint.check_fits(backbone_config.model_type, hidden_size, num_layers or int(text.num_hidden_layers))
    if fingerprints is not None:
        checkpoint.check_fingerprint(fingerprints.current, args.exits_check, fingerprints.former)
    return checkpoint


def check_none(args: DynamaxArgs, backbone_config: Any, fingerprints: Fingerprints) -> None:
    """Raises UserError where there are exits for arguments that may use some, and a model was loaded without."""
    if for_run(args, backbone_config, fingerprints) is not None:
        raise UserError(
            "the model was loaded without its trained exits, because nothing was to leave through them; load it with "
            "such arguments (threshold below 1), which may change to the full model later"
        )


def may_use_exits(args: DynamaxArgs) -> bool:
    """Returns whether a run could use trained exits: not with another confidence, nor where nothing exits.

    A certificate binds the exits that it was made with, also where it certifies none of them.
    """
    if args.certificate is not None and args.confidence is None:
        return True
    if args.exits is not None or args.classifier is not None or args.confidence in ("classifier", "cascade"):
        return True
    never_exits = len(args.threshold) == 1 and args.threshold[0] >= 1 and args.prompt_exit_layer is None
    return args.confidence is None and not never_exits


def _hub_id(name: str) -> str:
    return HUB_ALIASES.get(name, name)


def _readable(directory: Path, fingerprint: str | None) -> Iterator[ExitCheckpoint]:
    """Yields the exits in a folder that can be read.

    Damaged ones are passed over, but for those that ``train`` made for this very backbone, which are an error.
    """
    for file in sorted(directory.glob(f"*/{CONFIG_NAME}")):
        try:
            yield ExitCheckpoint.open(file.parent)
        except UserError as error:
            if fingerprint is not None and file.parent.name.endswith(f"-{fingerprint[:12]}"):
                raise
            logger.warning("Not looking at these exits: %s", error)
