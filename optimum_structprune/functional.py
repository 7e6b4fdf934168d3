"""Prune a model in one call, to a size or within a loss budget."""

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
from .pruning.cost import check_memory
from .pruning.request import PruningRequest, check_arguments, check_config_kind, resolve_request
from .record.report import Report
from .search.loss_budget import expected_loss, largest_cut, losses_in
from .steps.division import copy_with_shared_weights
from .system.stages import say


# The maximum number of calibration tokens of a trial.
TRIAL_TOKENS = 2**14
# The approximate number of tokens in the text of a few languages.
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

    With `budget={"loss": …}`, trial prunings first find the smallest model within this loss.
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
    """Prune a model in one call, and return only the model. `prune` also returns its tokenizer and its records."""
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
    """Prune a model to the smallest size whose loss in trials is within the budget, and measure it on other text.

    Raises:
        StructPruneError: If the model is offloaded, or if no cut is within the budget.
    """
    start = perf_counter()
    check_arguments(model, tokenizer, inputs, inplace)
    options = options or RunOptions()
    info = ModelInfo.of(model, config.arch_file)
    request = resolve_request(config, info, tokenizer, inputs, options=options)

    trials = CutTrials(config, options, request, model, tokenizer)
    limit = float((config.budget or {})[LOSS])
    losses = largest_cut(trials.loss, limit, trials.first_cut(limit))
    cut = max(removed for removed, loss in losses.items() if loss <= limit)
    if not cut:
        removed, loss = min(trials.upper_losses.values())
        raise StructPruneError(
            f"budget {LOSS}={limit} cannot be met: the smallest cut that was tried, {removed:.2%} of the parameters, "
            f"may lose {loss:.2g}. Allow this loss, pass more text, or target other spaces."
        )

    seconds = perf_counter() - start
    pruner = StructPruner(trials.config_for(cut), options)
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
    """A pruner for trials, which measures only languages that the config names."""

    measures_any_language = False


class CutTrials:
    """Trial prunings of copies of a model.

    Attributes:
        measured_losses: The measured loss by the removed share of the parameters.
        upper_losses: The removed share and the upper bound of its loss, by the shape of the trial.
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
                f"The budget {LOSS!r} prunes copies of the model in trials, and {request.model_info.name} is "
                "offloaded, so there is no memory for a copy. Pass a size, such as parameters=0.9."
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
        """Return the share of the first trial: the limit itself, or all tokens but a few languages' tokens."""
        if not self.request.config.removes_tokens:
            return limit
        tokens = self.request.model_info.arch.of(VOCAB)[0]
        return max(limit, (tokens.size - FEW_LANGUAGES) * tokens.unit_params / self.parameters)

    def loss(self, removed: float) -> float:
        """Return the upper bound of the loss with a share removed, or infinity if the share is too large to remove."""
        config = self._trial_config(removed)
        with warnings.catch_warnings():
            # The last pruning repeats these warnings.
            warnings.simplefilter("ignore")
            try:
                widths = resolve_request(config, self.request.model_info, self.tokenizer).widths
            except StructPruneError:
                return inf

            # Two shares can lead to the same widths, unless text or measurements choose some of them.
            key = str(widths)
            if config.allocation != "uniform" or (VOCAB in widths and len(widths) > 1):
                key = str(removed)
            if key in self.upper_losses:
                return self.upper_losses[key][1]

            pruner = TrialPruner(config, self.options)
            result = pruner.prune(_copy(self.model, self.request), self.tokenizer, inplace=True)

        self._manifests.append(result.manifest)
        return self._enter(key, result.report)

    def _enter(self, key: str, report: Report) -> float:
        """Enter the losses in the report of a trial, and return the upper bound of the largest loss."""
        losses = losses_in(report)
        measured_loss = max(loss for loss, _ in losses.values())
        upper_loss = max(_upper_bound(loss, margin) for loss, margin in losses.values())

        share = report.removed
        self.measured_losses[share] = measured_loss
        self.upper_losses[key] = (share, upper_loss)

        record: dict[str, Any] = {"removed": share}
        record.update(losses)
        self.records.append(record)

        say(f"trial: {share:.2%} smaller, with a loss of {measured_loss:.4f}, at most {upper_loss:.4f}")
        return upper_loss

    def _trial_config(self, removed: float) -> StructPruneConfig:
        """Return the config of a trial, which calibrates on less text."""
        config = self.config_for(removed)
        num_samples = min(config.num_samples, TRIAL_TOKENS // config.seq_length)
        # Each domain needs a sample.
        num_samples = max(num_samples, len(config.domains or ()))
        # Another seed, so that the model writes other text than for the final pruning.
        return replace(config, num_samples=num_samples, seed=config.seed + 1, recovery=None)

    def text_of_trials(self) -> Manifest:
        """Return the record of the measured text of the trials, and of the text of earlier runs.

        The text of the trials becomes probe text, so that the final pruning is not measured on it.
        """
        entries: list[Entry] = []
        probed: set[str] = set()
        for manifest in self._manifests:
            for entry in manifest.domains:
                if entry.use == EARLIER:
                    continue

                probe = replace(entry, documents=[], heldout_documents=[], probe_documents=entry.heldout_documents)
                probed.update(probe.probe_documents)
                if probe not in entries:
                    entries.append(probe)

        manifest = replace(self._manifests[0], domains=entries).after(Manifest.seen_by(self.model))
        # An earlier run may have held out the same text.
        for entry in manifest.domains:
            entry.heldout_documents = [name for name in entry.heldout_documents if name not in probed]
        return manifest


def _upper_bound(loss: float, margin: float | None) -> float:
    """Return the upper bound of a loss. A loss without a margin, from a single document, may be twice as large."""
    if margin is None:
        return loss + max(loss, UNSEEN)
    return loss + margin


def _copy(model: PreTrainedModel, request: PruningRequest) -> PreTrainedModel:
    """Return a copy of a model. It shares the weights if only tokens are removed, because no trial changes them."""
    shares_weights = set(request.widths) == {VOCAB} and not request.model_info.quantized
    if not shares_weights:
        return deepcopy(model)
    return copy_with_shared_weights(model)
