"""Finds the smallest model whose measured loss keeps to a wish, by a few prunings on trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import replace
from itertools import pairwise
from math import inf, log
from statistics import fmean
from time import perf_counter
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.spec import VOCAB
from ..config.pruning import LOSS, RunOptions, StructPruneConfig
from ..domains.manifest import EARLIER, Entry, Manifest, TextRecord, remember_text
from ..errors import StructPruneError
from ..forward.metrics import UNSEEN
from ..pruning.memory import check_memory
from ..pruning.request import Request, ask
from ..record.figures import Figure, margin_of_mean, mean_ratio, ratios_of
from ..record.report import Report
from ..system.stages import say


# So many prunings on trial find the size, or a few more where the next larger cut that was tried is far larger.
TRIALS, MOST_TRIALS = 4, 6
LOSS_OF_COSINE = 10  # multilingual-e5-small misses 0 to 11 translations of 1,000 for 0.001 of it
KINDS = "your domains"
OTHER = "unseen text"
LANGUAGES = "the wanted languages"


class Pruner(Protocol):
    """Prunes models by a config that can be replaced, as `StructPruner` does."""

    config: StructPruneConfig
    options: RunOptions
    on_trial: bool
    report: Report | None
    manifest: Manifest | None

    def prune_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, inplace: bool = False
    ) -> PreTrainedModel:
        """Prune a model by the present config."""
        ...


def prune_within_loss(
    pruner: Pruner, request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inplace: bool
) -> PreTrainedModel:
    """Prunes a model as far as its loss on trial keeps to the budget, and measures that on other text.

    Raises:
        StructPruneError: If the model is offloaded, or no cut keeps to the budget.
    """
    config, record, start = pruner.config, TextRecord.of(model), perf_counter()
    limit = float((config.budget or {})[LOSS])
    trials = CutTrials(pruner, request, model, tokenizer)
    losses = largest_cut(trials.loss, limit, trials.first(limit))
    if not (met := max(removed for removed, loss in losses.items() if loss <= limit)):
        least, most = min(trials.known.values())
        raise StructPruneError(
            f"budget {LOSS}={limit} cannot be met: the smallest cut that was tried, {least:.2%} of the parameters, "
            f"may lose {most:.2g}; allow that, give more text, or target other spaces."
        )
    seconds = perf_counter() - start
    remember_text(model, manifest=trials.text_set_aside())
    pruner.config = trials.config(met)
    try:
        smaller = pruner.prune_model(model, tokenizer, inplace)
    finally:
        pruner.config = config
        if not inplace:
            vars(model)["text_record"] = record
    report = pruner.report
    assert report is not None
    report.seconds["trials"] = seconds
    beyond = expected_loss(trials.measured, _removed(report) + 0.05)
    report.wish = {"loss": limit, "measured": losses_in(report), "next": beyond, "trials": trials.records}
    return smaller


class CutTrials:
    """Prunings on trial of copies of a model, with their losses by the share of the parameters that went."""

    def __init__(self, pruner: Pruner, request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if request.model_info.offloaded:
            raise StructPruneError(
                f"budget {LOSS} prunes copies on trial, and {request.model_info.name} is offloaded, which leaves no "
                "memory for one; give a size, such as parameters=0.9."
            )
        check_memory(request, inplace=False)
        self.pruner, self.request, self.model, self.tokenizer = pruner, request, model, tokenizer
        self.parameters = request.model_info.plain_model.num_parameters()
        self.measured = {0.0: 0.0}
        self.known: dict[str, tuple[float, float]] = {}  # the share that went and what may be lost, by what was asked
        self.records: list[dict[str, Any]] = []
        self._manifests: list[Manifest] = []

    def config(self, removed: float) -> StructPruneConfig:
        """The config of a pruning that removes this share of the parameters."""
        return replace(self.pruner.config, budget={"parameters": int((1 - removed) * self.parameters)})

    def first(self, limit: float) -> float:
        """The share that the first trial removes: as much as may be lost, or the tokens beyond 65,536.

        About so many spell the text of a few languages.
        """
        if not self.request.config.removes_tokens:
            return limit
        tokens = self.request.model_info.arch.of(VOCAB)[0]
        return max(limit, (tokens.size - 2**16) * tokens.unit_params / self.parameters)

    def loss(self, removed: float) -> float:
        """The larger of what may be lost on the named kinds and on other text; infinite where so much cannot go."""
        trial, config = copy(self.pruner), self.config(removed)
        trial.on_trial, trial.options = True, replace(trial.options, checkpoint_dir=None)
        # A trial calibrates on 16,384 tokens at most.
        samples = max(min(config.num_samples, 2**14 // config.seq_length), len(config.domains or ()))
        # With another seed the model writes other text than for the last pruning.
        trial.config = replace(config, num_samples=samples, seed=config.seed + 1, recovery=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the last pruning says them
            try:
                widths = ask(trial.config, self.request.model_info, self.tokenizer).widths
            except StructPruneError:
                return inf
            # Text and the budget say how many tokens go beside other spaces, and a search how wide each layer is.
            is_free = config.allocation != "uniform" or VOCAB in widths and len(widths) > 1
            if (asked := str(removed if is_free else widths)) in self.known:
                return self.known[asked][1]
            trial.prune_model(_copy(self.model, self.request), self.tokenizer, inplace=True)
        assert trial.report is not None and trial.manifest is not None
        self._manifests.append(trial.manifest)
        losses, gone = losses_in(trial.report), _removed(trial.report)
        self.measured[gone] = max(loss for loss, _ in losses.values())
        self.records.append({"removed": gone, **losses})
        # Where one document says nothing of others, these may lose as much again, and what few documents may hide.
        most = max(loss + (max(loss, UNSEEN) if margin is None else margin) for loss, margin in losses.values())
        self.known[asked] = gone, most
        say(f"on trial: {gone:.2%} smaller, which loses {self.measured[gone]:.4f}, at most {most:.4f}")
        return most

    def text_set_aside(self) -> Manifest:
        """The record of the text that judged the trials, as text of choices, beside what the model had seen before."""
        aside: list[Entry] = []
        for entry in (entry for manifest in self._manifests for entry in manifest.domains if entry.use != EARLIER):
            judged = replace(entry, documents=[], heldout_documents=[], probe_documents=entry.heldout_documents)
            aside += [judged] if judged not in aside else []
        chosen_by = {name for entry in aside for name in entry.probe_documents}
        manifest = replace(self._manifests[0], domains=aside).after(Manifest.seen_by(self.model))
        for entry in manifest.domains:  # an earlier run may have held out the same text
            entry.heldout_documents = [name for name in entry.heldout_documents if name not in chosen_by]
        return manifest


def _copy(model: PreTrainedModel, request: Request) -> PreTrainedModel:
    """A copy of a model. It shares the weights where nothing but tokens goes, as no trial writes into them then."""
    shared = model.parameters() if {*request.widths} == {VOCAB} and not request.model_info.quantized else ()
    return deepcopy(model, {id(parameter): copy(parameter) for parameter in shared})


def _removed(report: Report) -> float:
    """The share of the parameters that a pruning has removed."""
    return report.removed


def losses_in(report: Report) -> dict[str, tuple[float, float | None]]:
    """Return the losses in a report, with the margins of their confidence intervals, by text.

    The loss of a language model is its perplexity relative to the original model, less 1, as the geometric mean over
    the domains. The loss of an encoder is ten times the difference of the mean cosine from 1, which is at least the
    share of translations that it no longer finds.
    """
    vectors = [domain.vectors for domain in report.domains.values()]
    if any(vectors):
        wanted = [language.vectors for language in report.languages.values() if language.wanted]
        losses = {}
        for text, results in ((KINDS, vectors), (LANGUAGES, wanted)):
            cosines = [result.cosine for result in results if result is not None and result.cosine is not None]
            if cosines:
                losses[text] = _cosine_loss(cosines)
        return losses

    mean, margin = mean_ratio(ratios_of(report.domains).values())
    losses = {KINDS: (mean - 1, margin)}
    unseen = None if report.unseen is None else report.unseen.perplexity
    if unseen is not None and unseen.ratio is not None:
        losses[OTHER] = (unseen.ratio - 1, unseen.margin)
    return losses


def _cosine_loss(cosines: list[Figure]) -> tuple[float, float | None]:
    """Return the loss of an encoder by the cosines of its domains, with its margin."""
    values = [figure.last or 0.0 for figure in cosines]
    margin = margin_of_mean(values, [figure.margin for figure in cosines])
    return LOSS_OF_COSINE * (1 - fmean(values)), None if margin is None else LOSS_OF_COSINE * margin


def largest_cut(measure: Callable[[float], float], limit: float, first: float) -> dict[float, float]:
    """Looks for the largest share that may go at a loss within a limit, and gives the measured losses by share.

    Nothing gone loses nothing. An infinite loss, of what cannot be removed, is no trial.
    """
    losses, share, count = {0.0: 0.0}, first, 0
    while True:
        losses[share] = measure(share)
        count += losses[share] < inf
        met = max(removed for removed, loss in losses.items() if loss <= limit)
        above = min((removed for removed in losses if removed > met), default=inf)
        gap, goal = above - met, 0.85 * limit
        most = TRIALS if gap < met / 2 else MOST_TRIALS
        if losses[met] >= 0.6 * limit or gap < max(met / 20, 1e-3) or count >= most:
            return losses
        if losses.get(above) == inf:
            share = met + gap / 2
            continue
        near, loss, power = _power_law(losses, above)
        share = near * (goal / loss) ** (1 / power)
        if above < inf:
            share = min(max(share, met + gap / 5 if met else 0), met + gap * 4 / 5)
        else:
            share = min(max(share, 1.2 * met), 3 * met, (1 + met) / 2)


def expected_loss(losses: Mapping[float, float], share: float) -> float:
    """The loss with this share gone, by a power law through the measured losses around it, or the last two."""
    near, loss, power = _power_law(losses, share)
    return float(loss * (share / near) ** power)


def _power_law(losses: Mapping[float, float], share: float) -> tuple[float, float, float]:
    """A measured share at or beyond another one, or else the largest, its loss, and the power of growth."""
    # Losses below 1e-4 are noise, and those above 1 follow no law.
    known = {removed: min(max(loss, 1e-4), 1.0) for removed, loss in losses.items() if removed and loss < inf}
    pairs = [*pairwise(sorted(known))]
    if not pairs:
        return *known.popitem(), 1.5
    left, right = next((pair for pair in pairs if pair[1] >= share), pairs[-1])
    return right, known[right], max(log(known[right] / known[left]) / log(right / left), 1.0)
