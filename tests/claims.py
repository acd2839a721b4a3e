"""Claims on compute against the full model's run that say neither how sure they are nor on how many documents.

    python tests/claims.py README.md docs/*.md docs/*/*.md

prints each of them with its file and line, and ends with 1 where there are any. A number in a paragraph needs an
interval or a count of documents in that paragraph; a number in a table, an interval in its cell, or a count of
documents below the same heading.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_VS_FULL = r"vs[ _]full|against the full model's run|of the full model's run|of all compute"
_SUBJECT = re.compile(_VS_FULL, re.IGNORECASE)
#: What such a claim is made of: a ratio with decimals, or per cent.
_NUMBER = re.compile(r"(?<![\w.,-])\d+\.\d+(?![\w.])|(?<![\w.,-])\d+(\.\d+)? %")
_INTERVAL = re.compile(r"[\[(]-?\d+(\.\d+)?(,| to| bis) *-?\d+(\.\d+)?[\])]|±|interval|standard error")
_COUNT = re.compile(r"\d[\d,]* ([\w-]+ ){0,3}(documents|questions|answers|texts|requests)|questions \d+ to \d+")


def bare(text: str) -> list[tuple[int, str]]:
    """Returns (line, text) of each claim of a Markdown file that says neither."""
    found: list[tuple[int, str]] = []
    section, columns = "", []  # type: str, list[int]
    for first, block in _blocks(text):
        if block[0].startswith("#"):
            level = len(block[0]) - len(block[0].lstrip("#"))
            section = "\n".join(block) if level <= 2 else section + "\n".join(block)
            continue
        joined = " ".join(line.strip() for line in block)
        section += "\n" + joined
        if block[0].lstrip().startswith("|"):
            head = _cells(block[0])
            columns = [i for i, name in enumerate(head) if _SUBJECT.search(name) and "median" not in name]
            for number, line in enumerate(block[2:], start=first + 2):
                cells = _cells(line)
                shown = [cells[i] for i in columns if i < len(cells)]
                unsure = [cell for cell in shown if _NUMBER.search(cell) and not _INTERVAL.search(cell)]
                if any(cell.strip() not in ("1", "1.000") for cell in unsure) and not _COUNT.search(section):
                    found.append((number, line.strip()))
            continue
        sentences = [part for part in re.split(r"(?<=[.:])\s+(?=[A-Z`*])", joined) if _SUBJECT.search(part)]
        claims = [sentence for sentence in sentences if _NUMBER.search(sentence)]
        if claims and not _INTERVAL.search(joined) and not _COUNT.search(joined):
            found.append((first, claims[0]))
    return found


def _blocks(text: str) -> list[tuple[int, list[str]]]:
    """Returns paragraphs, items of lists and tables with the number of their first line; code is left out."""
    blocks: list[tuple[int, list[str]]] = []
    fenced, begin = False, True
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("```"):
            fenced, begin = not fenced, True
        elif fenced or not line.strip() or (line.startswith("    ") and begin):
            begin = True
        elif begin or line.startswith("#") or re.match(r"(-|\d+\.) ", line) or _kind(line) != _kind(blocks[-1][1][-1]):
            blocks.append((number, [line]))
            begin = line.startswith("#")
        else:
            blocks[-1][1].append(line)
    return blocks


def _kind(line: str) -> bool:
    return line.lstrip().startswith("|")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main(names: list[str]) -> int:
    claims = [(name, *claim) for name in names for claim in bare(Path(name).read_text(encoding="utf-8"))]
    for name, line, text in claims:
        sys.stdout.write(f"{name}:{line}: {text}\n")
    return 1 if claims else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
