"""lm-eval (EleutherAI's evaluation harness) on a checkpoint in process: the model ``rdlm``. The only file
that imports lm_eval.

Log-likelihoods come from the checkpoint's objective, texts from the engine that the server runs, so the
numbers are those of ``local-completions`` against ``rdlm serve``; of masked models, which have a bound
too, with estimator=left_to_right. The name of the estimator and its K go into the results' ``config``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from eval.options import check_steps
from eval.provenance import machine
from eval.texts.likelihood import ESTIMATORS, Score, score_continuations
from rdlm.checkpoints.folder import CONFIG, WEIGHTS, Loaded, load
from rdlm.config.base import parse
from rdlm.data.manifest import file_sha256
from rdlm.data.tokenizer import Tokenizer
from rdlm.device import usable_device as rdlm_device
from rdlm.device import usable_dtype
from rdlm.errors import UserError, reason
from rdlm.sampling_params import NUMBERS, SamplingParams, check_masked, check_sampler
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served
from serve.settings import EngineSettings

logger = logging.getLogger("rdlm.eval")

ARGUMENTS = (
    "checkpoint", "num_steps", "seed", "estimator", "num_draws", "dtype", "device", "batch_size",
    "max_length", "kv_cache", "add_bos_token",
)  # fmt: skip
MAX_GEN_TOKS = 256
"""Most tokens of an answer where a task names no limit: lm-eval's own default."""
SAMPLING = (*NUMBERS, "sampler", "bridge")
MASKED_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "order")
LM_EVAL_DEVICE = "cuda:0"
NOT_IN_KEYS = ("checkpoint", "training_step", "tied_documents", "machine")
"""Facts about a model that decide no result: names, and what is counted on the way."""


@dataclass
class Sweep:
    """The K that one command asks for, each a run of lm_eval of its own, and what the first run has scored
    for all of them."""

    ks: tuple[int, ...] = ()
    scores: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, Score]] = field(default_factory=dict)


SWEEP = Sweep()
"""Filled by ``run_sweep``. lm_eval builds models by name from their arguments, so there is no other way to
hand it over."""


@register_model("rdlm")
class RecurrentLM(TemplateLM):
    """``--model rdlm --model_args checkpoint=FOLDER,num_steps=8,...``; raises UserError for arguments it
    cannot use.

    num_steps: K, by default the checkpoint's. seed: of noise draws and sampling. estimator: "normalised"
    (a sampling checkpoint has one at K = 1 only, whatever num_steps is) or "mixture" (sampling checkpoints
    at K
    > 1, over ``num_draws`` draws; see eval/texts/likelihood.py on is_greedy). Masked checkpoints have "bound"
    (default), at num_steps, and "left_to_right", exact and the same whatever num_steps is. batch_size:
    rows of a scoring pass and texts in flight. max_length: context, by default the model's. kv_cache: of
    generation, as in ``rdlm serve``. add_bos_token: put it before every context that is not empty.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        estimator: str | None = None,
        num_draws: int = 8,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        kv_cache: str = "shared",
        add_bos_token: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name, value in unknown.items():
            raise UserError(
                f"model_args: {name}",
                value,
                "there is no such argument",
                f"use some of {', '.join(ARGUMENTS)}",
            )
        if checkpoint is None:
            raise UserError(
                "model_args: checkpoint", None, "is missing", "write --model_args checkpoint=FOLDER"
            )
        self.folder, self.add_bos_token = Path(str(checkpoint)), flag("add_bos_token", add_bos_token)
        self.seed, self.num_draws = whole_number("seed", seed, 0), whole_number("num_draws", num_draws, 1)
        self.batch_size = whole_number(
            "batch_size", int(batch_size) if str(batch_size).isdecimal() else batch_size, 1, 1024
        )
        given = {
            "device": usable_device(device),
            "dtype": dtype,
            "kv_cache": kv_cache,
            "max_slots": self.batch_size,
        }
        self.settings: EngineSettings = parse(EngineSettings, given, "--model_args")
        self.loaded, self.text = _load(self.folder, self.settings)
        self._device = next(self.loaded.denoiser.parameters()).device
        self.num_steps = self._steps(num_steps)
        self.estimator = self._estimator(estimator)
        self.scored_steps = self._scored_steps(self.num_steps)
        if self.scored_steps != self.num_steps:
            logger.warning(
                "log-likelihoods are those at K = 1, the normalised ones; num_steps=%d acts on texts",
                self.num_steps,
            )
        logger.info("log-likelihoods are %s", self._named_estimator())
        self.tied_documents = 0
        # lm-eval's length leaves out the last token, which a causal model need not see.
        limit = self.loaded.config.model.max_seq_len - ESTIMATORS[self.estimator].sees_padding
        self.max_length = limit if max_length is None else whole_number("max_length", max_length, 2, limit)

    def _steps(self, given: object) -> int:
        """K, checked; the checkpoint's default where none is given."""
        config = self.loaded.config
        k = config.default_steps if given is None else whole_number("num_steps", given, 1)
        try:
            return check_steps([k], config)[0]
        except UserError as error:
            raise UserError("model_args: num_steps", k, error.problem, error.remedy) from None

    def _estimator(self, name: str | None) -> str:
        """The estimator, checked; the checkpoint's own where none is given."""
        known = self.loaded.config.objective.estimators
        if name is not None and name not in known:
            there = ESTIMATORS.get(name)
            problem = (
                "there is no such estimator" if there is None else f"only {there.owners} checkpoints have it"
            )
            remedy = f"leave estimator out, or use {' or '.join(known)}"
            raise UserError("model_args: estimator", name, problem, remedy)
        return name or known[0]

    def _scored_steps(self, num_steps: int) -> int:
        """K of the log-likelihoods, which is not num_steps where that has no normalised likelihood."""
        return ESTIMATORS[self.estimator].scored_steps(self.loaded.config, num_steps)

    def _named_estimator(self) -> str:
        return ESTIMATORS[self.estimator].described(self.loaded.config, self.scored_steps)

    # What lm-eval asks about a model ------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the ``config`` of the results."""
        config = self.loaded.config
        return {
            "checkpoint": config.name,
            "weights_sha256": file_sha256(self.folder / WEIGHTS),
            "objective": config.objective.name,
            "training_step": config.step,
            "num_steps": self.num_steps,
            "loglikelihood_num_steps": self.scored_steps,
            "estimator": self._named_estimator(),
            "num_draws": self.num_draws,
            "tied_documents": self.tied_documents,
            "model_seed": self.seed,
            "dtype": self.settings.dtype,
            "kv_cache": self.settings.kv_cache,
            "model_device": str(self._device),
            "machine": machine(),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
        }

    @property
    def eot_token_id(self) -> int:
        """The id before a text without context: end of text, or else beginning of text."""
        found = self.text.eos_id if self.text.eos_id is not None else self.text.bos_id
        if found is None:
            raise UserError(
                "tokenizer",
                str(self.folder),
                "names no end of text",
                "name eos_token in its tokenizer_config.json",
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's cache of requests."""
        return f"rdlm-{self.text.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; bos first if ``add_special_tokens`` or, without it, the model argument
        add_bos_token says so."""
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return ([self.text.bos_id] if with_bos and self.text.bos_id is not None else []) + self.text.encode(
            string
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """None: this model takes text. UserError where lm-eval asks for a template."""
        if not chat_template:
            return None
        remedy = "serve the checkpoint and use --model local-chat-completions"
        raise UserError("--apply_chat_template", chat_template, "the model rdlm takes plain text", remedy)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval's ``--use_cache`` names a result by the request alone; here also by what decides it: one
        file serves all."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            known = {name: value for name, value in self.get_model_info().items() if name not in NOT_IN_KEYS}
            decides = json.dumps(
                [known, file_sha256(self.folder / CONFIG), self.text.fingerprint], sort_keys=True
            )
            prefix = hashlib.sha256(decides.encode()).hexdigest()
            cache_hook.dbdict.encode_key = lambda key: f"{prefix}:{key}"
            cache_hook.dbdict.decode_key = lambda key: key.partition(":")[2]

    # Log-likelihoods ----------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: windows of max_length positions; each token is predicted once, with as
        much context as fits."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in utils.get_rolling_token_windows(
                ids, self.eot_token_id, self.max_length, context_len=1
            ):
                windows.append(utils.make_disjoint_window(pair))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval defines it. Counts documents whose best choice is not unique: lm-eval takes the first
        one there, in BLiMP always the right one, so a model that cannot tell them apart would score 1."""
        for context, continuation in (request.args for request in requests):
            if not continuation:
                problem = "the task gives an empty continuation, which has no likelihood"
                raise UserError("lm_eval task", context[-60:], problem, "correct or leave out the task")
        scores = super().loglikelihood(requests, disable_tqdm)
        documents: defaultdict[tuple[object, object], list[float]] = defaultdict(list)
        for request, (logprob, _) in zip(requests, scores, strict=True):
            documents[request.task_name, request.doc_id].append(logprob)
        tied = sum(len(values) > 1 and values.count(max(values)) > 1 for values in documents.values())
        self.tied_documents += tied
        if tied:
            logger.warning(
                "%d of %d documents have no unique best choice; lm-eval takes the first one",
                tied,
                len(documents),
            )
        return scores

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's own models: the whole text is encoded and cut at the context's number of tokens; ->
        ids of both.

        A context of white space alone counts as none. UserError where no token is left for the
        continuation: the last token of the context has swallowed it ("pa" + "ss" is one token), so nothing
        could be scored.
        """
        if not context.strip():
            return [self.eot_token_id], self.tok_encode(context + continuation, add_special_tokens=False)
        before, after = super()._encode_pair(context, continuation)
        if not after:
            value = context[-40:] + "|" + continuation[:40]
            problem = "the tokenizer joins this continuation with its context, so it has no token of its own"
            raise UserError(
                "lm_eval task", value, problem, "begin continuations at a word, or leave out the task"
            )
        return before, after

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[Score]:
        scores = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[Score]:
        """At the K of this model. In a sweep the K to come are scored in the same pass and remembered."""
        ks = sorted({self.scored_steps, *(self._scored_steps(self._steps(k)) for k in SWEEP.ks)})
        keys = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
        missing = list(dict.fromkeys(key for key in keys if key not in SWEEP.scores))
        with tqdm(
            total=len(missing), desc=f"log-likelihoods at K = {', '.join(map(str, ks))}", disable=disable_tqdm
        ) as bar:
            found = score_continuations(
                self.loaded,
                [(list(context), list(continuation)) for context, continuation in missing],
                ks,
                batch_size=self.batch_size,
                max_length=self.max_length,
                seed=self.seed,
                num_draws=self.num_draws,
                estimator=self.estimator,
                progress=bar.update,
            )
        fresh = {key: {k: found[k][i] for k in ks} for i, key in enumerate(missing)}
        if SWEEP.ks:
            SWEEP.scores.update(fresh)
        known = SWEEP.scores if SWEEP.ks else fresh
        return [known[key][self.scored_steps] for key in keys]

    # Texts -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers without prompt and stop string."""
        wanted: list[Request] = []
        seen: Counter[str] = Counter()
        for context, given in (request.args for request in requests):
            question = context + json.dumps(given, sort_keys=True, default=str)
            wanted.append(self._request(context, given, seen[question]))
            seen[question] += 1
        texts = self._continued(wanted, disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _continued(self, requests: Sequence[Request], disable_tqdm: bool) -> list[str]:
        """Answers of the engine."""
        with (
            tqdm(total=len(requests), desc=f"texts at K = {self.num_steps}", disable=disable_tqdm) as bar,
            Engine(
                lambda: build_served(self.loaded.denoiser, self.loaded.config, self.text, self.settings),
                len(requests),
            ) as engine,
        ):
            answers = engine.generate(requests, lambda event: bar.update(event.finish is not None))
        for events in answers:
            if events[-1].finish not in ("stop", "length"):
                raise RuntimeError(f"generation ended with {events[-1].finish!r}")
        return ["".join(event.text for event in events) for events in answers]

    def _request(self, context: str, given: dict[str, Any], choice: int) -> Request:
        """gen_kwargs as an engine request, ``choice`` telling repeats of a prompt apart; UserError for a
        setting it does not have."""
        kwargs = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        greedy, stop, max_tokens = (
            not kwargs.pop("do_sample"),
            kwargs.pop("until"),
            kwargs.pop("max_gen_toks"),
        )
        num_steps = self._steps(kwargs.pop("num_steps", self.num_steps))
        known = SAMPLING if self.loaded.config.objective.left_to_right else MASKED_SAMPLING
        for name, value in kwargs.items():
            if name not in known:
                remedy = f"use some of until, max_gen_toks, do_sample, num_steps, {', '.join(known)}"
                raise UserError(f"gen_kwargs: {name}", value, "there is no such setting", remedy)
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                "gen_kwargs: max_gen_toks",
                max_tokens,
                f"leaves no room in {self.max_length} positions",
                "lower it",
            )
        ids = self.tok_encode(context) or [self.eot_token_id]
        if len(ids) > room:
            logger.warning(
                "a prompt of %d tokens loses its start: %d fit with %d new ones", len(ids), room, max_tokens
            )
        order = kwargs.pop("order", None)
        sampling = _sampling({"temperature": 1.0, **kwargs, **({"temperature": 0.0} if greedy else {})})
        check_sampler(sampling.sampler, self.loaded.config)
        check_masked(sampling, order, self.loaded.config)
        ends = frozenset() if self.text.eos_id is None else frozenset({self.text.eos_id})
        stops = tuple(s for s in stop if s)
        first = Request(
            tuple(ids[-room:]),
            StepBudget(num_steps),
            max_tokens,
            sampling,
            self.seed,
            choice=choice,
            order=order or "random",
        )
        return replace(first, stop=stops, stop_ids=ends)


def _sampling(given: dict[str, Any]) -> SamplingParams:
    """UserError for a value of another type."""
    for name, value in given.items():
        kind = NUMBERS[name][0] if name in NUMBERS else str
        wanted = {str: "text", int: "a whole number", float: "a number"}[kind]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise UserError(f"gen_kwargs: {name}", value, f"is not {wanted}", "correct it")
    older = given.pop("bridge", None)  # the older name of sampler
    return SamplingParams(**given, **({} if older is None else {"sampler": older}))


def run_sweep(arguments: Sequence[str], ks: Sequence[int]) -> None:
    """``run`` for each K: log-likelihoods of all of them are computed in the first run, in one pass."""
    place = next((i for i, item in enumerate(arguments[:-1]) if item in ("--model_args", "-a")), None)
    if place is None or "num_steps=" in arguments[place + 1]:
        raise UserError(
            "--num-steps",
            list(ks),
            "needs --model_args checkpoint=... without num_steps",
            "correct the model_args",
        )
    SWEEP.ks = tuple(ks)
    try:
        for k in ks:
            run([*arguments[: place + 1], f"{arguments[place + 1]},num_steps={k}", *arguments[place + 2 :]])
    finally:
        SWEEP.ks = ()
        SWEEP.scores.clear()


def run(arguments: Sequence[str]) -> None:
    """lm_eval's own command line, which knows the model ``rdlm`` because this module has been imported. It
    reads sys.argv.

    UserError for what lm_eval or datasets refuse: unknown tasks, data sets that cannot be reached, packages
    that a model of lm_eval needs.
    """
    own = sys.argv
    sys.argv = ["rdlm eval lm-eval", *arguments]
    try:
        cli_evaluate()
    except UserError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if _origin(error) not in ("lm_eval", "datasets", "huggingface_hub"):
            raise
        remedy = (
            "see `rdlm eval lm-eval ls tasks`; BLiMP runs without a hub: --blimp FOLDER --tasks blimp_local"
        )
        raise UserError(
            "lm_eval", " ".join(arguments), f"it refuses ({type(error).__name__}: {error})", remedy
        ) from error
    finally:
        sys.argv = own


def _origin(error: BaseException) -> str:
    """Top-level package of the code that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals["__name__"]).partition(".")[0]


def _load(folder: Path, settings: EngineSettings) -> tuple[Loaded, Tokenizer]:
    device = rdlm_device(settings.device)
    loaded = load(folder, device=device, dtype=usable_dtype(settings.dtype, device))
    loaded.config.check_whole()
    if loaded.tokenizer is None:
        remedy = "give a model of text"
        raise UserError(
            "model_args: checkpoint", str(folder), "it has no tokenizer, so its ids are not text", remedy
        )
    return loaded, loaded.tokenizer


# Values of --model_args and --device, which come typed by lm_eval's own parser, or wrongly typed ------------


def usable_device(name: str | None) -> str:
    """What lm_eval's --device can be here. Its default is cuda:0, so without a GPU that means the CPU, as
    in lm-eval's own models."""
    if name is None or (name == LM_EVAL_DEVICE and not torch.cuda.is_available()):
        logger.info("no GPU is in use: running on the CPU")
        return "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        problem = f"cannot be used ({reason(error)})"
        raise UserError("--device", name, problem, "use cpu, or cuda:N on a machine with one") from None
    return name


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"model_args: {name}", value, "is not a whole number in range", f"give {wanted}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"model_args: {name}", value, "is neither True nor False", "write True or False")
    return value
