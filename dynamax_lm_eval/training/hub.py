"""Finished exits go to the Hugging Face Hub; whether they may is found out before the training."""

from __future__ import annotations

import logging
from pathlib import Path

from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


def create_repository(repository: str, private: bool) -> None:
    """Creates the repository, before training, so that a wrong name or token does not show at its end only.

    Raises:
        UserError: the Hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=private, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--push_to_hub {repository!r}: {' '.join(str(error).split())}") from error


def push(folder: Path, repository: str) -> None:
    """Uploads the exits of a folder.

    Raises:
        UserError: the Hub refuses; the exits stay in the folder.
    """
    from huggingface_hub import HfApi

    try:
        url = HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["state/*", ".*"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"the exits are trained and in {folder}, but could not be uploaded ({' '.join(str(error).split())}); try "
            f"again with: hf upload {repository} {folder}"
        ) from error
    logger.info("Pushed to %s", url)
