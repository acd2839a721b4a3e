"""Generation with ``--model dynamax`` against ``--model hf``, on a randomly initialised model of any architecture.

    python benchmarks/architectures.py --model-type bamba --set num_hidden_layers=6 attn_layer_indices=[3]

The configuration is the architecture's default one, in which ``--set`` changes what it names. Both answer the same
requests with prompts of different lengths, in alternating order; medians of whole calls of ``generate_until``. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import time
from typing import Any

import tokenizers
import torch
import transformers
from environment import environment
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dynamax_lm_eval import DynamaxLM


def make_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    changes = dict(item.split("=", 1) for item in args.set)
    config = transformers.AutoConfig.for_model(
        args.model_type, **{name: ast.literal_eval(value) for name, value in changes.items()}
    )
    config.initializer_range = 0.05
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()


def word_tokenizer(vocab_size: int) -> Any:
    """Token i is the word ti."""
    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2")


def requests_of(args: argparse.Namespace, vocab_size: int) -> list[Instance]:
    generator = torch.Generator().manual_seed(1)
    requests = []
    for i in range(args.rows):
        length = args.prompt_tokens // 2 + args.prompt_tokens * i // args.rows
        ids = torch.randint(5, vocab_size, (length,), generator=generator).tolist()
        settings = {"until": [], "max_gen_toks": args.new_tokens, "do_sample": False}
        requests.append(
            Instance("generate_until", {}, (" ".join(f"t{j}" for j in ids), settings), i, ("benchmark", i, 1))
        )
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", default="bamba")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the configuration")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="mean length of the prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = make_model(args)
    vocab_size = model.config.get_text_config().vocab_size
    shared = {"tokenizer": word_tokenizer(vocab_size), "batch_size": args.rows, "device": args.device}
    models = {
        "dynamax": DynamaxLM(model, threshold=1, max_length=2 * args.prompt_tokens + args.new_tokens, **shared),
        "hf": HFLM(model, max_length=2 * args.prompt_tokens + args.new_tokens, **shared),
    }
    requests = requests_of(args, vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[str]] = {}
    for _ in range(args.repeats + 1):  # the first warms up
        for name, lm in models.items():
            start = time.perf_counter()
            texts[name] = lm.generate_until(requests, disable_tqdm=True)
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    same = sum(a == b for a, b in zip(texts["dynamax"], texts["hf"], strict=True))
    for name, value in medians.items():
        print(f"{name:8} {value:8.2f} s")
    print(f"hf takes {medians['hf'] / medians['dynamax']:.2f} times as long; {same} of {args.rows} texts are equal")
    result = {"rung": models["dynamax"].engine.backbone.rung, "seconds": medians, "equal_texts": same}
    print(json.dumps(vars(args) | result | environment(args.device)))


if __name__ == "__main__":
    main()
