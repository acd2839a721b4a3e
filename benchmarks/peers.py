"""Decoding with forced exits against the CALM technique of the package economize, which runs in its own environment.

    python -m venv peer && peer/bin/pip install torch transformers economize==0.3.2
    python benchmarks/peers.py --peer-python peer/bin/python --backbone smollm2-gguf --batch-sizes 1 16

Both sides generate the same number of tokens after the same prompts with the same weights; two of three tokens, the
same ones, leave after --layer blocks, and both recompute K and V of the blocks they skip from their last hidden
state. The generated tokens are compared. Each side runs in a process of its own, in alternating order; medians. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

#: Row i leaves at the c-th evaluation unless (c + i) is divisible by this.
EVERY = 3


def prompts_for(args: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(
        3, vocabulary, (args.batch_size, args.prompt_tokens), generator=generator
    ).tolist()
    return ids


def timed(run: Any, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat after one that warmup_tokens up, and the tokens."""
    tokens = run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from forced_exits import RandomExit, forced, logits_of
    from transformers import AutoModelForCausalLM

    from dynamax_lm_eval.engine.generation import generate_all
    from dynamax_lm_eval.engine.parity import checked_engine
    from dynamax_lm_eval.engine.requests import GenerationRequest
    from dynamax_lm_eval.engine.sampling import Sampler
    from dynamax_lm_eval.exits.policy import ExitPolicy

    class Forced(RandomExit):
        def forward(self, hidden: Any, rows: Any = None, state: Any = None) -> Any:
            leaves = (torch.arange(len(hidden)) + self.calls) % EVERY != 0
            self.calls += 1
            return logits_of(torch.where(leaves, 9.0, -9.0)), None

    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    depth = model.config.num_hidden_layers
    scheduled = Forced(0)
    policy = ExitPolicy(depth, (args.layer,), (0.5,), confidence="classifier", classifier="calm")
    engine = forced(checked_engine(model, policy, 2048).backbone, {args.layer: scheduled})
    requests = [
        GenerationRequest(prompt, args.new_tokens, policy, Sampler(), lambda _: False)
        for prompt in prompts_for(args, model.config.vocab_size)
    ]

    def run() -> list[list[int]]:
        scheduled.calls = 0
        return [generation.tokens for generation in generate_all(engine, requests, len(requests))]

    return timed(run, args.repeats)


def economize(args: argparse.Namespace) -> dict[str, Any]:
    import economize as package
    from economize.techniques.dynamic_depth.calm import CONFIDENCE_MEASURES, CalmConfig, ConfidenceMeasure
    from transformers import AutoModelForCausalLM

    calls = [0]

    @CONFIDENCE_MEASURES.register("forced")
    class Forced(ConfidenceMeasure):
        def __call__(self, index: int, x: Any, out: Any) -> Any:
            if index != args.layer:
                return torch.zeros(out.shape[:2])
            leaves = (torch.arange(out.shape[0]) + calls[0]) % EVERY != 0
            calls[0] += 1
            return leaves.float()[:, None].expand(out.shape[:2])

    base: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    model: Any = package.apply(base, CalmConfig(confidence="forced", threshold=0.5, min_layer=args.layer))
    ids = torch.tensor(prompts_for(args, base.config.vocab_size))

    def run() -> list[list[int]]:
        calls[0] = 0
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    with torch.inference_mode():
        return timed(run, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the python of an environment with economize")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3, help="in each of --rounds processes of each side")
    parser.add_argument("--rounds", type=int, default=2)
    for name, kind in (("side", str), ("folder", str), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"ours": ours, "economize": economize}[args.side](args)))
        return
    if not args.peer_python:
        parser.error("--peer-python is needed: the python of an environment with economize")

    from environment import environment

    from dynamax_lm_eval.models import aliases

    sides = {"ours": sys.executable, "economize": args.peer_python}
    rows = []
    for batch_size in args.batch_sizes:
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        tokens: dict[str, Any] = {}
        for turn in range(args.rounds):
            for side in sorted(sides, reverse=bool(turn % 2)):
                given = {"side": side, "folder": aliases.resolve_backbone(args.backbone), "batch-size": batch_size}
                given |= {"layer": args.layer, "prompt-tokens": args.prompt_tokens, "repeats": args.repeats}
                given |= {"new-tokens": args.new_tokens}
                command = [sides[side], __file__, *(f"--{name}={value}" for name, value in given.items())]
                found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                seconds[side] += found["seconds"]
                tokens[side] = found["tokens"]
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        rows.append(
            {
                "batch_size": batch_size,
                "speed_up": medians["economize"] / medians["ours"],
                "equal_rows": sum(a == b for a, b in zip(tokens["ours"], tokens["economize"], strict=True)),
                "seconds": seconds,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    version = subprocess.check_output(
        [args.peer_python, "-c", "import importlib.metadata as m; print(m.version('economize'))"], text=True
    ).strip()
    about = {"benchmark": "peers", "backbone": args.backbone, "layer": args.layer, "economize": version}
    print(json.dumps(about | environment("cpu") | {"rows": rows}))


if __name__ == "__main__":
    main()
