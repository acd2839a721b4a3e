"""``--model dynamax``: the harness's ``HFLM`` with generation and scoring done by the early-exit engine.

Loading (dtype, revision, PEFT, chat templates and so on) is HFLM's own. Features live in their rooms: what is loaded in
``models``, requests in ``harness``, thresholds that follow a budget in ``budget``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import transformers
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from dynamax_lm_eval import argument_rules
from dynamax_lm_eval import config as arguments
from dynamax_lm_eval.budget.runner import BudgetRunner
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_policy, checked_engine, engine_without_weights
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup, prune_adapters, pruning
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import resolve_policy
from dynamax_lm_eval.files import check_output_path
from dynamax_lm_eval.harness import certificate as certificates
from dynamax_lm_eval.harness import describe, evaluate, hflm, naming, rows
from dynamax_lm_eval.harness.documents import Document, documents_of
from dynamax_lm_eval.harness.encoding import EncodedPair
from dynamax_lm_eval.harness.ledger import ResponseLedger
from dynamax_lm_eval.harness.requests import RequestSettings
from dynamax_lm_eval.harness.responder import Answer, Answers, Responder
from dynamax_lm_eval.keywords import ModelKeywords, PolicyKeywords
from dynamax_lm_eval.models import aliases, devices, loading
from dynamax_lm_eval.models.fingerprint import Fingerprints, weights_fingerprint
from dynamax_lm_eval.models.identity import tokenizer_fingerprint
from dynamax_lm_eval.models.source import ModelSource

evaluate.install()


@register_model("dynamax")
class DynamaxLM(HFLM):
    """Early-exit causal LM; takes the arguments of ``--model hf`` and those of ``config.DynamaxArgs``.

    For example ``lm = DynamaxLM("tiny-llama", threshold=0.8, device="cpu")``, and then
    ``lm_eval.simple_evaluate(lm, tasks=["trivia_demo"], task_manager=dynamax_lm_eval.task_manager())``.
    """

    #: Says in a line what runs, before tasks are evaluated.
    announces: ClassVar[bool] = True
    #: The argument ``backbone``, where the harness was given it and knows it as ``pretrained``.
    _typed_backbone: str | None = None

    @hflm.with_signature
    def __init__(
        self,
        backbone: str | os.PathLike[str] | transformers.PreTrainedModel | None = None,
        **kwargs: Unpack[ModelKeywords],
    ) -> None:
        """Checks every argument, then loads the backbone and compares the layer loop with its forward.

        Args:
            backbone: an alias (``tiny-llama``, ``smollm2-gguf``, ``mistral``, ...), a Hub id, a folder, or a loaded
                model; ``pretrained`` is another spelling.
            kwargs: ``threshold`` (a token exits where the confidence reaches it; 1: the full model), ``exits``,
                ``confidence``, ``state_mode``, ``exit_layers`` and others: ``dynamax-lm-eval arguments`` shows all.
                ``device``, ``dtype``, ``batch_size`` and others are those of ``HFLM``.

        Raises:
            UserError: an argument is wrong or cannot be honoured, or the architecture is not supported.
        """
        first = backbone if backbone is not None else kwargs.get("pretrained")
        model = first if isinstance(first, transformers.PreTrainedModel) else None
        given: dict[str, Any] = {**kwargs}
        if model is not None:
            given["pretrained"] = model.name_or_path or type(model).__name__
        elif backbone is not None:
            given["backbone"] = backbone
        self._given = given
        self.args, passed_on = arguments.parse_model_args(given, hflm.harness_arguments())
        self._loaded = self.args
        #: The folder or Hub id of the adapters that the backbone runs with.
        self.peft_adapters: str | None = passed_on.get("peft")
        source = self._source = ModelSource(self.args.backbone, passed_on, model)
        kernels = self.args.mamba_kernels or "auto"
        source.check_mamba_kernels(self.args.mamba_kernels)
        draft = None
        if model is None:
            draft = engine_without_weights(source.structure, source.longest_row, kernels)
        #: Whether several processes compute each block together.
        self.is_tensor_parallel = source.is_tensor_parallel
        if self.is_tensor_parallel:
            devices.check_tensor_parallel(source.config, draft.backbone.rung if draft is not None else None)
        # Runs without exits need not read the weights twice.
        prunes_by_file = self.args.prune_profile or self.args.prune_adapter
        if lookup.may_use_exits(self.args) or self.args.certificate or prunes_by_file:
            source.read_fingerprints()
        known = source.fingerprints
        hidden_size = draft.backbone.hidden_size if draft is not None else None
        self.exits = lookup.for_run(self.args, source.config, known, source.num_layers, hidden_size)
        self.certified = certificates.for_run(self.args, self._policy_for, known, self.exits)
        if self.certified is not None:
            self.args = replace(self.args, threshold=self.certified.thresholds)
        self.policy = self._policy_for(self.args)
        devices.check_state_mode(self.is_tensor_parallel, self.policy.state_mode)
        devices.check_whole_head(self.is_tensor_parallel, self.policy.vocab_subset)
        if draft is not None:
            draft.check_policy(self.policy)
            rows.check(self.args, draft.backbone)
        pruning.check_files(self.args.prune_profile, self.args.prune_adapter, known)
        #: Settings of the tasks of the present evaluation, as certificates bind them.
        self.run_settings: dict[str, dict[str, Any]] = {}
        #: Documents of each of its tasks that the exits were trained on.
        self.trained_on: dict[str, int] = {}

        self.AUTO_MODEL_CLASS = loading.auto_class(source.config)
        with loading.naming(f"backbone={self.args.backbone!r}"):
            super().__init__(pretrained=model if model is not None else source.path, **source.options)
        if not hasattr(self, "enable_thinking"):  # 0.5.0.dev1 keeps it among the arguments of the chat template only
            self.enable_thinking = self.chat_template_args.get("enable_thinking")
        if hasattr(self, "accelerator"):
            # HFLM sets these on GPUs only; without them every process would do all the work as rank 0 of 1.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        classifiers, self.exits_fingerprint = None, None
        if self.exits is not None:
            known = source.fingerprints_of(self.model)  # the weights may not have been on this machine before
            self.exits.check_fingerprint(known.current, self.args.exits_check, known.former)
            classifiers, self.exits_fingerprint = self.exits.load(), self.exits.fingerprint()
        dtype = self.mixed_precision_dtype
        loading.without_router_logits(self.model)
        self.engine = checked_engine(self.model, self.policy, self.max_length, classifiers, kernels, dtype)
        rows.check(self.args, self.engine.backbone)
        _use_segments(self)
        _use_pruning(self.engine, self.args, self.policy, lambda: source.fingerprints_of(self.model))
        if self.exits is not None and classifiers is not None:
            classifiers.narrow(self.model.dtype)
            self.exits.check_fits(source.config.model_type, self.engine.backbone.hidden_size, self.policy.num_layers)
        source.check_token_ids(self.engine.backbone.num_embeddings)
        self.response_ledger = ResponseLedger()
        self.responder = Responder(self, self.response_ledger)
        self.budget = BudgetRunner(self.args, self.policy, self.engine, self._world_size)
        if self.certified is not None:
            self.certified.certificate.check_model(self.identity())
        describe.warn_of_read_cost(self)

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
        if self.announces:
            describe.announce(self)
        self.run_settings = {name: certificates.run_settings(task, **settings) for name, task in tasks.items()}
        self.budget.start_run()
        self.trained_on = describe.documents_trained_on(self.exits, tasks, documents)
        if self.certified is not None:
            self.certified.check_tasks(self.run_settings, documents)

    def use(self, **changed: Unpack[PolicyKeywords]) -> Self:
        """Answers later requests under another policy, with what is loaded; returns the model itself.

        For example ``lm.use(threshold=0.9)``. Arguments that are not given are as the model was made with.

        Raises:
            UserError: an argument is wrong, or needs something else than what is loaded.
        """
        given = argument_rules.changed(self._given, changed)
        args, _ = arguments.parse_model_args(given, hflm.harness_arguments())
        if of_loading := sorted(set(changed) - set(arguments.OWN_ARGUMENTS)):
            raise UserError(f"{of_loading[0]} belongs to the loaded model and cannot change; make another DynamaxLM")
        if args.certificate is not None or BudgetRunner.is_asked_for(args):
            raise UserError(
                "a certificate and a budget choose thresholds for a model of their own; make one of the loaded "
                "weights: DynamaxLM(lm.model, ...)"
            )
        if self.exits is None and lookup.may_use_exits(args):
            lookup.check_none(args, self._source.config, self._source.fingerprints_of(self.model))
        self.use_policy(args)
        return self

    def use_policy(self, args: DynamaxArgs) -> None:
        """Answers later requests as ``args`` say, with the backbone and the exits that are loaded.

        Raises:
            UserError: the policy cannot be had with them, or names others.
        """
        assert args.certificate is None and not BudgetRunner.is_asked_for(args), "thresholds have to be known"
        for name in ("backbone", "exits", "mamba_kernels"):
            if name == "exits" and args.exits is None and not lookup.may_use_exits(args):
                continue  # it uses none
            if name == "exits" and self.exits is not None and args.exits == str(self.exits.path):
                continue  # found by the backbone, and named now
            if getattr(args, name) != getattr(self._loaded, name):
                raise UserError(f"{name} is loaded already and cannot change: {getattr(self._loaded, name)!r}")
        rows.check(args, self.engine.backbone)
        policy = self._policy_for(args)
        check_policy(self.engine, policy)
        _use_pruning(self.engine, args, policy, lambda: self._source.fingerprints_of(self.model))
        is_changed = args.static_segments != self.args.static_segments
        self.args, self.policy = args, policy
        if is_changed:
            _use_segments(self)
        self.certified, self.budget = None, BudgetRunner(args, policy, self.engine)
        # A cache of responses belongs to one policy; the harness attaches one anew where a run asks for it.
        self.set_cache_hook(CacheHook(None))

    def _policy_for(self, args: DynamaxArgs) -> ExitPolicy:
        exits = self.exits.config if self.exits is not None and lookup.may_use_exits(args) else None
        return resolve_policy(args, self._source.num_layers, exits, self._source.has_recurrence)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of ``generate_until`` requests."""

        def answer(policies: Sequence[ExitPolicy], chosen: Sequence[int], *shown: Any) -> Answers:
            settings = [RequestSettings(policy, self.args.repetition_penalty) for policy in policies]
            return self.responder.generations([*zip(settings, [requests[i] for i in chosen], strict=True)], *shown)

        return self._respond("generate_until", documents_of(requests), [r.args for r in requests], answer, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of continuations, through the exits."""
        pairs = self.responder.encode(requests, disable_tqdm)
        encoded = [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(encoded, disable_tqdm, documents=documents_of(requests))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[EncodedPair],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        documents: Sequence[Document] | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores of (context, continuation) token pairs; without ``documents``, each is one of its own."""

        def answer(policies: Sequence[ExitPolicy], chosen: Sequence[int], *shown: Any) -> Answers:
            return self.responder.scores(policies, [requests[i][1:] for i in chosen], *shown)

        named = documents if documents is not None else [("", f"request {i}") for i in range(len(requests))]
        return self._respond("loglikelihood", named, [texts for texts, _, _ in requests], answer, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of whole texts, in windows of the model's length.

        Requests of 0.4.13 are (text,) and take a number; those of 0.5.0.dev1 are ("", text) and take (number, False).
        """

        def answer(policies: Sequence[ExitPolicy], chosen: Sequence[int], *shown: Any) -> Answers:
            scores = self.responder.rolling_scores(policies, [requests[i].args[-1] for i in chosen], *shown)
            with closing(scores):
                for index, found in scores:
                    is_pair = len(requests[chosen[index]].args) > 1
                    yield index, replace(found, value=(found.value, False)) if is_pair else found

        keys = [request.args for request in requests]
        return self._respond("loglikelihood_rolling", documents_of(requests), keys, answer, disable_tqdm)

    def _respond(
        self,
        kind: str,
        documents: Sequence[Document],
        keys: Sequence[tuple[Any, ...]],
        answer_some: Callable[..., Answers],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answers requests; each answer is kept, with its compute, as soon as it is known.

        Args:
            kind: of the requests, as the harness names it.
            documents: of each request.
            keys: what the harness's cache knows each by.
            answer_some: takes policies, numbers of requests, their documents, and whether to hide progress.
        """

        def run(asked: Sequence[tuple[ExitPolicy, int]]) -> Answers:
            policies, chosen = [policy for policy, _ in asked], [index for _, index in asked]
            return answer_some(policies, chosen, [documents[i] for i in chosen], disable_tqdm or self.budget.in_blocks)

        evaluate.check_followed(self.response_ledger, describe.needs_tasks(self), by_hand=self.certified is None)
        answers: dict[int, Answer] = {}
        with closing(self.budget.answers(documents, self.policy, run, disable_tqdm)) as stream:
            for index, answer in stream:
                answers[index] = answer
                self.response_ledger.store(kind, keys[index], answer.record, answer.value)
                self.cache_hook.add_partial(kind, keys[index], answer.value)
        in_order = [answers[index] for index in range(len(keys))]
        self.response_ledger.keep(kind, zip(keys, (answer.record for answer in in_order), strict=True))
        return [answer.value for answer in in_order]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        if self.prefix_token_id is None and add_special_tokens is None:
            # HFLM would look for the text of a token that there is not; a tokenizer adds its tokens by default.
            add_special_tokens = self.add_bos_token is None or self.add_bos_token
        ids: list[int] = super().tok_encode(string, add_special_tokens, *args, **kwargs)
        return ids

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> DynamaxLM:
        tracker = sys._getframe(1).f_locals.get("evaluation_tracker")
        if given := getattr(tracker, "output_path", None):
            check_output_path(given)
        # The harness names the result folder after `pretrained` in this very dict.
        backbone = arg_dict.pop("backbone") if "backbone" in arg_dict and "pretrained" not in arg_dict else None
        if backbone is not None:
            arg_dict["pretrained"] = aliases.HUB_ALIASES.get(backbone, backbone)
        lm: DynamaxLM = super().create_from_arg_obj(
            arg_dict, hflm.beside(arg_dict, hflm.asked_for(additional_config or {}))
        )
        lm._typed_backbone = backbone
        return lm

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        name = f"tokenizer={tokenizer!r}" if tokenizer else f"the tokenizer of backbone={self.args.backbone!r}"
        with loading.naming(name):
            super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)

    def _create_model(self, *args: Any, quantization_config: Any = None, **kwargs: Any) -> None:
        quantization_config = hflm.quantization(kwargs) or quantization_config
        with hflm.loading_whole_models(self, kwargs), hflm.without_bar():
            super()._create_model(*args, quantization_config=quantization_config, **kwargs)

    def set_cache_hook(self, cache_hook: Any) -> None:
        if cache_hook.dbdict is not None:
            self.budget.check_no_cache()
            if self.is_tensor_parallel:
                raise UserError(
                    "--use_cache and tp_plan exclude each other: each process would go on from what it has answered"
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
        return self._source.fingerprints_of(self.model).current

    def identity(self) -> dict[str, Any]:
        """Everything that decides what is answered: weights, dtype, tokenizer, policy. Not batch or device."""
        return describe.identity(self)

    def get_model_info(self) -> dict[str, Any]:
        """What result files say of the model; the harness asks when it has evaluated."""
        info: dict[str, Any] = super().get_model_info()
        settings = describe.run_settings(self)
        name = naming.model_name(self.args.backbone, self.peft_adapters, settings["label"])
        # Who asks has the tracker that names the file, and what the user wrote; neither is ours to be given.
        asking = sys._getframe(1).f_locals
        if (tracker := asking.get("evaluation_tracker")) is not None:
            naming.name_tracker(tracker, name)
        given = naming.shown_arguments(asking.get("model_args"), self.args)
        naming.restore_arguments(asking.get("model_args"), self._typed_backbone)
        info |= {"model_name": name, "model_args": given, "dynamax": settings}
        shown: dict[str, Any] = naming.without_home(info)
        return shown


def _use_segments(lm: DynamaxLM) -> None:
    against = "blocks that several processes share" if lm.is_tensor_parallel else None
    lm.engine.use_segments(lm.args.static_segments, against)


def _use_pruning(
    engine: Engine, args: DynamaxArgs, policy: ExitPolicy, fingerprints: Callable[[], Fingerprints]
) -> None:
    """Loads the read-out of a pruned model; raises UserError where files that it needs are of other weights."""
    if args.prune_profile is not None or args.prune_adapter is not None:
        pruning.check_files(args.prune_profile, args.prune_adapter, fingerprints())
    if args.prune_adapter is not None and policy.prune_adapter is not None:
        load = partial(prune_adapters.load, Path(args.prune_adapter).expanduser(), policy.pruned_blocks)
        engine.add_prune_adapter(policy.prune_adapter, load)
