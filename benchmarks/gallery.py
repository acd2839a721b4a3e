"""Runs the sweeps of gallery.yaml and writes docs/results: tables, plots, and one page that lists them.

    python benchmarks/gallery.py --data DATA --work WORK            # everything, hours on two cores
    python benchmarks/gallery.py --data DATA --work WORK --only coqa
    python benchmarks/gallery.py --data DATA --work WORK --report   # what is there already, shown anew

A run that was stopped goes on where it was. DATA is a folder with the data files of the tasks, and in `openstax`
textbooks as .jsonl.gz with `text`; two of them, astronomy and psychology, are held out.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tabulate import tabulate

HELD_OUT = ("astronomy", "psychology")
#: What a report writes that is kept: no page, which has the texts of the data.
KEPT = ("points.csv", "report.md", "*.png")
#: Metrics that say how near answers are to the full model's, the first that a task has.
SIMILARITY = ("consistency_rouge_l", "consistency")
HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"

_PLACEHOLDER = re.compile(r"\b(DATA|WORK|BOOKS|HELD_OUT)\b")

_CHOICE_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def options(given: dict[str, Any]) -> list[str]:
    """Returns options of a command as its words."""
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


class Gallery:
    """Where data is read and results are written, and what its commands are called with."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        self.names = {"DATA": data, "WORK": work, "BOOKS": work / "books", "HELD_OUT": work / "held-out"}
        for name, held_out in (("books", False), ("held-out", True)):
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted((data / "openstax").glob("*.jsonl.gz")):
                link = folder / file.name
                if file.name.startswith(HELD_OUT) == held_out and not link.exists():
                    link.symlink_to(file)

    def run(self, words: list[str]) -> None:
        """Runs a command, its placeholders replaced, with our own interpreter, whatever the shell would find."""
        words = [_PLACEHOLDER.sub(lambda found: str(self.names[found[0]]), word) for word in words]
        program = ["-m", "dynamax_lm_eval"] if words[0] == "dynamax-lm-eval" else []
        subprocess.run([sys.executable, *program, *words[1:]], check=True, cwd=HERE.parent)

    def prepare(self, entry: dict[str, Any]) -> None:
        """Runs the commands that come before a sweep, those whose output is there left out."""
        for line in entry.get("prepare", []):
            words = shlex.split(line)
            output = self.work / Path(words[words.index("--output") + 1]).name
            if not (output.is_file() or (output / "config.json").is_file()):
                self.run(words)
        for name, file in entry.get("choice_tasks", {}).items():
            folder = self.work / "tasks"
            folder.mkdir(exist_ok=True)
            path = self.names["DATA"] / file
            (folder / f"{name}.yaml").write_text(_CHOICE_TASK.format(name=name, file=path), encoding="utf-8")

    def measure(self, entry: dict[str, Any]) -> None:
        """Runs headroom and sweep of an entry."""
        self.prepare(entry)
        folder = self.work / entry["name"]
        if "headroom" in entry and not (folder / "headroom" / "headroom.json").is_file():
            output = {"backbone": entry["sweep"]["backbone"], **entry["headroom"], "output": folder / "headroom"}
            self.run(["dynamax-lm-eval", "headroom", *options(output)])
        self.run(["dynamax-lm-eval", "sweep", *options({**entry["sweep"], "output": folder / "sweep"})])

    def report(self, entry: dict[str, Any]) -> None:
        """Writes tables and plots of an entry."""
        made, target = self.work / entry["name"] / "report", RESULTS / entry["name"]
        shutil.rmtree(made, ignore_errors=True)
        metrics = ["--metrics", entry["metrics"]] if "metrics" in entry else []
        sweep = str(self.work / entry["name"] / "sweep")
        self.run(["dynamax-lm-eval", "report", sweep, "--output", str(made), *metrics])
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in sorted(file for pattern in KEPT for file in made.glob(pattern)):
            shutil.copy(file, target)
        headroom = self.work / entry["name"] / "headroom"
        if headroom.is_dir():
            shutil.copy(headroom / "headroom.png", target)
            verdict = json.loads((headroom / "headroom.json").read_text(encoding="utf-8"))["verdict"]["line"]
            (target / "headroom.txt").write_text(f"{verdict}\n", encoding="utf-8")

    def section(self, entry: dict[str, Any]) -> str:
        """Returns the part of the page that shows an entry."""
        folder = RESULTS / entry["name"]
        given = shlex.join(["dynamax-lm-eval", "sweep", *options({**entry["sweep"], "output": entry["name"]})])
        commands = [*(" ".join(line.split()) for line in entry.get("prepare", [])), given.replace("'", "")]
        parts = [f"## {entry['title']}", "\n".join(f"    {line}" for line in commands)]
        if (folder / "headroom.txt").is_file():
            verdict = (folder / "headroom.txt").read_text(encoding="utf-8").strip()
            parts.append(textwrap.fill(f"Headroom: {verdict}", 120, break_long_words=False, break_on_hyphens=False))
        shown = [pair.split("=")[1] for pair in entry.get("metrics", "").split(",") if pair]
        for plot in sorted(folder.glob("*.png")):
            if plot.name == "headroom.png":
                continue
            if "consistency" in plot.name or shown:
                parts.append(f"![Score against compute]({entry['name']}/{plot.name})")
        points = pd.read_csv(folder / "points.csv")
        first = points.groupby("task")["metric"].transform("first")
        points = points[points["metric"].isin(shown) if shown else points["metric"] == first]
        parts.append(summary(points))
        parts.append(entry.get("reading", "").strip())
        parts.append(f"All points: [report]({entry['name']}/report.md), [CSV]({entry['name']}/points.csv).")
        return "\n\n".join(part for part in parts if part)


def summary(points: pd.DataFrame) -> str:
    """Returns all points by a metric of each task, as Markdown; 95 % intervals in brackets, standard errors by ±."""
    tables = []
    for (task, metric), of_task in points.groupby(["task", "metric"], sort=False):
        similarity = next((name for name in SIMILARITY if name in of_task and of_task[name].notna().any()), None)
        heads = ["point", str(metric), *([similarity] if similarity else []), "compute_reduction", "compute_vs_full"]
        has_loops = "loops_left_out" in of_task and of_task["loops_left_out"].fillna(0).any()
        heads += [*(["without loops"] if has_loops else []), "tokens"]
        rows = []
        for row in of_task.to_dict("records"):
            cells = [row["point"] if row["valid"] else f"({row['point']})", _with_error(row, "score", "score_stderr")]
            if similarity:
                cells.append(_interval(row, similarity))
            cells += [
                _with_error(row, "compute_reduction", "compute_reduction_stderr"),
                _interval(row, "compute_vs_full"),
            ]
            if has_loops:
                bounds = [row[f"compute_vs_full{part}_without_loops"] for part in ("", "_low", "_high")]
                cells.append("" if pd.isna(bounds[0]) else "{:.3f} [{:.3f}, {:.3f}]".format(*bounds))
            cells.append("" if pd.isna(row["generated_tokens"]) else f"{row['generated_tokens']:.1f}")
            rows.append(cells)
        count = int(of_task["documents"].iloc[0])
        lost = of_task.loc[of_task["valid"], "loops_left_out"].max() if has_loops else 0
        left = f"; of valid points, at most {int(lost)} are left out as loops" if has_loops else ""
        table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        tables.append(f"`{task}`, {count} documents{left}:\n\n{table}")
    return "\n\n".join(tables)


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:.3f}" if pd.isna(low) or row["family"] == "full" else f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def _with_error(row: dict[str, Any], name: str, stderr: str) -> str:
    return f"{row[name]:.3f}" if pd.isna(row[stderr]) else f"{row[name]:.3f} ± {row[stderr]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data files")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and answers")
    parser.add_argument("--only", help="names of entries, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and plots of what was run")
    args = parser.parse_args()
    entries = yaml.safe_load((HERE / "gallery.yaml").read_text(encoding="utf-8"))
    chosen = args.only.split(",") if args.only else [entry["name"] for entry in entries]
    if unknown := set(chosen) - {entry["name"] for entry in entries}:
        parser.error(f"no entry is called {', '.join(sorted(unknown))}")
    gallery = Gallery(args.data.resolve(), args.work.resolve())
    for entry in entries:
        if entry["name"] in chosen:
            if not args.report:
                gallery.measure(entry)
            gallery.report(entry)
    head = (HERE / "gallery.md").read_text(encoding="utf-8")
    # Those that were run elsewhere, or earlier, keep their sections.
    done = [entry for entry in entries if (RESULTS / entry["name"] / "points.csv").is_file()]
    page = "\n\n".join([head.strip(), *map(gallery.section, done)])
    (RESULTS / "README.md").write_text(f"{page}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
