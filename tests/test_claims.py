"""No number of compute against the full model's run stands bare in README and docs."""

from __future__ import annotations

from pathlib import Path

import pytest
from claims import bare, main

ROOT = Path(__file__).parents[1]
FILES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_claims_say_how_sure_they_are_or_on_how_many_documents(file: Path) -> None:
    assert not bare(file.read_text(encoding="utf-8"))


TABLE = """# Heading

| point | vs full |
| --- | --- |
| a | {} |
"""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("It saves 5 % of all compute.", [1]),
        ("At 0.8 `vs full` is 1.073.", [1]),
        ("It was fast.\n\n- one\n- `compute_vs_full` comes to 1.07\n  there", [4]),
        (TABLE.format("1.073"), [5]),
        ("On 400 questions `vs full` is 1.073.", []),
        ("`vs full` is 1.073 [0.986, 1.170].", []),
        ("It saves 5.1 % of the full model's run (95 % interval 1.0 to 9.5).", []),
        (TABLE.format("1.073 [0.986, 1.170]"), []),
        ("On 60 documents:\n\n" + TABLE.format("1.073"), [7]),
        (TABLE.replace("\n\n", "\n\nOn the first 60 documents:\n\n", 1).format("1.073"), []),
        (TABLE.format("1.000"), []),
        ("`vs full` falls below 1 where texts get longer.", []),
        ("    run --score vs full 1.07", []),
        ("The threshold is 0.8. See also `vs full`.", []),
    ],
)
def test_what_is_found(text: str, lines: list[int]) -> None:
    assert [line for line, _ in bare(text)] == lines


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text("It saves 5 % of all compute.\n", encoding="utf-8")
    assert main([str(tmp_path / "a.md")]) == 1
    assert "a.md:1: It saves 5 %" in capsys.readouterr().out
    assert main([str(ROOT / "README.md")]) == 0
