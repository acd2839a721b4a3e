"""``--model dynamax``: the harness's ``HFLM`` with generation and scoring done by the early-exit engine.

Loading (dtype, device, revision, PEFT, chat templates and so on) is HFLM's own. Requests come in as texts
and leave as texts or scores; token ids and policies go to the engine, compute records to the ledger.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from lm_eval import utils
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

import dynamax_lm_eval
from dynamax_lm_eval import config as arguments
from dynamax_lm_eval.budget.runner import BudgetRunner
from dynamax_lm_eval.compute.accounting import ComputeRecord, Trace, merge
from dynamax_lm_eval.compute.repetition import ends_in_repetition
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.parity import check_policy, checked_engine, engine_without_weights
from dynamax_lm_eval.engine.prefixes import ROOM_SHARE, PrefixRun
from dynamax_lm_eval.engine.requests import Generation, Scoring, ScoringRequest
from dynamax_lm_eval.engine.sampling import request_seed
from dynamax_lm_eval.engine.scoring import score
from dynamax_lm_eval.errors import NotFiniteError, RequestError, UserError
from dynamax_lm_eval.exits import checkpoint, pruning
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import resolve_policy
from dynamax_lm_eval.harness import certificate as certificates
from dynamax_lm_eval.harness import evaluate as harness
from dynamax_lm_eval.harness.certificate import CertifiedRun
from dynamax_lm_eval.harness.generation import GenerationSettings
from dynamax_lm_eval.harness.ledger import ResponseLedger
from dynamax_lm_eval.harness.requests import PreparedGeneration
from dynamax_lm_eval.harness.stopping import StopStrings
from dynamax_lm_eval.models import aliases, loading
from dynamax_lm_eval.models.fingerprint import (
    Fingerprints,
    fetched_files_fingerprints,
    files_fingerprints,
    model_fingerprints,
    weights_fingerprint,
)
from dynamax_lm_eval.models.identity import config_fingerprint, generation_settings, tokenizer_fingerprint

logger = logging.getLogger(__name__)

#: Share of free memory that ``batch_size=auto`` gives to K and V; the rest is for activations and logits.
_AUTO_MEMORY_SHARE = 0.5

#: Token ids of a context and its continuation.
TokenPair = tuple[list[int], list[int]]
#: Name of a task, and id of a document in it.
Document = tuple[str, Any]
#: Gets the index of a pair, (log-likelihood, is_greedy), and the compute.
ScoringSink = Callable[[int, tuple[float, bool], ComputeRecord], None]

harness.install()


@dataclass(frozen=True)
class RequestSettings:
    """What decides how a request is answered, beside the request itself."""

    policy: ExitPolicy
    repetition_penalty: float | None


@register_model("dynamax")
class DynamaxLM(HFLM):
    """Early-exit causal LM; takes the arguments of ``--model hf`` and those of ``config.DynamaxArgs``.

    ``backbone`` (or ``pretrained``) is an alias, a Hub id, a folder, or from Python a loaded model.
    """

    #: HFLM's: what loads the model; it sets it by the kind of model.
    AUTO_MODEL_CLASS: Any = None

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        """Checks every argument, then loads the backbone and compares the layer loop with its forward.

        Raises:
            UserError: an argument is wrong or cannot be honoured, or the architecture is not supported.
        """
        loaded = pretrained if isinstance(pretrained, transformers.PreTrainedModel) else None
        name = loaded.name_or_path or type(loaded).__name__ if loaded is not None else pretrained
        given = kwargs if name is None else {**kwargs, "pretrained": name}
        self.args, passed_on = arguments.parse_model_args(given, _harness_arguments())
        self._loaded = self.args
        passed_on["trust_remote_code"] = loading.trusts_remote_code(passed_on)
        source = (
            aliases.resolve_backbone(self.args.backbone, passed_on.get("subfolder") or "") if loaded is None else ""
        )
        config = loaded.config if loaded is not None else loading.load_config(source, self.args.backbone, passed_on)
        loading.check_architecture(config)
        if self.args.mamba_kernels is not None and not loading.is_recurrent(config):
            raise UserError(
                f"mamba_kernels has no effect on {config.model_type!r}, which has no Mamba blocks; remove it"
            )
        if loaded is None and not _is_launched():
            passed_on["device"] = loading.resolve_device(passed_on.get("device"))
        self._token_arguments = {name: passed_on.get(name) for name in ("prefix_token_id", "think_end_token")}
        if not passed_on.get("peft"):  # an adapter may bring tokens of its own
            loading.check_token_ids(self._token_arguments, config.get_text_config().vocab_size)
        self._weights_from = (loaded, source, dict(passed_on))
        draft = None if loaded is not None else self._engine_without_weights(config, passed_on)
        # Runs without exits need not read the weights twice.
        needed = checkpoint.may_use_exits(self.args) or self.args.certificate or self.args.prune_profile
        self._fingerprints = self._files_fingerprints() if needed else None
        self.exits = checkpoint.for_run(self.args, config, self._fingerprints)
        self.certified = self._certified_run(config, self._fingerprints.current if self._fingerprints else None)
        #: Settings of the tasks of the present evaluation, as certificates bind them.
        self.run_settings: dict[str, dict[str, Any]] = {}
        self.policy = self._policy_for(self.args, config)
        if draft is not None:
            draft.check_policy(self.policy)
        if self._fingerprints is not None:
            self._check_prune_profile(self.args)

        if passed_on.get("peft"):
            loading.check_peft(passed_on["peft"])
        with loading.naming(f"backbone={self.args.backbone!r}"):
            super().__init__(pretrained=loaded if loaded is not None else source, **passed_on)
        if hasattr(self, "accelerator"):
            # HFLM sets these on GPUs only; without them every process would do all the work as rank 0 of 1.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        self._check_alone()
        self.response_ledger = ResponseLedger()
        self._check_prune_profile(self.args)
        classifiers, self._exits_fingerprint = None, None
        if self.exits is not None:
            known = self._known_fingerprints()  # the weights may not have been on this machine before
            self.exits.check_fingerprint(known.current, self.args.exits_check, known.former)
            classifiers, self._exits_fingerprint = self.exits.load(self.model.device), self.exits.fingerprint()
        with self._autocast():
            self.engine = checked_engine(
                self.model, self.policy, self.max_length, classifiers, self.args.mamba_kernels or "auto"
            )
        loading.check_token_ids(self._token_arguments, self.engine.backbone.num_embeddings)
        if self.certified is not None:
            self.certified.certificate.check_model(self.identity())
        self.budget = BudgetRunner(self.args, self.policy, self.engine)
        #: Of the requests whose tokens are scored next (task and document of each).
        self._documents: list[Document] = []
        self._warn_of_read_cost()

    def _engine_without_weights(self, config: Any, options: Mapping[str, Any]) -> Engine | None:
        length = options.get("max_length") or getattr(config.get_text_config(), "max_position_embeddings", None) or 0
        return engine_without_weights(config, options, int(length), self.args.mamba_kernels or "auto")

    def _certified_run(self, config: Any, fingerprint: str | None) -> CertifiedRun | None:
        """The certificate of the run, if it names one; its thresholds become those of the run."""
        if self.args.certificate is None:
            return None
        policy = self._policy_for(self.args, config)
        path, certificate = certificates.find_certificate(
            self.args.certificate, self.args.backbone, fingerprint, self.exits, policy.describe()
        )
        self.args = replace(self.args, threshold=tuple(certificate.thresholds))
        return CertifiedRun(path, certificate, self.args.certificate_any_task)

    def _check_alone(self) -> None:
        if self._world_size > 1 and BudgetRunner.is_asked_for(self.args):
            raise UserError(
                "target_reduction and target_latency_ms follow one sequence of documents and cannot be shared by "
                f"{self._world_size} processes; run one"
            )

    def begin_run(
        self, tasks: Mapping[str, Any], documents: Callable[[str], list[str]], settings: Mapping[str, Any]
    ) -> None:
        """Called before tasks are evaluated.

        Args:
            tasks: of the harness, by name.
            documents: gives the hashes of the documents of each that will be evaluated.
            settings: ``apply_chat_template``, ``system_instruction`` and ``fewshot_as_multiturn`` of the run.

        Raises:
            UserError: the certificate does not allow this run.
        """
        self.run_settings = {name: certificates.run_settings(task, **settings) for name, task in tasks.items()}
        self.budget.start_run()
        if self.certified is not None:
            self.certified.check_tasks(self.run_settings, documents)

    def use_policy(self, args: DynamaxArgs) -> None:
        """Answers later requests as ``args`` say, with the backbone and the exits that are loaded.

        Raises:
            UserError: the policy cannot be had with them, or names others.
        """
        assert args.certificate is None and not BudgetRunner.is_asked_for(args), (
            "only thresholds that are known can be followed"
        )
        for name in ("backbone", "exits", "mamba_kernels"):
            if name == "exits" and args.exits is None and not checkpoint.may_use_exits(args):
                continue  # it uses none
            if getattr(args, name) != getattr(self._loaded, name):
                raise UserError(f"{name} is loaded already and cannot change: {getattr(self._loaded, name)!r}")
        policy = self._policy_for(args, self.model.config)
        check_policy(self.engine, policy)
        self._check_prune_profile(args)
        self.args, self.policy = args, policy
        self.certified, self.budget = None, BudgetRunner(args, policy, self.engine)
        # A cache of responses belongs to one policy; the harness attaches one anew where a run asks for it.
        self.set_cache_hook(CacheHook(None))

    @property
    def setting(self) -> RequestSettings:
        """Of the requests that come now."""
        return RequestSettings(self.policy, self.args.repetition_penalty)

    def is_degenerate(self, tokens: Sequence[int]) -> bool:
        """Whether a generation ends in repetition, as the arguments define it."""
        return ends_in_repetition(tokens, self.args.degenerate_ngram, self.args.degenerate_tokens)

    def _policy_for(self, args: DynamaxArgs, config: Any) -> ExitPolicy:
        policy = resolve_policy(
            args,
            int(config.get_text_config().num_hidden_layers),
            self.exits.config if self.exits is not None and checkpoint.may_use_exits(args) else None,
            recurrent_backbone=loading.is_recurrent(config),
        )
        for note in policy.notes:
            logger.warning("%s", note)
        return policy

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> DynamaxLM:
        # The harness names the result folder after `pretrained` in this very dict.
        if "backbone" in arg_dict and "pretrained" not in arg_dict:
            backbone = arg_dict.pop("backbone")
            arg_dict["pretrained"] = aliases.HUB_ALIASES.get(backbone, backbone)
        lm: DynamaxLM = super().create_from_arg_obj(arg_dict, additional_config)
        return lm

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        name = f"tokenizer={tokenizer!r}" if tokenizer else f"the tokenizer of backbone={self.args.backbone!r}"
        with loading.naming(name):
            super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)

    def _create_model(self, *args: Any, quantization_config: Any = None, **kwargs: Any) -> None:
        # transformers 5 takes these as a configuration only; HFLM still passes them one by one.
        given = {name: kwargs.pop(name) for name in arguments.QUANTIZATION_ARGUMENTS if name in kwargs}
        if given.get("load_in_4bit") or given.get("load_in_8bit"):
            configuration: Any = transformers.BitsAndBytesConfig
            quantization_config = configuration(**given)
        elif any(name.startswith("bnb_") for name in given):
            raise UserError(f"{', '.join(sorted(given))}: needs load_in_4bit=True to have a meaning")
        others = [name for name in ("peft", "delta", "autogptq", "gptqmodel") if kwargs.get(name)]
        backbone = f"backbone={self.args.backbone!r}"

        def name_of(loaded_from: str) -> str:
            return f"delta={loaded_from!r}" if loaded_from == kwargs.get("delta") else backbone

        # HFLM loads the backbone, and the weights of a delta, through this attribute.
        auto_class = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = loading.CompleteModels(auto_class, name_of)
        try:
            with loading.naming(", ".join(f"{name}={kwargs[name]!r}" for name in others) or backbone):
                super()._create_model(*args, quantization_config=quantization_config, **kwargs)
                if kwargs.get("peft"):
                    loading.check_adapter_weights(self._model, kwargs["peft"], kwargs["revision"])
        finally:
            self.AUTO_MODEL_CLASS = auto_class

    def set_cache_hook(self, cache_hook: Any) -> None:
        if cache_hook.dbdict is not None:
            if self.budget.has_budget:
                raise UserError(
                    "--use_cache and target_reduction or target_latency_ms exclude each other: an answer depends on "
                    "what ran before it"
                )
            self.response_ledger.use_database(cache_hook.dbdict, self.identity())
        else:
            self.response_ledger.leave_database()
        super().set_cache_hook(cache_hook)

    @property
    def weights(self) -> str:
        """Fingerprint of the backbone's weights as they are now."""
        return weights_fingerprint(self.model)

    @property
    def tokenizer_content(self) -> str:
        """Fingerprint of the tokenizer as it is now."""
        return tokenizer_fingerprint(self.tokenizer)

    def backbone_fingerprint(self) -> str:
        """Fingerprint of the backbone's weight files, by which exits and certificates are found."""
        return self._known_fingerprints().current

    def _known_fingerprints(self) -> Fingerprints:
        """Of the backbone, which is loaded by now."""
        if self._fingerprints is None:
            self._fingerprints = self._files_fingerprints() or model_fingerprints(self.model)
        return self._fingerprints

    def _files_fingerprints(self) -> Fingerprints | None:
        """Of weight files, which are downloaded where they are not here; None where there are none."""
        loaded, source, options = self._weights_from
        if loaded is not None:
            found: Fingerprints | None = model_fingerprints(loaded)
        else:
            found = files_fingerprints(source, options) or fetched_files_fingerprints(source, options)
        if found is not None and (changed := options.get("peft") or options.get("delta")):
            found = found.changed_by(changed)  # not the weights that exits were trained for
        return found

    def _check_prune_profile(self, args: DynamaxArgs) -> None:
        if args.prune_profile is not None:
            pruning.check_profile(args.prune_profile, self._known_fingerprints())

    def identity(self) -> dict[str, Any]:
        """Everything that decides what is answered: weights, dtype, tokenizer, policy. Not batch or device."""
        return {
            "weights": self.weights,
            "config": config_fingerprint(self.model.config),
            "dtype": str(self.model.dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "tokenizer": self.tokenizer_content,
            "add_bos_token": self.add_bos_token,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "prefix_token_id": self.prefix_token_id,
            "think_end_token": self.think_end_token,
            "generation_config": generation_settings(self.model.generation_config),
            "repetition_penalty": self.args.repetition_penalty,
            "exits": self._exits_fingerprint,
            "policy": self.policy.describe(),
            "degenerate": [self.args.degenerate_ngram, self.args.degenerate_tokens],
        }

    def get_model_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super().get_model_info()
        backbone = self.engine.backbone
        return info | {
            "model_name": self.args.backbone,
            "dynamax": {
                "version": dynamax_lm_eval.__version__,
                "backbone": self.args.backbone,
                "resolved_backbone": getattr(self.model, "name_or_path", None),
                "revision": self.revision,
                "exits": str(self.exits.path) if self.exits is not None else None,
                "exits_fingerprint": self._exits_fingerprint,
                "exits_config": self.exits.config.to_json() if self.exits is not None else None,
                "preset": self.args.preset,
                "preset_sets": self._preset_sets(),
                "policy": self._described_policy(),
                "policy_note": "; ".join(self.policy.notes) or None,
                "budget": self.budget.describe(),
                "certificate": self.certified.describe() if self.certified is not None else None,
                "confidence_chosen_by": "user" if self.args.confidence is not None else "default",
                "repetition_penalty": self.args.repetition_penalty,
                "lm_head_read_in_blocks": backbone.cost.lm_head / backbone.cost.mean_block_weights,
            },
        }

    def _described_policy(self) -> dict[str, Any]:
        described = self.policy.describe()
        if self.budget.has_budget:
            described["thresholds"] = None  # they are in the budget's trajectory
        return described

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of ``generate_until`` requests; each is cached as soon as it is finished."""
        texts: list[str] = [""] * len(requests)
        records: list[ComputeRecord] = [ComputeRecord()] * len(requests)

        def answer(asked: Sequence[tuple[ExitPolicy, int]], keep: bool) -> list[ComputeRecord]:
            found = [ComputeRecord()] * len(asked)

            def finished(place: int, text: str, _tokens: list[int], record: ComputeRecord) -> None:
                found[place], index = record, asked[place][1]
                if keep:
                    texts[index], records[index] = text, record
                    args = requests[index].args
                    self.response_ledger.store("generate_until", args, record, text)
                    self.cache_hook.add_partial("generate_until", args, text)

            settings = [
                (RequestSettings(policy, self.args.repetition_penalty), requests[index]) for policy, index in asked
            ]
            self.answer_generations(settings, finished, disable_tqdm or self.budget.in_blocks)
            return found

        self._check_followed()
        self.budget.run(_documents(requests), self.policy, answer, disable_tqdm)
        self.response_ledger.keep("generate_until", zip((r.args for r in requests), records, strict=True))
        return texts

    def answer_generations(
        self,
        asked: Sequence[tuple[RequestSettings, Any]],
        finished: Callable[[int, str, list[int], ComputeRecord], None],
        disable_tqdm: bool = False,
    ) -> None:
        """Answers ``generate_until`` requests of the harness, each under a setting of its own.

        ``finished`` gets the index, the text, the generated tokens and the compute of each as soon as it is done.
        """
        if not asked:
            return
        end = self.eot_token_id
        eos = None if end is None else self.tok_decode(end, skip_special_tokens=False)
        known: dict[str, tuple[GenerationSettings, StopStrings]] = {}  # most requests of a call share theirs
        prepared = []
        for setting, request in asked:
            with _of_document(_document(request)):
                prepared.append(
                    PreparedGeneration(self, setting.policy, setting.repetition_penalty, request, eos, known)
                )
        self._seed_samplers([setting for setting, _ in asked], prepared)
        longest = max(len(job.request.prompt) + job.request.max_new_tokens for job in prepared)
        with self._timed("generate_until"), self._progress(len(asked), "generate_until", disable_tqdm) as progress:

            def answer(index: int, generation: Generation) -> None:
                job = prepared[index]
                record = self._ran(generation.trace, job.request.policy)
                if self.is_degenerate(generation.tokens):
                    record.degenerate = 1
                finished(index, job.text(generation.tokens), generation.tokens, record)
                progress.advance(record)

            try:
                prefixes = generate(
                    self.engine,
                    [job.request for job in prepared],
                    self._rows_in_flight(longest),
                    answer,
                    self.args.prefix_caching,
                )
            except RequestError as error:
                raise _naming_document(error, _document(asked[error.index][1])) from error
        self._ran_prefixes(prefixes)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of continuations, through the exits."""
        self._check_followed()
        if self.enable_thinking:
            tasks = sorted({task for task, _ in _documents(requests)})
            raise UserError(f"enable_thinking=true is for generations only, and {', '.join(tasks)} asks for scores")
        encoded = []
        for request in tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm):
            with _of_document(_document(request)):
                encoded.append((request.args, *self._encode(*request.args)))
        self._documents = _documents(requests)
        try:
            return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
        finally:
            self._documents = []

    def _encode(self, context: str, continuation: str) -> TokenPair:
        """Token ids of a context and of its continuation, as the harness splits them.

        The harness's own ``hf`` ends in an assertion in two cases that have an answer: a context that is made of
        spaces, which belong to the continuation, counts as empty; and where one token holds the end of the context and
        all of the continuation, the continuation is encoded alone.

        Raises:
            UserError: there is nothing to score, or nothing to score it after.
        """
        if context:
            pair: TokenPair = self._encode_pair(context, continuation)
            if all(pair):
                return pair
            continuation_with_spaces = context[len(context.rstrip()) :] + continuation
        else:
            pair, continuation_with_spaces = ([], []), continuation
        alone = self.tok_encode(continuation_with_spaces, add_special_tokens=False) if continuation else []
        if not alone:
            what = "an empty continuation" if not continuation else f"the continuation {continuation!r}, without tokens"
            raise UserError(f"cannot score {what}; check the task's doc_to_choice or doc_to_target")
        if pair[0]:
            return pair[0], alone
        prefix = self._needed_prefix()
        if alone[0] != prefix:
            return [prefix], alone
        if len(alone) == 1:
            raise UserError(
                f"cannot score the continuation {continuation!r} after an empty context: it is the token that stands "
                "for the context; give another, prefix_token_id="
            )
        return alone[:1], alone[1:]

    def _needed_prefix(self) -> int:
        """The token that stands before what has no context; UserError where the tokenizer has none for it."""
        prefix: int | None = self.prefix_token_id
        if prefix is None:
            raise UserError(
                "the context is empty and the tokenizer has neither a BOS nor an EOS token to stand for it; name a "
                "token by its id: prefix_token_id="
            )
        return prefix

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if self.prefix_token_id is None and add_special_tokens is None:
            # HFLM would look for the text of a token that there is not; a tokenizer adds its tokens by default.
            add_special_tokens = self.add_bos_token is None or self.add_bos_token
        ids: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores of (context, continuation) token pairs through the exits."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        records: list[ComputeRecord] = [ComputeRecord()] * len(requests)

        def answer(asked: Sequence[tuple[ExitPolicy, int]], keep: bool) -> list[ComputeRecord]:
            found = [ComputeRecord()] * len(asked)

            def finished(place: int, scored: tuple[float, bool], record: ComputeRecord) -> None:
                found[place], index = record, asked[place][1]
                if keep:
                    answers[index], records[index] = scored, record
                    texts = requests[index][0]
                    self.response_ledger.store("loglikelihood", texts, record, scored)
                    self.cache_hook.add_partial("loglikelihood", texts, scored)

            pairs = [requests[index][1:] for _, index in asked]
            hidden = disable_tqdm or self.budget.in_blocks
            named = [documents[index] for _, index in asked]
            self.answer_scorings([policy for policy, _ in asked], pairs, named, finished, hidden)
            return found

        documents = self._documents_of(requests)
        self.budget.run(documents, self.policy, answer, disable_tqdm)
        self.response_ledger.keep("loglikelihood", zip((texts for texts, _, _ in requests), records, strict=True))
        return answers

    def _documents_of(self, requests: Sequence[Any]) -> list[Document]:
        """Task and document of each request whose tokens are scored now."""
        # Called directly, requests say nothing of documents: each is one.
        documents, self._documents = self._documents or [("", f"request {i}") for i in range(len(requests))], []
        assert len(documents) == len(requests)
        return documents

    def answer_scorings(
        self,
        policies: Sequence[ExitPolicy],
        pairs: Sequence[TokenPair],
        documents: Sequence[Document],
        finished: ScoringSink,
        disable_tqdm: bool = False,
    ) -> None:
        """Scores (context, continuation) token pairs of documents, each under a policy of its own.

        ``finished`` gets the index, (log-likelihood, is_greedy) and the compute of each as soon as it is done.
        """
        kind = "loglikelihood"
        with self._timed(kind), self._progress(len(pairs), kind, disable_tqdm) as progress:

            def answer(index: int, result: tuple[float, bool], record: ComputeRecord) -> None:
                finished(index, result, record)
                progress.advance(record)

            self._score(policies, pairs, documents, answer)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's length."""
        kind = "loglikelihood_rolling"
        values = [0.0] * len(requests)
        records: list[ComputeRecord] = [ComputeRecord()] * len(requests)

        def answer(asked: Sequence[tuple[ExitPolicy, int]], keep: bool) -> list[ComputeRecord]:
            found = [ComputeRecord()] * len(asked)

            def finished(place: int, value: float, record: ComputeRecord) -> None:
                found[place], index = record, asked[place][1]
                if keep:
                    values[index], records[index] = value, record
                    args = (requests[index].args[0],)
                    self.response_ledger.store(kind, args, record, value)
                    self.cache_hook.add_partial(kind, args, value)

            hidden = disable_tqdm or self.budget.in_blocks
            self._answer_rolling([(policy, requests[index]) for policy, index in asked], finished, hidden)
            return found

        self._check_followed()
        self.budget.run(_documents(requests), self.policy, answer, disable_tqdm)
        self.response_ledger.keep(kind, zip(((request.args[0],) for request in requests), records, strict=True))
        return values

    def _answer_rolling(
        self,
        asked: Sequence[tuple[ExitPolicy, Any]],
        finished: Callable[[int, float, ComputeRecord], None],
        disable_tqdm: bool,
    ) -> None:
        """Scores whole texts, each under a policy of its own; ``finished`` gets index, log-likelihood and compute."""
        windows: list[TokenPair] = []
        owner: list[int] = []
        for index, (_, request) in enumerate(asked):
            with _of_document(_document(request)):
                tokens = self.tok_encode(request.args[0])
                prefix = self._needed_prefix() if tokens else 0
            rolling = utils.get_rolling_token_windows(
                token_list=tokens, prefix_token=prefix, max_seq_len=self.max_length, context_len=1
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append(window)
                owner.append(index)

        sums = [0.0] * len(asked)
        parts: list[list[ComputeRecord]] = [[] for _ in asked]
        open_windows = Counter(owner)

        def answer(index: int) -> None:
            record = merge(parts[index])
            finished(index, sums[index], record)
            progress.advance(record)

        def scored(window: int, result: tuple[float, bool], record: ComputeRecord) -> None:
            index = owner[window]
            sums[index] += result[0]
            parts[index].append(record)
            open_windows[index] -= 1
            if not open_windows[index]:
                answer(index)

        kind = "loglikelihood_rolling"
        with self._timed(kind), self._progress(len(asked), kind, disable_tqdm) as progress:
            for index in range(len(asked)):
                if not open_windows[index]:  # an empty text has no windows and log-likelihood 0
                    answer(index)
            documents = [_document(asked[index][1]) for index in owner]
            self._score([asked[index][0] for index in owner], windows, documents, scored)

    def _score(
        self,
        policies: Sequence[ExitPolicy],
        pairs: Sequence[TokenPair],
        documents: Sequence[Document],
        finished: ScoringSink,
    ) -> None:
        """Scores token pairs of documents; calls ``finished(index, (log-likelihood, is_greedy), record)`` for each.

        Pairs with the same context that differ only in the last token share one row (unless
        ``logits_cache=False``): the split between context and continuation decides who may exit, so it is
        part of what must be equal.
        """
        groups: dict[Any, list[int]] = {}
        fed: list[tuple[list[int], int, ExitPolicy]] = []
        for index, (policy, (context, continuation)) in enumerate(zip(policies, pairs, strict=True)):
            with _of_document(documents[index]):
                ids, context_length = self._fit(context, continuation)
            key = (tuple(ids), context_length, policy) if self.logits_cache else index
            if key not in groups:
                groups[key] = []
                fed.append((ids, context_length, policy))
            groups[key].append(index)
        members = list(groups.values())
        requests = [
            ScoringRequest(
                ids=ids,
                context_length=context_length,
                targets=[
                    *([token] for token in ids[context_length:]),
                    [pairs[index][1][-1] for index in group],
                ],
                policy=policy,
            )
            for (ids, context_length, policy), group in zip(fed, members, strict=True)
        ]

        def share(row: int, scoring: Scoring) -> None:
            record = self._ran(scoring.trace, requests[row].policy)
            common = [line[0] for line in scoring.log_probs[:-1]]
            common_greedy = all(
                token == target[0]
                for token, target in zip(scoring.greedy_tokens[:-1], requests[row].targets[:-1], strict=True)
            )
            for index, last in zip(members[row], scoring.log_probs[-1], strict=True):
                greedy = common_greedy and scoring.greedy_tokens[-1] == pairs[index][1][-1]
                finished(index, (sum(common) + last, greedy), record)

        longest = max((len(request.ids) for request in requests), default=1)
        try:
            prefixes = score(
                self.engine,
                requests,
                self._rows_in_flight(longest),
                share,
                self.softmax_dtype,
                self.args.prefix_caching,
            )
        except RequestError as error:
            raise _naming_document(error, documents[members[error.index][0]]) from error
        self._ran_prefixes(prefixes)

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Tokens to feed and how many of them are context, cut from the left to the model's length."""
        if not continuation:
            raise UserError("cannot score an empty continuation; check the task's doc_to_choice or doc_to_target")
        if not context:
            raise UserError("cannot score a continuation without a token before it; give one, prefix_token_id=")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}; "
                "shorten it, or give max_length="
            )
        self.engine.backbone.check_ids([*context, *continuation])
        whole = (context + continuation)[-(self.max_length + 1) :]
        if len(whole) < len(context) + len(continuation):
            logger.warning(
                "Context (%d tokens) and continuation (%d) exceed max_length=%d; cutting the context from the left",
                len(context),
                len(continuation),
                self.max_length,
            )
        return whole[:-1], len(whole) - len(continuation)

    def _check_followed(self) -> None:
        """Raises UserError where the harness asks and knows nothing of what certificates and budgets need."""
        argument = "a certificate" if self.certified is not None else "a budget" if self.budget.has_budget else None
        harness.check_followed(self.response_ledger, argument)

    def _ran(self, trace: Trace, policy: ExitPolicy) -> ComputeRecord:
        record = self.engine.account(trace, policy)
        self.response_ledger.physical.add_row(record)
        return record

    def _ran_prefixes(self, runs: Sequence[PrefixRun]) -> None:
        for run in runs:
            self.response_ledger.physical.add_prefix(self.engine.account(run.trace, run.policy), run.uses)

    def _preset_sets(self) -> dict[str, Any] | None:
        """What the preset decided, so that the result file tells it from what the user gave."""
        if self.args.preset is None:
            return None
        policy = self.policy
        return {
            "final_block": policy.final_block,
            "state_mode": policy.state_mode,
            "repetition_penalty": self.args.repetition_penalty,
        }

    def _seed_samplers(self, settings: Sequence[RequestSettings], jobs: Sequence[PreparedGeneration]) -> None:
        repeats: Counter[tuple[RequestSettings, str]] = Counter()
        for setting, job in zip(settings, jobs, strict=True):
            if job.request.sampler.do_sample:
                occurrence = repeats[setting, job.key]
                job.request.sampler.seed = request_seed(torch.initial_seed(), job.key, occurrence)
                repeats[setting, job.key] += 1

    def _rows_in_flight(self, longest: int) -> int:
        """``batch_size``; for ``auto``, as many rows of ``longest`` tokens as memory holds states for."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        backbone = self.engine.backbone
        per_row = backbone.row_bytes(longest) * (1 + ROOM_SHARE if self.args.prefix_caching else 1)
        rows = int(_AUTO_MEMORY_SHARE * _free_memory(backbone.device) / per_row)
        rows = max(1, min(rows, self.max_batch_size or rows))
        logger.info("batch_size=auto: %d rows of up to %d tokens in flight", rows, longest)
        self.batch_sizes[0] = rows
        return rows

    def _warn_of_read_cost(self) -> None:
        if self.args.confidence is None and self.exits is None and self.policy.active_exits:
            cost = self.engine.backbone.cost
            logger.warning(
                "No trained exits are known for this backbone and no confidence was named, so this run uses "
                "confidence=softmax. Each of its LM-head reads costs as much as %.1f blocks here, so compute_reduction "
                "can fall below 1; confidence=state costs nothing",
                cost.lm_head / cost.mean_block_weights,
            )

    def _autocast(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self._autocast():
                yield
        finally:
            self.response_ledger.seconds[kind] += time.perf_counter() - start

    @contextmanager
    def _progress(self, total: int, kind: str, disable: bool) -> Iterator[Progress]:
        with tqdm(total=total, disable=disable or self.rank != 0, desc=f"Running {kind} requests") as bar:
            yield Progress(bar)


class Progress:
    """A progress bar that also shows the reduction so far."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._full = 0
        self._spent = 0

    def advance(self, record: ComputeRecord) -> None:
        self._full += record.full_macs
        self._spent += record.spent_macs
        if self._spent:
            self._bar.set_postfix_str(f"compute_reduction={self._full / self._spent:.3f}", refresh=False)
        self._bar.update(1)


def _document(request: Any, place: int = 0) -> Document:
    """Task and document of a request; one that was made by hand, and says nothing of them, is its own document."""
    task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return "" if task is None else str(task), f"request {place}" if document is None else document


def _documents(requests: Sequence[Any]) -> list[Document]:
    """Task and document of each request."""
    return [_document(request, place) for place, request in enumerate(requests)]


def _named(document: Document) -> str:
    """A document in words."""
    task, doc_id = document
    return f"document {doc_id} of task {task!r}" if task else str(doc_id)


@contextmanager
def _of_document(document: Document) -> Iterator[None]:
    """Puts task and document before errors of what one request asks for."""
    try:
        yield
    except UserError as error:
        if not document[0]:
            raise
        raise UserError(f"{_named(document)}: {error}") from error


def _naming_document(error: RequestError, document: Document) -> UserError:
    """An error of one computation as one that names its document."""
    where = f"for {_named(document)}"
    if isinstance(error, NotFiniteError):
        return UserError(
            f"the model computed {error.what} that are not finite {where}; try dtype=float32, or check the weights"
        )
    return UserError(f"the generation arguments cannot be followed {where}: {error}; check their values")


def _is_launched() -> bool:
    """Whether this is one of several processes, whose devices the launcher gives them."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _harness_arguments() -> frozenset[str]:
    """Names that HFLM takes, without the two that only make sense inside it."""
    return frozenset(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
