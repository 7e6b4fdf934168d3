"""How good a model is: perplexity by domain, closeness to the dense model, and tasks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.domains import as_domain
from ..domains.manifest import MANIFEST_NAME, Manifest
from ..domains.packing import prefix_token
from ..domains.presets import resolve
from ..errors import StructPruneError
from ..forward.metrics import compare, perplexity
from ..plain_json import to_json
from ..saving.report import geometric_mean, table
from .heldout import Heldout, read_heldout
from .tasks import Scores, Tasks


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.domains import DomainConfig


@dataclass
class Evaluation:
    """The numbers that `evaluate` measured; `str` of it is a table.

    Attributes:
        model: The name or the folder of the model.
        dense: The name or the folder of the dense model that it is compared with; None where there is none.
        seq_length: The number of tokens in a sample. The first is context only, the others are predicted.
        prefix: The token at the head of each sample; None where the tokenizer has none.
        tokens: The number of predicted tokens, by domain.
        perplexity: The perplexities, `{domain: {"model": …, "dense": …}}`; "dense" only where there is a dense model.
        divergence: The mean KL(dense‖model) per predicted token in nats, by domain.
        agreement: The share of predicted tokens for which both models find the same one likeliest, by domain.
        tasks: The scores, `{task: {"model": {"acc": …, "acc_stderr": …, …}, "dense": {…}}}`.
        warnings: The reasons why these numbers may be too good.
        shared: The domains that share something with what the model was calibrated on; None where that is not known.
    """

    model: str
    dense: str | None = None
    seq_length: int = 0
    prefix: str | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Scores] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    shared: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the numbers to a JSON file; one that is not finite is null."""
        Path(path).write_text(to_json(self.to_dict()) + "\n")

    def __str__(self) -> str:
        """A table of domains, one of tasks, and the warnings."""
        tables = [self._domains()] if self.perplexity else []
        tables += [self._tasks()] if self.tasks else []
        return "\n\n".join([*tables, *(f"warning: {warning}" for warning in self.warnings)])

    @property
    def _models(self) -> list[str]:
        return ["model"] if self.dense is None else ["dense", "model"]

    def _domains(self) -> str:
        models, compared = self._models, self.dense is not None
        rows = [["perplexity", "tokens", *models, *(["ratio", "KL", "top-1"] if compared else [])]]
        for name, ppl in self.perplexity.items():
            rows.append([name, f"{self.tokens[name]:,}", *(f"{ppl[which]:.2f}" for which in models)])
            if compared:
                rows[-1] += [_ratio(ppl), f"{self.divergence[name]:.4f}", f"{self.agreement[name]:.1%}"]
        if len(self.perplexity) > 1:
            means = {which: geometric_mean(ppl[which] for ppl in self.perplexity.values()) for which in models}
            rows.append(["  geometric mean", "", *(f"{mean:.2f}" for mean in means.values())])
            rows[-1] += [_ratio(means), "", ""] if compared else []
        head = f", each begun with {self.prefix!r}" if self.prefix else ""
        return f"{table(rows)}\nsamples of {self.seq_length} tokens{head}"

    def _tasks(self) -> str:
        rows = [["task", "metric", "items", *self._models]]
        for name, scores in self.tasks.items():
            for metric in scores["model"]:
                if metric != "items" and "_stderr" not in metric:
                    items = f"{scores['model']['items']:.0f}" if "items" in scores["model"] else ""
                    rows.append([name, metric, items, *(_with_error(scores[which], metric) for which in self._models)])
        return table(rows)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[DomainConfig | Mapping[str, Any]] = (),
    tasks: Sequence[str | Path] = (),
    dense: PreTrainedModel | None = None,
    *,
    seq_length: int = 512,
    num_samples: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    manifest: Manifest | None = None,
    num_blocks: int | None = None,
) -> Evaluation:
    """Measure a causal language model, by itself and against the dense one.

    Args:
        model: The model to measure; its training mode is left as it was.
        tokenizer: The model's own tokenizer.
        domains: The text for perplexity, read in the order of the source; see `read_heldout`.
        tasks: The names of registered lm_eval tasks, or JSON-lines files of multiple-choice items; see `Tasks`.
        dense: Another model with the same tokenizer to compare with: adds its own perplexities and scores, the
            divergence from it and the agreement with it.
        seq_length: The number of tokens in a sample.
        num_samples: The number of samples per domain at most; None reads every domain to its end.
        batch_size: The number of samples, or of sequences of a task, in a forward pass.
        limit: The number of items per task at most; None takes all of them.
        manifest: The manifest of what the model was calibrated on, to warn of domains that share text with it; by
            default the one in the folder that the model was loaded from, if there is one.
        num_blocks: The former name of `num_samples`; it gives a FutureWarning.

    Raises:
        StructPruneError: If there is nothing to measure, a domain or a task cannot be read, or the models do not fit
            each other, the tokenizer or the samples.
    """
    if num_blocks is not None:
        warnings.warn("evaluate: num_blocks is called num_samples now.", FutureWarning, stacklevel=2)
        num_samples = num_blocks
    named = resolve(as_domain(domain, "evaluate") for domain in domains)
    models = {"model": model} if dense is None else {"model": model, "dense": dense}
    _check(models, named, tasks, seq_length)
    _check_positive(num_samples=num_samples, batch_size=batch_size, limit=limit)
    # Everything is read before anything is computed, so that a mistake shows at once.
    vocabulary = model.config.get_text_config().vocab_size
    texts = [read_heldout(domain, tokenizer, seq_length, num_samples, vocabulary) for domain in named]
    loaded_tasks = Tasks(tasks) if tasks else None
    prefix = prefix_token(tokenizer)
    evaluation = Evaluation(
        model=model.name_or_path or type(model).__name__,
        dense=None if dense is None else dense.name_or_path or type(dense).__name__,
        seq_length=seq_length,
        prefix=None if prefix is None else str(tokenizer.convert_ids_to_tokens(prefix)),
    )
    if (manifest := manifest or _manifest(model)) is not None:
        overlaps = _overlaps(manifest, texts)
        evaluation.shared = list(overlaps)
        evaluation.warnings = [sentence for sentences in overlaps.values() for sentence in sentences]
    for warning in evaluation.warnings:
        warnings.warn(warning, stacklevel=2)
    for text in texts:
        _measure(evaluation, model, dense, text, batch_size)
    if loaded_tasks is not None:
        scores = {which: loaded_tasks.score(one, tokenizer, batch_size, limit) for which, one in models.items()}
        evaluation.tasks = {name: {which: scores[which][name] for which in models} for name in scores["model"]}
    return evaluation


def _measure(
    evaluation: Evaluation, model: PreTrainedModel, dense: PreTrainedModel | None, text: Heldout, batch_size: int
) -> None:
    name = text.domain.name
    evaluation.tokens[name] = text.samples[:, 1:].numel()
    if dense is None:
        evaluation.perplexity[name] = {"model": perplexity(model, text.samples, batch_size)}
        return
    both = compare(model, dense, text.samples, batch_size)
    evaluation.perplexity[name] = {"model": both.perplexity, "dense": both.dense_perplexity}
    evaluation.divergence[name], evaluation.agreement[name] = both.divergence, both.agreement


def _manifest(model: PreTrainedModel) -> Manifest | None:
    if not model.name_or_path:
        return None
    path = Path(model.name_or_path) / MANIFEST_NAME
    return Manifest.load(path) if path.is_file() else None


def _overlaps(manifest: Manifest, texts: Sequence[Heldout]) -> dict[str, list[str]]:
    """What texts share with the calibration, in sentences, by domain; without those that share nothing."""
    found = {
        text.domain.name: [
            f"The domain {text.domain.name!r}: {shared}." for shared in manifest.overlaps(text.domain, text.documents)
        ]
        for text in texts
    }
    return {name: sentences for name, sentences in found.items() if sentences}


def _check(
    models: Mapping[str, PreTrainedModel],
    domains: Sequence[DomainConfig],
    tasks: Sequence[str | Path],
    seq_length: int,
) -> None:
    if not domains and not tasks:
        raise StructPruneError("There is nothing to evaluate: name a domain (NAME=SOURCE) or a task.")
    for model in models.values():
        if model.config.is_encoder_decoder or not model.can_generate():
            raise StructPruneError(f"{type(model).__name__} does not predict the next token: only such models count.")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if domains and longest is not None and seq_length > longest:
            raise StructPruneError(f"seq_length={seq_length} is longer than the model's {longest} positions.")
    sizes = [model.config.get_text_config().vocab_size for model in models.values()]
    if len(set(sizes)) > 1:
        raise StructPruneError(f"The model has a vocabulary of {sizes[0]}, the dense one of {sizes[1]}.")


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise StructPruneError(f"{name} has to be 1 or more, got {number}.")


def _ratio(ppl: Mapping[str, float]) -> str:
    return f"x {ppl['model'] / ppl['dense']:.3f}"


def _with_error(scores: Mapping[str, float], metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    error = scores.get(f"{name}_stderr{comma}{filtered}")
    return f"{scores[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}")
