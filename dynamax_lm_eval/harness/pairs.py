"""``name=value`` pairs and JSON, parsed as the harness's own command line parses them."""

from __future__ import annotations

from typing import Any

from lm_eval._cli.utils import key_val_to_dict, try_parse_json

from dynamax_lm_eval.errors import UserError


def json_or_pairs(option: str, text: str | None) -> dict[str, Any]:
    """Returns the values by name of an option that takes JSON, or pairs separated by commas.

    Raises:
        UserError: it is neither.
    """
    try:
        parsed = try_parse_json(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    return parsed if isinstance(parsed, dict) else pairs(option, parsed or "")


def pairs(option: str, text: str) -> dict[str, Any]:
    try:
        return {name.strip(): value for name, value in key_val_to_dict(text).items()}
    except ValueError as error:
        raise UserError(f"{option} must be name=value pairs separated by commas: {error}") from error
