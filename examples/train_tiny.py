"""Trains a small Mamba-2, Llama, hybrid (Bamba) or mixture of experts (Mixtral) on local text, to try early exit on.

    python examples/train_tiny.py --architecture mamba2 --dataset BOOKS --held-out OTHER_BOOKS --output tiny-mamba2
    python examples/train_tiny.py --architecture llama --dataset BOOKS --held-out OTHER_BOOKS --output tiny-llama

All have 12 blocks of hidden size 192 and a byte-pair tokenizer of 4,096 entries, which a run makes of the text unless
--tokenizer names the folder of another model; then both see the same tokens in the same order. Mamba-2 and Llama have
about 3.5 M parameters, in Bamba the blocks 4, 8 and 12 attend, Mixtral takes 2 of 8 experts. A run that
was killed goes on where it was when the same command is given again. The result is a folder for backbone=.

With --exit-loss WEIGHT the model learns to be read out early from the start: to its cross-entropy comes WEIGHT times
the mean of those of the exits after 6, 8 and 10 blocks, through the same final norm and LM head (LayerSkip, Elhoushi
et al. 2024, without its layer dropout and its schedule of exits). Tokens and their order stay the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.frozen.options import TextSource
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.batches import MicroBatches, Position
from dynamax_lm_eval.training.trainer import learning_rate

VOCABULARY = 4096
HIDDEN = 192
BLOCKS = 12
SEQ_LEN = 512
#: Where --exit-loss reads out.
EXITS = (6, 8, 10)
SPECIAL = ("<pad>", "<s>", "</s>")


def make_tokenizer(source: TextSource) -> Any:
    """Returns a byte-level BPE tokenizer of the first 2,000 documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts: list[str] = []

    def keep(text: str) -> Any:
        texts.append(text)
        return argparse.Namespace(input_ids=[0])

    for _ in itertools.islice(text_documents(source, keep)(0, 0), 2000):
        pass
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=int(1e30)
    )


def make_model(architecture: str, seed: int) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config: Any
    if architecture == "mamba2":
        config = transformers.Mamba2Config(
            num_heads=6, head_dim=64, expand=2, state_size=32, n_groups=1, initializer_range=0.02, **sizes
        )
    else:
        sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 2048}
        sizes["initializer_range"] = 0.06  # near 1/sqrt(D), as the mixers of Mamba-2 start
        if architecture == "llama":
            config = transformers.LlamaConfig(intermediate_size=256, **sizes)
        elif architecture == "mixtral":
            config = transformers.MixtralConfig(
                intermediate_size=128, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True, **sizes
            )
        else:
            config = transformers.BambaConfig(
                intermediate_size=256,
                attn_layer_indices=[3, 7, 11],
                mamba_n_heads=6,
                mamba_d_head=64,
                mamba_d_state=32,
                mamba_n_groups=1,
                mamba_expand=2,
                **sizes,
            )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def losses(
    model: Any, mamba: MambaBackbone | None, rows: list[list[int]], exits: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """Returns the cross-entropy of every token but the rows' first: at full depth, then at each of the exits."""
    device = model.device
    if mamba is not None:
        ids = torch.tensor([token for row in rows for token in row], device=device)
        after = mamba.train_blocks(ids, RaggedRows(list(map(len, rows)), device))
        depths = [mamba.readout(after[layer - 1]) for layer in (len(after), *exits)]
        # The last token of a row predicts nothing.
        labels = [token for row in rows for token in [*row[1:], -100]]
    else:
        width = max(map(len, rows))
        # Padding on the right of a causal model needs no mask.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        output = model(ids, use_cache=False, output_hidden_states=bool(exits))
        early = [model.lm_head(model.model.norm(output.hidden_states[layer])) for layer in exits]
        depths = [logits.flatten(0, 1) for logits in (output.logits, *early)]
        labels = [token for row in rows for token in [*row[1:], *[-100] * (width - len(row) + 1)]]
    targets = torch.tensor(labels, device=device)
    predicted = targets >= 0
    return tuple(F.cross_entropy(logits[predicted].float(), targets[predicted], reduction="none") for logits in depths)


@torch.no_grad()
def bits_per_byte(model: Any, mamba: MambaBackbone | None, rows: list[list[int]], tokenizer: Any) -> float:
    bits = sum(float(losses(model, mamba, [row])[0].sum()) for row in rows) / math.log(2)
    return bits / sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("mamba2", "llama", "bamba", "mixtral"), required=True)
    parser.add_argument("--dataset", required=True, help="file, folder or pattern of .txt, .jsonl(.gz) or .parquet")
    parser.add_argument("--held-out", required=True, help="text for the bits per byte at the end")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", help="folder of the other model; default: a new one, made of the text")
    parser.add_argument("--max-tokens", type=int, default=4_200_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--exit-loss", "--exit_loss", type=float, default=0.0, metavar="WEIGHT", help="of the exits' mean loss; 0: none"
    )
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if (args.output / "config.json").is_file():
        parser.error(f"{args.output} holds a finished model; choose another --output")
    if args.exit_loss and args.architecture not in ("mamba2", "llama"):
        parser.error("--exit-loss is for mamba2 and llama")
    if not 0 <= args.exit_loss < math.inf:
        parser.error(f"--exit-loss must be 0 or a positive number, got {args.exit_loss}")

    source = TextSource(args.dataset, seed=args.seed)
    folder = args.output / "state"
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "tokenizer.json").is_file():
        if args.tokenizer:
            transformers.AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.output)
        else:
            make_tokenizer(source).save_pretrained(args.output)
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(args.output)
    documents = text_documents(source, tokenizer)

    model = make_model(args.architecture, args.seed).to(args.device).train()
    mamba = MambaBackbone(model) if args.architecture == "mamba2" else None
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    steps = -(-args.max_tokens // args.batch_tokens)
    free = ("output", "save_steps", "held_out", "device")  # a run may go on with others
    settings = {key: value for key, value in vars(args).items() if key not in free}
    first, seconds, position = 0, 0.0, Position()
    if (resumed := state.latest(folder)) is not None:
        path, progress = resumed
        state.check_same(progress.options, settings)
        state.load(path, model.base_model, optimizer)
        first, seconds, position = progress.step, progress.seconds, Position(**progress.data)
    batches = MicroBatches(documents, args.batch_tokens, SEQ_LEN, position)
    start = time.perf_counter() - seconds
    with tqdm(total=steps * args.batch_tokens, initial=first * args.batch_tokens, unit="tok", unit_scale=True) as bar:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.learning_rate, 0.02)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                full, *early = losses(model, mamba, next(batches), EXITS if args.exit_loss else ())
                loss = full.mean()
                if early:
                    loss = loss + args.exit_loss * torch.stack(early).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(float(norm)):
                raise SystemExit(f"step {step + 1}: the gradient is not finite; lower --learning-rate")
            optimizer.step()
            bar.update(args.batch_tokens)
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if (step + 1) % args.save_steps == 0:
                seconds = time.perf_counter() - start
                progress = state.Progress(step + 1, batches.position.to_json(), settings, seconds)
                state.save(folder, progress, model.base_model, optimizer)
                with (args.output / "training.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": step + 1, "loss": float(loss.detach()), "seconds": seconds}) + "\n")

    model.to(torch.bfloat16).float().eval()  # measured as it is saved
    rows, *_ = held_out(text_documents(TextSource(args.held_out), tokenizer), 50_000, SEQ_LEN)
    summary = {
        **settings,
        "tokens": steps * args.batch_tokens,
        "seconds": time.perf_counter() - start,
        "parameters": model.num_parameters(),
        "bits_per_byte_held_out": bits_per_byte(model, mamba, rows, tokenizer),
    }
    write_text(args.output / "training.json", json.dumps(summary, indent=1) + "\n")
    if args.architecture == "mixtral":
        model.config.output_router_logits = False  # of the training's loss alone
    model.to(torch.bfloat16).save_pretrained(args.output)
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
