"""The package's rooms: imports follow the order in docs/architecture.md, files stay short, documents are legible."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dynamax_lm_eval"
MOST_LINES, MOST_METHODS, LONGEST_PROSE = 400, 20, 120
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
DOCUMENTS = sorted([*(ROOT / "docs").rglob("README.md"), *(ROOT / "docs").glob("*.md")])
DOCUMENTS += [ROOT / "README.md", ROOT / "CHANGELOG.md"]


class Import(NamedTuple):
    """A module that another one imports, at once or, where it is deferred, when a function runs."""

    module: str
    target: str
    line: int
    is_deferred: bool


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def statements(node: ast.AST, is_deferred: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes but those for type checkers only, each with whether it lies in a function."""
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = list(node.orelse)
    is_deferred = is_deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in children:
        yield child, is_deferred
        yield from statements(child, is_deferred)


def imports_of(module: str, tree: ast.Module) -> list[Import]:
    """All imports of a module, each target once per statement."""
    imports: dict[Import, None] = {}
    for node, is_deferred in statements(tree):
        if isinstance(node, ast.Import):
            imports |= {Import(module, name.name, node.lineno, is_deferred): None for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}, line {node.lineno}: write the whole name of the package"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                target = inner if inner in MODULES else node.module
                imports[Import(module, target, node.lineno, is_deferred)] = None
    return list(imports)


IMPORTS = [line for module, file in MODULES.items() for line in imports_of(module, tree_of(file))]


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself, which is outside the order."""
    return module.split(".")[1] if "." in module else None


def documented() -> tuple[list[list[str]], set[str]]:
    """The order of rooms, lowest first, those that may not import one another together; and who may import lm_eval."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fenced = re.search(r"```rooms\n(.+)\nlm_eval: (.+)\n```", text)
    assert fenced is not None
    order, harness = fenced.groups()
    return [floor.split(", ") for floor in order.split(" < ")], set(harness.split(", "))


ORDER, MAY_IMPORT_THE_HARNESS = documented()
FLOOR_OF = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def upward(imports: list[Import]) -> list[str]:
    """The imports of another room that is not below, as lines for a message."""
    return [
        f"{found.module}, line {found.line}: {found.target}"
        for found in imports
        if found.target in MODULES
        and (own := room_of(found.module)) is not None
        and (other := room_of(found.target)) is not None
        and own != other
        and FLOOR_OF.get(other, len(ORDER)) >= FLOOR_OF.get(own, -1)
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if around := visit(target, [*path, module]):
                return around
        done.add(module)
        return []

    return next((around for module in sorted(edges) if (around := visit(module, []))), [])


def long_prose(text: str) -> list[int]:
    """Numbers of lines of prose that are too long. Tables, code, HTML and the targets of links may be."""
    lines, is_fenced = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            is_fenced = not is_fenced
        is_code = is_fenced or line.startswith("    ")
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        if not is_code and not line.startswith(("|", "<")) and len(shown) > LONGEST_PROSE:
            lines.append(number)
    return lines


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {room for module in MODULES if (room := room_of(module)) is not None}
    assert sorted(room for floor in ORDER for room in floor) == sorted(rooms)


def test_every_file_is_in_the_tree_of_the_document() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text[text.index("dynamax_lm_eval/\n") : text.index("Every module begins")]
    words = set(re.findall(r"[\w]+", tree))
    assert [str(file.relative_to(ROOT)) for file in FILES if file.stem not in words] == []


def test_imports_point_to_rooms_below() -> None:
    assert upward(IMPORTS) == []


def test_no_modules_import_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.target in MODULES and not found.is_deferred:
            edges.setdefault(found.module, set()).add(found.target)
    assert circle(edges) == []


def test_only_named_rooms_import_the_harness() -> None:
    importing = {room_of(found.module) for found in IMPORTS if found.target.partition(".")[0] == "lm_eval"}
    assert importing == MAY_IMPORT_THE_HARNESS


@pytest.mark.parametrize("module", MODULES)
def test_files_and_classes_are_short(module: str) -> None:
    tree, lines = tree_of(MODULES[module]), MODULES[module].read_text(encoding="utf-8").count("\n")
    methods = {
        node.name: sum(isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) for part in node.body)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert lines <= MOST_LINES
    assert {name: count for name, count in methods.items() if count > MOST_METHODS} == {}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_lines_of_prose_fit_a_screen(file: Path) -> None:
    assert long_prose(file.read_text(encoding="utf-8")) == []


class TestTheChecksThemselves:
    """What they are to find is found."""

    def test_imports_inside_functions_count_and_those_for_type_checkers_do_not(self) -> None:
        source = "\n".join(
            [
                "from typing import TYPE_CHECKING",
                "if TYPE_CHECKING:",
                "    from dynamax_lm_eval.lm import DynamaxLM",
                "else:",
                "    import json",
                "def run():",
                "    from dynamax_lm_eval.engine import engine",
            ]
        )
        imports = [found[1:] for found in imports_of("dynamax_lm_eval.files", ast.parse(source))]
        assert imports == [("typing", 1, False), ("json", 5, False), ("dynamax_lm_eval.engine.engine", 7, True)]

    def test_imports_that_run_up_or_across_are_found(self) -> None:
        up = Import("dynamax_lm_eval.compute.cost", "dynamax_lm_eval.lm", 3, True)
        across = Import("dynamax_lm_eval.reports.page", "dynamax_lm_eval.calibration.losses", 4, False)
        down = Import("dynamax_lm_eval.lm", "dynamax_lm_eval.compute.cost", 5, False)
        inside = Import("dynamax_lm_eval.compute.cost", "dynamax_lm_eval.compute.repetition", 6, False)
        assert upward([up, across, down, inside]) == [
            "dynamax_lm_eval.compute.cost, line 3: dynamax_lm_eval.lm",
            "dynamax_lm_eval.reports.page, line 4: dynamax_lm_eval.calibration.losses",
        ]

    def test_circles_are_found(self) -> None:
        assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}}) == []
        assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]

    def test_only_prose_counts_as_long(self) -> None:
        long = "word " * 30
        text = "\n".join([long, "| " + long, "    " + long, "```", long, "```", f"[a]({'x' * 130})", f"- {long}"])
        assert long_prose(text) == [1, 8]
