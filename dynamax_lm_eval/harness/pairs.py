"""``name=value`` pairs and JSON, parsed as the harness's own command line parses them."""

from __future__ import annotations

import logging
from typing import Any

from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


def json_or_pairs(option: str, text: str | None) -> dict[str, Any]:
    """Returns the values by name of an option that takes JSON, or pairs separated by commas.

    Raises:
        UserError: it is neither.
    """
    from lm_eval._cli.utils import try_parse_json  # not needed for help

    try:
        parsed = try_parse_json(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    return parsed if isinstance(parsed, dict) else pairs(option, parsed or "")


def pairs(option: str, text: str) -> dict[str, Any]:
    """Returns values by name; commas within brackets belong to a value, which 0.5.0.dev1 does not know.

    Raises:
        UserError: something between commas is no pair.
    """
    from lm_eval._cli.utils import handle_cli_value_string

    found: dict[str, Any] = {}
    for item in _items(text):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{option} must be name=value pairs separated by commas, got {item!r}")
        if name.strip() in found:
            logger.warning("%s: %s is given more than once; the last one counts", option, name.strip())
        found[name.strip()] = handle_cli_value_string(value)
    return found


def _items(text: str) -> list[str]:
    """Splits at the commas that stand outside of brackets and quotes; leaves out what is empty."""
    items, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            items.append("")
            continue
        items[-1] += character
    return [item for item in items if item]
