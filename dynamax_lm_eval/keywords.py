"""The keywords of ``DynamaxLM`` with their types, for editors and type checkers; what they mean is in ``config``.

Imports nothing at run time but the words. A test holds the names against those that are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dynamax_lm_eval.types import (
    BudgetStrategy,
    ClassifierKind,
    ConfidenceName,
    Confirm,
    ExitScope,
    MambaKernels,
    Preset,
    PruneScope,
    PruneStrategy,
    RooflineDevice,
    StateMode,
)

if TYPE_CHECKING:
    import os

    import torch
    import transformers


class PolicyKeywords(TypedDict, total=False):
    """What may change on a loaded model: which tokens leave where, and what becomes of them."""

    threshold: float | str | os.PathLike[str] | Sequence[float]
    classifier: ClassifierKind | None
    confidence: ConfidenceName | None
    propose: float | None
    confirm: Confirm | None
    vocab_subset: int | None
    exit_layers: int | str | Sequence[int] | None
    state_mode: StateMode | None
    exit_scope: ExitScope
    prompt_exit_layer: int | None
    prompt_exit_keep: int | None
    prune_layers: int | str | Sequence[int]
    prune_strategy: PruneStrategy | None
    prune_scope: PruneScope
    prune_profile: str | os.PathLike[str] | None
    prune_adapter: str | os.PathLike[str] | None
    certificate_any_task: bool
    target_reduction: float | None
    budget: BudgetStrategy | None
    target_latency_ms: float | None
    threshold_decay: float | None
    repetition_penalty: float | None
    final_block: bool | None
    classifier_warmup: int | None
    exits_check: bool
    prefix_caching: bool
    rebatch: bool
    rows_in_flight: int | None
    static_segments: bool | Literal["auto"] | None
    verify: bool
    verify_tokens: int | None
    measure_speed: bool
    roofline: RooflineDevice | None
    degenerate_ngram: int
    degenerate_tokens: int
    preset: Preset | None


class ModelKeywords(PolicyKeywords, total=False):
    """These, what is loaded beside the backbone, and the arguments of ``HFLM``."""

    exits: str | os.PathLike[str] | None
    mamba_kernels: MambaKernels | None
    pretrained: str | os.PathLike[str] | transformers.PreTrainedModel | None
    backend: Literal["default", "causal"]
    revision: str | None
    subfolder: str
    tokenizer: str | os.PathLike[str] | transformers.PreTrainedTokenizerBase | None
    truncation: bool
    logits_cache: bool
    max_length: int | None
    device: str | None
    dtype: str | torch.dtype | None
    softmax_dtype: str | torch.dtype | None
    mixed_precision_dtype: str | torch.dtype | None
    batch_size: int | str | None
    max_batch_size: int | None
    trust_remote_code: bool | None
    use_fast_tokenizer: bool
    add_bos_token: bool | None
    prefix_token_id: int | None
    parallelize: bool
    max_memory_per_gpu: int | str | None
    max_cpu_memory: int | str | None
    offload_folder: str | os.PathLike[str] | None
    device_map: str | Mapping[str, Any] | None
    tp_plan: str | Mapping[str, Any] | None
    peft: str | os.PathLike[str] | None
    delta: str | None
    autogptq: bool | str
    gptqmodel: bool
    gguf_file: str | None
    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_compute_dtype: str | torch.dtype
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    cache_dir: str
    force_download: bool
    local_files_only: bool
    low_cpu_mem_usage: bool
    token: str | bool | None
    use_safetensors: bool | None
    variant: str | None
    think_end_token: str | int | None
    enable_thinking: bool | None
    chat_template_args: Mapping[str, Any] | None
