"""How often each bound of ``calibrate`` certifies a threshold that may be certified, on losses with known expectations.

    python benchmarks/bounds.py

One candidate whose expected loss is below the tolerance; documents are drawn without replacement from a fixed set of
ten times as many, as ``calibrate`` draws them. The share of draws in which it is certified is the bound's power. Prints
a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
from environment import environment
from tabulate import tabulate

from dynamax_lm_eval.calibration.testing import BOUNDS, Floats, learn_then_test

#: Losses (n,) of a mean, by their kind: 0 or 1; like ROUGE-L, most 0 and some of any size; all nearly the same.
KINDS: dict[str, Callable[[np.random.Generator, int, float], Floats]] = {
    "0 or 1": lambda draw, n, mean: (draw.random(n) < mean).astype(np.float64),
    "mostly 0": lambda draw, n, mean: np.where(draw.random(n) < 4 * mean, draw.beta(1, 3, n), 0.0),
    "nearly equal": lambda draw, n, mean: draw.normal(mean, 0.02, n).clip(0, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--level", type=float, default=0.05)
    parser.add_argument("--means", default="0.05,0.08")
    parser.add_argument("--documents", default="200,1000")
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    rows, found = [], []
    for kind, draw in KINDS.items():
        for mean in map(float, args.means.split(",")):
            for n in map(int, args.documents.split(",")):
                certified = dict.fromkeys(BOUNDS, 0)
                for seed in range(args.draws):
                    losses = draw(np.random.default_rng(seed), 10 * n, mean)[None, :n]
                    for bound in BOUNDS:
                        selection = learn_then_test(
                            losses, args.tolerance, args.level, bound, seed=seed, population=10 * n
                        )
                        certified[bound] += selection.certified
                shares = {bound: count / args.draws for bound, count in certified.items()}
                rows.append([kind, mean, n, *shares.values()])
                found.append({"losses": kind, "mean": mean, "documents": n, **shares})
    print(tabulate(rows, ["losses", "expected loss", "documents", *BOUNDS], tablefmt="github"))
    print(json.dumps({"benchmark": "bounds", "options": vars(args), "found": found, **environment("cpu")}))


if __name__ == "__main__":
    main()
