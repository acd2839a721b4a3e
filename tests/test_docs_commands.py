"""README.md and docs/: commands have options that exist, Python compiles, links of README.md lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_commands import PAGES, ROOT, Command, commands, differences, faults, obstacle, small, snippets

COMMANDS = [command for page in PAGES for command in commands(page)]
#: These are to show an error.
WRONG = {"no model argument threshhold"}
MOST_WORDS = 900


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_options_and_arguments_exist(command: Command) -> None:
    assert set(faults(command)) <= WRONG


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page: Path) -> None:
    for line, code in snippets(page):
        compile(code, f"{page.name}:{line}", "exec")


def anchors(page: Path) -> set[str]:
    """The anchors of headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those within docs/ are checked where the site is built."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    local = ["".join(pair) for pair in targets if not "".join(pair).startswith("http")]
    assert local
    for target in local:
        name, _, anchor = target.partition("#")
        assert (ROOT / name).is_file(), target
        assert not anchor or anchor in anchors(ROOT / name), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < MOST_WORDS


class TestTheCheckItself:
    """What it is to find is found."""

    PAGE = """# Page

    $ dynamax-lm-eval run --tasks a \\
        --limit 2   # a comment
    | a | 1.00 |

Text, `lm_eval --no`.

```
VARIABLE=1 torchrun --nproc_per_node 2 -m dynamax_lm_eval train --backbone x
no command
```

    results["compute"]

```python
lm_eval = 1
```
"""

    def test_commands_are_found_with_what_they_print(self, tmp_path: Path) -> None:
        (tmp_path / "page.md").write_text(self.PAGE, encoding="utf-8")
        first, second = commands(tmp_path / "page.md")
        assert (first.line, first.text) == (3, "dynamax-lm-eval run --tasks a --limit 2")
        assert first.printed == ("| a | 1.00 |",)
        assert (second.line, second.printed) == (10, ())
        assert snippets(tmp_path / "page.md") == [(17, "lm_eval = 1")]

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("dynamax-lm-eval run --tasks a --limitt 2", ["no option --limitt"]),
            ("dynamax-lm-eval sweep --backbone a --prune 1 --output b --tasks c", []),
            ("dynamax-lm-eval sweep --backbone a --prune 1 ...", []),
            ("dynamax-lm-eval sweep --backbone a --prunes 1 ...", ["no option --prunes"]),
            ("dynamax-lm-eval sweep --backbone a --tasks c", ["lacks --output"]),
            ("dynamax-lm-eval swep --backbone a", ["no command swep"]),
            ("lm_eval --model_args backbone=a,treshold=1,exit_layers=[1,2],dtype=auto", ["no model argument treshold"]),
            ("torchrun --nproc_per_node 2 -m dynamax_lm_eval report a --seeed 1", ["no option --seeed"]),
            ("python benchmarks/none.py --a", ["no file benchmarks/none.py"]),
            ("python benchmarks/sweep.py --limits 1", ["no option --limits"]),
            ("make nothing", ["no target nothing"]),
            ("examples/none.sh a", ["no file examples/none.sh"]),
        ],
    )
    def test_what_does_not_exist_is_named(self, text: str, wrong: list[str]) -> None:
        assert faults(Command(ROOT / "README.md", 1, text)) == wrong

    def test_what_runs_is_small(self) -> None:
        text = "dynamax-lm-eval sweep --backbone smollm2-gguf --tasks triviaqa --thresholds 0.1:0.9:0.1 --limit 60"
        words = small(Command(ROOT / "README.md", 1, text))
        assert words[:7] == ["sweep", "--backbone", "tiny-llama", "--tasks", "triviaqa_long", "--thresholds", "0.8"]
        assert words[7:] == ["--limit", "2", "--metadata", "data_dir=data", "--device", "cpu"]
        assert obstacle(Command(ROOT / "README.md", 1, text + " ...")) is not None

    def test_printed_numbers_are_compared(self) -> None:
        page = ("|task| 1|compute_reduction|1.0875|",)
        assert differences(page, "|task|1|compute_reduction| 1.0870|\n", numbers=True) == []
        assert differences(page, "|task|1|compute_reduction| 1.2|\n", numbers=True) == list(page)
        assert differences(page, "|task|1|compute_reduction| 1.2|\n", numbers=False) == []
        assert differences(page, "|task|1|mean_exit_layer| 1.0875|\n", numbers=False) == list(page)
