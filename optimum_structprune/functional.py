"""Prune a model in one call, to a size or within a loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo
from .arch.spec import VOCAB
from .config.pruning import LOSS, RunOptions, StructPruneConfig
from .domains.manifest import EARLIER, Entry, Manifest
from .errors import StructPruneError, warn
from .forward.metrics import UNSEEN
from .pruner import PruneResult, StructPruner
from .pruning.memory import check_memory
from .pruning.request import PruningRequest, check_arguments, check_config_kind, resolve_request
from .search.loss_budget import expected_loss, largest_cut, losses_in
from .steps.division import copy_with_shared_weights
from .system.stages import say


# Calibration tokens of a trial at most.
TRIAL_TOKENS = 2**14
# About as many tokens spell the text of a few languages.
FEW_LANGUAGES = 2**16


def prune(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PruneResult:
    """Prune a model in one call, and return it with its tokenizer and its records; see `StructPruner.prune`.

    With `budget={"loss": …}`, prunings on trial find the smallest model within this loss first.
    """
    check_config_kind(config, options)
    if LOSS in (config.budget or {}):
        return prune_within_loss(model, config, tokenizer, inplace, inputs, options)
    return StructPruner(config, options).prune(model, tokenizer, inplace, inputs)


def prune_model(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PreTrainedModel:
    """Prune a model in one call, and return the model alone; `prune` returns its tokenizer and its records too."""
    result = prune(model, config, tokenizer, inplace, inputs, options)
    if result.tokenizer is not tokenizer:
        warn("The pruned model has a smaller vocabulary and needs a new tokenizer. Call `prune`, which returns both.")
    return result.model


def prune_within_loss(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PruneResult:
    """Prune a model as far as the loss in trials stays within the budget, and measure the loss on other text.

    Raises:
        StructPruneError: If the model is offloaded, or if no cut stays within the budget.
    """
    start = perf_counter()
    check_arguments(model, tokenizer, inputs, inplace)
    options = options or RunOptions()
    info = ModelInfo.of(model, config.arch_file)
    request = resolve_request(config, info, tokenizer, inputs, options=options)
    trials = CutTrials(config, options, request, model, tokenizer)
    limit = float((config.budget or {})[LOSS])
    losses = largest_cut(trials.loss, limit, trials.first_cut(limit))
    met = max(removed for removed, loss in losses.items() if loss <= limit)
    if not met:
        removed, loss = min(trials.upper_losses.values())
        raise StructPruneError(
            f"budget {LOSS}={limit} cannot be met: the smallest cut that was tried, {removed:.2%} of the parameters, "
            f"may lose {loss:.2g}. Allow this loss, give more text, or target other spaces."
        )

    seconds = perf_counter() - start
    pruner = StructPruner(trials.config_for(met), options)
    result = pruner.prune(model, tokenizer, inplace, earlier=trials.text_of_trials())
    report = result.report
    report.seconds["trials"] = seconds
    report.wish = {
        "loss": limit,
        "measured": losses_in(report),
        "next": expected_loss(trials.measured_losses, report.removed + 0.05),
        "trials": trials.records,
    }
    return result


class TrialPruner(StructPruner):
    """Prunes on trial. Only languages that the config names are measured."""

    measures_any_language = False


class CutTrials:
    """Prunings on trial of copies of a model.

    Attributes:
        measured_losses: The measured loss by the removed share of the parameters.
        upper_losses: The removed share and the upper bound of its loss, by what was tried.
        records: The figures of each trial, for the report.
    """

    def __init__(
        self,
        config: StructPruneConfig,
        options: RunOptions,
        request: PruningRequest,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        if request.model_info.offloaded:
            raise StructPruneError(
                f"budget {LOSS} prunes copies on trial, and {request.model_info.name} is offloaded, which leaves no "
                "memory for a copy. Give a size, such as parameters=0.9."
            )
        check_memory(request, inplace=False)
        self.config = config
        self.options = replace(options, checkpoint_dir=None)
        self.request = request
        self.model = model
        self.tokenizer = tokenizer
        self.parameters = request.model_info.plain_model.num_parameters()
        self.measured_losses = {0.0: 0.0}
        self.upper_losses: dict[str, tuple[float, float]] = {}
        self.records: list[dict[str, Any]] = []
        self._manifests: list[Manifest] = []

    def config_for(self, removed: float) -> StructPruneConfig:
        """Return the config that removes a share of the parameters."""
        return replace(self.config, budget={"parameters": int((1 - removed) * self.parameters)})

    def first_cut(self, limit: float) -> float:
        """Return the share of the first trial: the limit itself, or all tokens that few languages do not need."""
        if not self.request.config.removes_tokens:
            return limit
        tokens = self.request.model_info.arch.of(VOCAB)[0]
        return max(limit, (tokens.size - FEW_LANGUAGES) * tokens.unit_params / self.parameters)

    def loss(self, removed: float) -> float:
        """Return the upper bound of the loss with a share removed, or infinity if so much cannot be removed."""
        config = self._trial_config(removed)
        with warnings.catch_warnings():
            # The last pruning repeats these warnings.
            warnings.simplefilter("ignore")
            try:
                widths = resolve_request(config, self.request.model_info, self.tokenizer).widths
            except StructPruneError:
                return inf

            # Two shares can lead to the same widths, unless text or measurements choose some of them.
            is_chosen_by_text = config.allocation != "uniform" or (VOCAB in widths and len(widths) > 1)
            key = str(removed if is_chosen_by_text else widths)
            if key in self.upper_losses:
                return self.upper_losses[key][1]
            pruner = TrialPruner(config, self.options)
            result = pruner.prune(_copy(self.model, self.request), self.tokenizer, inplace=True)

        self._manifests.append(result.manifest)
        losses = losses_in(result.report)
        share = result.report.removed
        measured = max(loss for loss, _ in losses.values())
        upper = max(_upper_bound(loss, margin) for loss, margin in losses.values())
        self.measured_losses[share] = measured
        self.upper_losses[key] = (share, upper)
        self.records.append({"removed": share, **losses})
        say(f"on trial: {share:.2%} smaller, which loses {measured:.4f}, at most {upper:.4f}")
        return upper

    def _trial_config(self, removed: float) -> StructPruneConfig:
        """Return the config of a trial, which calibrates on less text."""
        config = self.config_for(removed)
        num_samples = min(config.num_samples, TRIAL_TOKENS // config.seq_length)
        # Each domain needs a sample.
        num_samples = max(num_samples, len(config.domains or ()))
        # With another seed, the model writes other text than for the last pruning.
        return replace(config, num_samples=num_samples, seed=config.seed + 1, recovery=None)

    def text_of_trials(self) -> Manifest:
        """Return the record of the text that judged the trials, and of the text that the model had seen before.

        The text of the trials counts as text of choices, so that the last pruning is not judged on it.
        """
        entries: list[Entry] = []
        for manifest in self._manifests:
            for entry in manifest.domains:
                if entry.use != EARLIER:
                    chosen_by = replace(
                        entry, documents=[], heldout_documents=[], probe_documents=entry.heldout_documents
                    )
                    if chosen_by not in entries:
                        entries.append(chosen_by)

        probed = {name for entry in entries for name in entry.probe_documents}
        manifest = replace(self._manifests[0], domains=entries).after(Manifest.seen_by(self.model))
        # An earlier run may have held out the same text.
        for entry in manifest.domains:
            entry.heldout_documents = [name for name in entry.heldout_documents if name not in probed]
        return manifest


def _upper_bound(loss: float, margin: float | None) -> float:
    """Return the upper bound of a loss. A single document says nothing about the margin, so the loss may double."""
    if margin is None:
        return loss + max(loss, UNSEEN)
    return loss + margin


def _copy(model: PreTrainedModel, request: PruningRequest) -> PreTrainedModel:
    """Return a copy of a model, which shares the weights if only tokens are removed: no trial changes them then."""
    shares_weights = set(request.widths) == {VOCAB} and not request.model_info.quantized
    if not shares_weights:
        return deepcopy(model)
    return copy_with_shared_weights(model)
