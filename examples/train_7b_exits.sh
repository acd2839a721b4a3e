#!/usr/bin/env bash
# Trains exits for a 7B model on one GPU, and uploads them: Mistral 7B, or Codestral Mamba 7B with mamba-ssm installed.
#
#     examples/train_7b_exits.sh mistral  user/mistral-7b-exits
#     examples/train_7b_exits.sh codestral-mamba user/codestral-mamba-7b-exits
#
# Without a repository nothing is uploaded. The same command goes on where a run was stopped. Half of the tokens are the
# model's own greedy answers to CoQA's training documents, half are FineWeb-Edu.
set -euo pipefail

model=${1:?"which model: mistral or codestral-mamba"}
repository=${2:-}
output=${OUTPUT:-exits-$model}

# A micro-batch of 2,048 tokens beside 14.5 GB of weights in bfloat16: of the labelled positions a part at a time is read
# out, and the moments that state maps are fitted from take 4 GiB at a time, if need be in several passes.
options=(
    --backbone "$model"
    --classifier mamba,calm
    --dataset self:0.5+HuggingFaceFW/fineweb-edu
    --prompts coqa
    --self_tokens 200000
    --states lowrank:64
    --states_tokens 65536
    --adapter lowrank:256
    --simulate_exits
    --max_tokens 2000000
    --batch_tokens 2048
    --micro_batch_tokens 2048
    --label_share 0.125
    --dtype bfloat16
    --save_dtype bfloat16
    --save_steps 50
    --output "$output"
)
if [[ -d "$output/state" ]]; then
    options+=(--resume)
fi
if [[ -n "$repository" ]]; then
    options+=(--push_to_hub "$repository")
fi
exec dynamax-lm-eval train "${options[@]}"
