"""The torch path of Mamba backbones against transformers' own, on the same randomly initialised model.

    python benchmarks/mamba.py --family mamba2 --hidden-size 768 --layers 24

Prefill of one long row, decoding of one row, and generation of 16 ragged rows (transformers pads them on the
left), in alternating order, medians; greedy tokens are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from environment import environment

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy


def make_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": args.vocab_size, "hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
    # Wide enough that the arg-max is not decided by rounding.
    sizes |= {"state_size": args.state_size, "expand": 2, "initializer_range": 0.2}
    config: Any
    if args.kind == "mamba2":
        heads = 2 * args.hidden_size // args.head_dim
        config = transformers.Mamba2Config(num_heads=heads, head_dim=args.head_dim, n_groups=args.groups, **sizes)
    else:
        config = transformers.MambaConfig(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(args.device)


def ours(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    policy = ExitPolicy(engine.backbone.num_layers)
    requests = [GenerationRequest(prompt, new_tokens, policy, Sampler(), lambda _: False) for prompt in prompts]
    return [generation.tokens for generation in generate_all(engine, requests, len(prompts))]


@torch.inference_mode()
def theirs(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens: list[list[int]] = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mamba2", "mamba"), default="mamba2")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = make_model(args)
    engine = Engine(make_backbone(model))
    check_against_model(engine, model)
    generator = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return torch.randint(3, args.vocab_size, (length,), generator=generator).tolist()  # type: ignore[no-any-return]

    workloads: dict[str, tuple[list[list[int]], int]] = {
        "prefill": ([prompt(args.prompt_tokens)], 1),
        "decode, batch 1": ([prompt(8)], args.new_tokens),
        "generation, batch 16": ([prompt(int(n)) for n in torch.linspace(24, 128, 16)], args.new_tokens),
    }
    rows = []
    for name, (prompts, new_tokens) in workloads.items():
        sides: dict[str, Callable[[], list[list[int]]]] = {
            "dynamax": lambda prompts=prompts, n=new_tokens: ours(engine, prompts, n),
            "transformers": lambda prompts=prompts, n=new_tokens: theirs(model, prompts, n),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        tokens = {side: run() for side, run in sides.items()}
        for repeat in range(args.repeats):
            for side in sorted(sides, reverse=bool(repeat % 2)):
                start = time.perf_counter()
                sides[side]()
                seconds[side].append(time.perf_counter() - start)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        equal = sum(a == b for a, b in zip(*tokens.values(), strict=True))
        rows.append(
            {
                "workload": name,
                "median_seconds": medians,
                "seconds": seconds,
                "speed_up": medians["transformers"] / medians["dynamax"],
                "equal_texts": equal,
                "texts": len(prompts),
            }
        )
        print(
            f"{name}: dynamax {medians['dynamax']:.3f} s, transformers {medians['transformers']:.3f} s, "
            f"{rows[-1]['speed_up']:.2f} times as fast, {equal} of {len(prompts)} texts equal",
            flush=True,
        )
    setting = {"benchmark": "mamba", **vars(args), "parameters": model.num_parameters()}
    print(json.dumps(setting | environment(args.device) | {"rows": rows}))


if __name__ == "__main__":
    main()
