"""One sweep over ten thresholds against ten runs of the command, one after the other; the results are compared.

    python benchmarks/sweep.py --backbone smollm2-gguf --classifier mamba --tasks trivia_demo --limit 40

Every run is a process of its own, as a user would start it, with the same batch size. The sweep also answers for the
full model. Sums of seconds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import environment

from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.options import parse_thresholds


def timed(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dynamax_lm_eval", *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def compared(result: dict[str, Any]) -> dict[str, float]:
    """All scores and reductions of a result file."""
    return {
        f"{task} {metric}": value
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--classifier", default="mamba")
    parser.add_argument("--tasks", default="trivia_demo")
    parser.add_argument("--metadata", help="for tasks that take some, as the commands take it")
    parser.add_argument("--thresholds", default="0.5:0.95:0.05")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    common = ["--tasks", args.tasks, "--limit", str(args.limit), "--batch_size", str(args.batch_size)]
    common += ["--device", "cpu", *(["--metadata", args.metadata] if args.metadata else [])]
    seconds: dict[str, Any] = {"separate": []}
    separate: dict[float, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for threshold in parse_thresholds(args.thresholds):
            output = Path(folder) / f"separate-{threshold:g}"
            model = f"backbone={args.backbone},classifier={args.classifier},threshold={threshold:g}"
            seconds["separate"].append(timed(["run", "--model_args", model, "--output_path", str(output), *common]))
            (file,) = output.rglob("results_*.json")
            separate[threshold] = compared(json.loads(file.read_text()))
            print(f"threshold {threshold:g}: {seconds['separate'][-1]:.1f} s", flush=True)
        output = Path(folder) / "sweep"
        grid = ["--confidences", args.classifier, "--thresholds", args.thresholds, "--output", str(output)]
        seconds["sweep"] = timed(["sweep", "--backbone", args.backbone, *grid, *common])
        swept = {
            point["value"]: compared(json.loads((point["folder"] / point["results"]).read_text()))
            for point in finished_points(output)
            if point["family"] == "exits"
        }
    equal = sum(separate[threshold] == swept[threshold] for threshold in separate)
    share = seconds["sweep"] / sum(seconds["separate"])
    print(f"sweep: {seconds['sweep']:.1f} s, {share:.2f} of {sum(seconds['separate']):.1f} s; {equal} results equal")
    about = {"benchmark": "sweep", **vars(args), "share": share, "equal_results": equal, "results": len(separate)}
    print(json.dumps(about | environment("cpu") | {"seconds": seconds}))


if __name__ == "__main__":
    main()
