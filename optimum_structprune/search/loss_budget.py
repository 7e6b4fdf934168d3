"""Search for the largest cut within a loss: prune copies of the model, and read their losses from the reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, log
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.modules import copy_with_shared_weights
from ..arch.spec import VOCAB
from ..config.pruning import LOSS, StructPruneConfig
from ..domains.manifest import EARLIER, Entry, Manifest
from ..pruning.cost import check_memory
from ..pruning.request import PruningRequest, resolve_request
from ..record.figures import Figure, TextResult, margin_of_mean, mean_ratio, ratios_of
from ..record.report import LossSearch, PruneRecords, Report
from ..system.errors import StructPruneError
from ..system.margins import MIN_RELATIVE_MARGIN
from ..system.stages import say


# The maximum number of trials, and the maximum while no tried cut is only a little too large.
TRIALS = 4
MOST_TRIALS = 6
# The loss per difference of the cosine from 1. multilingual-e5-small misses 0 to 11 of 1,000 translations per 0.001.
LOSS_OF_COSINE = 10
YOUR_DOMAINS = "your domains"
ON_UNSEEN_TEXT = "unseen text"
WANTED_LANGUAGES = "the wanted languages"
# The exponent of the loss as a function of the removed share, until two cuts have been measured.
FIRST_POWER = 1.5

# The maximum number of calibration tokens of a trial.
CALIBRATION_TOKENS = 2**14
# The approximate number of tokens in the text of a few languages.
FEW_LANGUAGES = 2**16

# A loss with its margin of error, which is None if only one document was measured.
Loss = tuple[float, float | None]


def losses_in(report: Report) -> dict[str, Loss]:
    """Return the losses in a report, with the margins of their confidence intervals, by text.

    The loss of a language model is its perplexity relative to the original model minus 1, as the geometric mean over
    the domains. The loss of an encoder is ten times the difference of the mean cosine from 1. It is about the largest
    measured share of translations that the encoder no longer finds.
    """
    if report.has_vectors:
        return _encoder_losses(report)

    mean, margin = mean_ratio(ratios_of(report.domains).values())
    losses: dict[str, Loss] = {YOUR_DOMAINS: (mean - 1, margin)}
    if report.unseen is not None:
        perplexity = report.unseen.perplexity
        if perplexity is not None and perplexity.ratio is not None:
            losses[ON_UNSEEN_TEXT] = (perplexity.ratio - 1, perplexity.margin)
    return losses


def _encoder_losses(report: Report) -> dict[str, Loss]:
    """Return the losses of an encoder by text."""
    results_by_text: dict[str, Iterable[TextResult]] = {
        YOUR_DOMAINS: report.domains.values(),
        WANTED_LANGUAGES: [language for language in report.languages.values() if language.wanted],
    }
    losses: dict[str, Loss] = {}
    for text, results in results_by_text.items():
        cosines = [result.cosine for result in results if result.cosine is not None]
        if cosines:
            losses[text] = _cosine_loss(cosines)
    return losses


def _cosine_loss(cosines: list[Figure]) -> Loss:
    """Return the loss of an encoder by the cosines of its domains, with its margin."""
    values = [figure.last or 0.0 for figure in cosines]
    loss = LOSS_OF_COSINE * (1 - fmean(values))
    margin = margin_of_mean(values, [figure.margin for figure in cosines])
    if margin is None:
        return loss, None
    return loss, LOSS_OF_COSINE * margin


def largest_cut(measure: Callable[[float], float], limit: float, first: float) -> dict[float, float]:
    """Search for the largest share that can be removed at a loss within a limit.

    Args:
        measure: A function that returns the loss with a share removed. An infinite loss means that this share cannot
            be removed, and does not count as a trial.
        limit: The largest loss.
        first: The share of the first trial.

    Returns:
        The measured losses by share. The share 0 has the loss 0.
    """
    losses = {0.0: 0.0}
    share = first
    trials = 0
    while True:
        losses[share] = measure(share)
        if losses[share] < inf:
            trials += 1

        # The largest cut lies between `lower` and `upper`.
        lower = max(removed for removed, loss in losses.items() if loss <= limit)
        upper = min((removed for removed in losses if removed > lower), default=inf)
        gap = upper - lower
        max_trials = MOST_TRIALS
        if gap < lower / 2:
            max_trials = TRIALS

        is_close = losses[lower] >= 0.6 * limit or gap < max(lower / 20, 1e-3)
        if is_close or trials >= max_trials:
            return losses
        share = _next_share(losses, limit, lower, upper)


def _next_share(losses: Mapping[float, float], limit: float, lower: float, upper: float) -> float:
    """Return the share to try next, between a share within the limit and a share beyond it, which may be infinite."""
    gap = upper - lower
    if losses.get(upper) == inf:
        return lower + gap / 2

    # Aim a little below the limit, because measurements are noisy.
    nearest, loss, power = _power_law(losses, upper)
    share = nearest * (0.85 * limit / loss) ** (1 / power)
    if upper == inf:
        return min(max(share, 1.2 * lower), 3 * lower, (1 + lower) / 2)

    share = min(share, lower + gap * 4 / 5)
    if lower:
        share = max(share, lower + gap / 5)
    return share


def expected_loss(losses: Mapping[float, float], share: float) -> float:
    """Return the loss with this share removed, by a power law through the nearest measured losses."""
    nearest, loss, power = _power_law(losses, share)
    return float(loss * (share / nearest) ** power)


def _power_law(losses: Mapping[float, float], share: float) -> tuple[float, float, float]:
    """Return the power law near a share.

    Returns:
        The smallest measured share that is at least `share`, or else the largest measured share, with its loss and
        the exponent there.
    """
    # Losses below 1e-4 are noise, and losses above 1 follow no power law.
    clamped = {removed: min(max(loss, 1e-4), 1.0) for removed, loss in losses.items() if removed and loss < inf}
    pairs = list(pairwise(sorted(clamped)))
    if not pairs:
        removed, loss = clamped.popitem()
        return removed, loss, FIRST_POWER

    start, end = next((pair for pair in pairs if pair[1] >= share), pairs[-1])
    power = log(clamped[end] / clamped[start]) / log(end / start)
    return end, clamped[end], max(power, 1.0)


@dataclass(frozen=True)
class CutTrial:
    """A trial pruning.

    Attributes:
        removed: The removed share of the parameters.
        losses: The losses by text.
        manifest: The text of the trial.
    """

    removed: float
    losses: Mapping[str, Loss]
    manifest: Manifest

    @property
    def loss(self) -> float:
        """Return the largest measured loss."""
        return max(loss for loss, _ in self.losses.values())

    @property
    def upper_loss(self) -> float:
        """Return the largest upper bound. A loss without a margin, from a single document, may be twice as large."""
        bounds = []
        for loss, margin in self.losses.values():
            if margin is None:
                margin = max(loss, MIN_RELATIVE_MARGIN)
            bounds.append(loss + margin)
        return max(bounds)


class CutSearch:
    """A search for the largest cut of a model within the loss that its config allows.

    Args:
        request: The request of the config.
        model: The model, which does not change.
        tokenizer: Its tokenizer.
        config: The config, whose budget is a loss.
        prune: A function that prunes a model in place, and returns the records.

    Raises:
        StructPruneError: If the model is offloaded.
    """

    def __init__(
        self,
        request: PruningRequest,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: StructPruneConfig,
        prune: Callable[[PreTrainedModel, StructPruneConfig], PruneRecords],
    ):
        if request.model_info.offloaded:
            raise StructPruneError(
                f"The budget {LOSS!r} prunes copies of the model in trials, and {request.model_info.name} is "
                "offloaded, so there is no memory for a copy. Pass a size, such as parameters=0.9."
            )
        check_memory(request, inplace=False)

        self.config = config
        self.request = request
        self.model = model
        self.tokenizer = tokenizer
        self.prune = prune
        self.limit = float((config.budget or {})[LOSS])
        self.parameters = request.model_info.plain_model.num_parameters()
        self.trials: dict[str, CutTrial] = {}  # by shape

    def largest(self) -> StructPruneConfig:
        """Return the config of the largest cut, or raise `StructPruneError` if no cut is within the loss."""
        losses = largest_cut(self.upper_loss, self.limit, self._first_cut())
        cut = max(removed for removed, loss in losses.items() if loss <= self.limit)
        if cut:
            return self._config_for(cut)

        trial = min(self.trials.values(), key=lambda trial: trial.removed)
        raise StructPruneError(
            f"budget {LOSS}={self.limit} cannot be met: the smallest cut that was tried, {trial.removed:.2%} of the "
            f"parameters, may lose {trial.upper_loss:.2g}. Allow this loss, pass more text, or target other spaces."
        )

    def record(self, report: Report) -> LossSearch:
        """Return the outcome of the search for the report of the final pruning."""
        measured = {trial.removed: trial.loss for trial in self.trials.values()}
        return LossSearch(
            limit=self.limit,
            measured={text: list(loss) for text, loss in losses_in(report).items()},
            next=expected_loss(measured, report.removed + 0.05),
            trials=[{"removed": trial.removed} | dict(trial.losses) for trial in self.trials.values()],
        )

    def _config_for(self, removed: float) -> StructPruneConfig:
        """Return the config that removes a share of the parameters."""
        return replace(self.config, budget={"parameters": int((1 - removed) * self.parameters)})

    def _first_cut(self) -> float:
        """Return the share of the first trial: the limit itself, or all tokens but a few languages' tokens."""
        if not self.request.config.removes_tokens:
            return self.limit
        tokens = self.request.model_info.arch.of(VOCAB)[0]
        return max(self.limit, (tokens.size - FEW_LANGUAGES) * tokens.unit_params / self.parameters)

    def upper_loss(self, removed: float) -> float:
        """Return the upper bound of the loss with a share removed, or infinity if the share is too large to remove."""
        config = self._config_for(removed)
        # Each domain needs a sample. Another seed, so that the model writes other text than for the final pruning.
        num_samples = max(min(config.num_samples, CALIBRATION_TOKENS // config.seq_length), len(config.domains or ()))
        config = replace(config, num_samples=num_samples, seed=config.seed + 1, recovery=None)

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
            if key not in self.trials:
                records = self.prune(self._copy(), config)
                trial = CutTrial(records.report.removed, losses_in(records.report), records.manifest)
                self.trials[key] = trial
                say(
                    f"trial: {trial.removed:.2%} smaller, with a loss of {trial.loss:.4f}, at most "
                    f"{trial.upper_loss:.4f}"
                )
        return self.trials[key].upper_loss

    def _copy(self) -> PreTrainedModel:
        """Return a copy of the model. It shares the weights if only tokens are removed, as no trial changes them."""
        if set(self.request.widths) == {VOCAB} and not self.request.model_info.quantized:
            return copy_with_shared_weights(self.model)
        return deepcopy(self.model)

    def text_of_trials(self) -> Manifest:
        """Return the record of the measured text of the trials, and of the text of earlier runs.

        The text of the trials becomes probe text, so that the final pruning is not measured on it.
        """
        entries: list[Entry] = []
        manifests = [trial.manifest for trial in self.trials.values()]
        for manifest in manifests:
            for entry in manifest.domains:
                probe = replace(entry, documents=[], heldout_documents=[], probe_documents=entry.heldout_documents)
                if entry.use != EARLIER and probe not in entries:
                    entries.append(probe)

        manifest = replace(manifests[0], domains=entries).after(Manifest.seen_by(self.model))
        # An earlier run may have held out the same text.
        probed = {name for entry in entries for name in entry.probe_documents}
        for entry in manifest.domains:
            entry.heldout_documents = [name for name in entry.heldout_documents if name not in probed]
        return manifest
