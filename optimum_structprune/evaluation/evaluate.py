"""How good a model is: perplexity by domain, closeness to the dense model, vectors of an encoder, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, predicts_next, reads_text
from ..config.domains import DomainConfig, as_domain
from ..domains.manifest import CALIBRATED, Manifest, check_kinds, check_tokens
from ..domains.packing import prefix_token
from ..domains.sources import resolve
from ..errors import StructPruneError, warn
from ..forward.metrics import own_settings
from ..pruning.embeddings import Embeddings, passages_of
from ..record.answers import paired
from ..record.remarks import measurements_text
from ..record.report import enter_figures
from ..system.fingerprint import vocabulary_hash
from ..vocabulary.languages import costs_before, with_costs_after
from ..vocabulary.token_alignment import TokenAlignment
from ..written import Record
from .answers import AT_ONCE, FIGURES, Answer, Question, answer_divergence, ask, figures_of, items_of, read_questions
from .heldout import Heldout, Judged, read_heldout, read_pairs


@dataclass
class Evaluation(Record):
    """The numbers that `evaluate` measured; `str` of it is a table.

    Attributes:
        model: The name or the folder of the model.
        dense: The name or the folder of the dense model that it is compared with; None where there is none.
        seq_length: The number of tokens in a sample. The first is context only, the others are predicted.
        prefix: The token at the head of each sample; None where the tokenizer has none.
        perplexity: The perplexities per token of the dense tokenizer, `{domain: {"dense": …, "model": …}}`; "dense"
            only where there is a dense model.
        perplexity_margin: Their margins of error, and with a dense model that of "ratio": the truth lies within them
            nine times in ten, on other documents of the kind; NaN on one document.
        perplexity_tokens: The number of tokens that they were measured on, by domain.
        perplexity_documents: The number of documents that these begin in, by domain.
        bits_per_byte: The losses per byte of the text in bits, `{domain: {"dense": …, "model": …}}`.
        calibrated: Which domains are of a kind that the model was calibrated on; None where nothing says so.
        divergence: The mean KL(dense‖model) per token of the dense tokenizer in nats, by domain; where the model has
            lost tokens, in the tokens that it has (`TokenAlignment`); absent where its tokens are unrelated.
        agreement: The share of predicted tokens for which both models find the same one likeliest, by domain, where
            both have the same tokens.
        embeddings: How near the vectors of an encoder are to the dense model's, by domain and model.
        languages: The same of an encoder with another tokenizer, in 30 languages, with the tokens that a text takes.
        warnings: The reasons why these numbers may be too good.
        shared: The domains that share something with what the model was calibrated on; None where that is not known.
        answers: The questions that were asked, `{"kind": …, "prompt": …, "answers": {"dense": {…}, "model": {…}}}`.
        figures: The figures of all answers, `{"model": {"right": …, "right_margin": …, …}, "dense": {…}}`.
        paired: How the figures differ from the dense model's on the same questions, by figure.
    """

    model: str
    dense: str | None = None
    seq_length: int = 0
    prefix: str | None = None
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_margin: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_tokens: dict[str, int] = field(default_factory=dict)
    perplexity_documents: dict[str, int] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    calibrated: list[str] | None = None
    divergence: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    shared: list[str] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    paired: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table of all figures, some answers, and the warnings."""
        return measurements_text(self.to_dict())


@own_settings()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[DomainConfig | Mapping[str, Any]] = (),
    dense: PreTrainedModel | None = None,
    *,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
    seq_length: int = 512,
    num_samples: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    manifest: Manifest | None = None,
    answers: str | Path | None = None,
    max_new_tokens: int = 120,
    pairs: Sequence[str | Path] = (),
) -> Evaluation:
    """Measure a model, by itself or against the dense one; of an encoder its vectors.

    Args:
        model: The model to measure; its training mode is left as it was.
        tokenizer: The model's own tokenizer.
        domains: The text for perplexity, read in the order of the source; see `read_heldout`.
        dense: Another model to compare with: adds its own perplexities and answers, the divergence from it and the
            agreement with it, and whether the two differ on the same questions.
        dense_tokenizer: The tokenizer of the dense model, where it is not the model's own. Each model then reads the
            same text with its own tokenizer, and perplexity is per token of the dense one, with or without `dense`.
        seq_length: The number of tokens in a sample.
        num_samples: The number of samples per domain at most; None reads every domain to its end.
        batch_size: The number of samples in a forward pass; by default 1 on a CPU and up to 16 on a GPU, see
            `perplexity`. Of the questions, at least 32.
        limit: The number of questions at most; None takes all of them.
        manifest: The manifest of what the model was calibrated on, to tell domains of these kinds from others, and to
            warn of those that share text with it; by default the one in the folder that the model was loaded from, if
            there is one.
        answers: The questions that the models answer: "builtin" or a JSON-lines file, see `read_questions`.
        max_new_tokens: The number of tokens in an answer at most.
        pairs: For encoders, JSON-lines files with a text and its translation in each line, which look for each other.

    Raises:
        StructPruneError: If there is nothing to measure, a domain or the questions cannot be read, or the models do
            not fit each other, the tokenizer or the samples.
    """
    named = resolve(as_domain(domain) for domain in domains)
    models = {"model": model} if dense is None else {"dense": dense, "model": model}
    readers = {"model": tokenizer, "dense": dense_tokenizer or tokenizer}
    for which, reader in readers.items():
        check_kinds(models.get(which, model), reader)
    check_evaluation(models, named, answers, seq_length, dense_tokenizer, pairs)
    for which, each in models.items():
        check_tokens(each, readers[which])
    numbers = {"num_samples": num_samples, "batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens}
    for label, number in numbers.items():
        if number is not None and number < 1:
            raise StructPruneError(f"{label} has to be 1 or more, got {number}.")
    # Everything is read before anything is computed, so that a mistake shows at once.
    texts = [read_heldout(domain, readers["dense"], seq_length, num_samples) for domain in named]
    sizes = {each.config.get_text_config().vocab_size for each in models.values()}
    differ = len(sizes) > 1 or len(set(map(vocabulary_hash, readers.values()))) > 1
    causal = predicts_next(model)
    parts = _parts(models, readers) if causal and len(models) > 1 else None
    judged = {text.domain.name: Judged(text.samples, models, readers, differ, parts) for text in texts if causal}
    translated = read_pairs(pairs)
    questions = [] if answers is None else read_questions(answers, readers.values())[:limit]
    names = {which: each.name_or_path or type(each).__name__ for which, each in models.items()}
    prefix = prefix_token(readers["dense"])
    head = None if prefix is None else str(readers["dense"].convert_ids_to_tokens(prefix))
    evaluation = Evaluation(names["model"], names.get("dense"), seq_length, head)
    if (manifest := manifest or Manifest.seen_by(model)) is not None:
        _compare_with(evaluation, manifest, texts)
    for name, text in judged.items():
        enter_figures(evaluation, name, text.figures(batch_size))
    if not causal:
        _compare_vectors(evaluation, models, readers, texts, translated, differ)
    if questions:
        how = max_new_tokens, max(batch_size or 0, AT_ONCE)
        written = {which: ask(each, readers[which], questions, *how) for which, each in models.items()}
        _answer(evaluation, models, parts, questions, written, readers["dense"])
    return evaluation


def _compare_with(evaluation: Evaluation, manifest: Manifest, texts: Sequence[Heldout]) -> None:
    """Enter the kinds that were calibrated on, and warn of text that shares sentences with them."""
    # They have the name of one that was calibrated on, or were read from the same place.
    domains, entries = [text.domain for text in texts], manifest.domains
    known = [one for one in domains if any(entry.name == one.name or entry.uses(one) for entry in entries)]
    evaluation.calibrated = [domain.name for domain in known]
    overlaps = {text.domain.name: manifest.overlaps(text.domain, text.documents) for text in texts}
    if manifest.of_use(CALIBRATED):  # otherwise some of what was seen has no record
        evaluation.shared = [name for name, sentences in overlaps.items() if sentences]
    evaluation.warnings = [f"The domain {name!r}: {shared}." for name in overlaps for shared in overlaps[name]]
    for warning in evaluation.warnings:
        warn(warning)


def _compare_vectors(
    evaluation: Evaluation,
    models: Mapping[str, PreTrainedModel],
    readers: Mapping[str, PreTrainedTokenizerBase],
    texts: Sequence[Heldout],
    pairs: Mapping[str, Sequence[str]],
    tokens_differ: bool,
) -> None:
    """Enter how near the vectors of an encoder are to the dense model's."""
    by_domain = {text.domain.name: passages_of(text.samples, readers["dense"]) for text in texts}
    measured = Embeddings(models["dense"], {**by_domain, **pairs}, readers["dense"], tokens_differ, pairs)
    measured.read_by(readers["model"], models["model"])
    if measured.spoken:
        evaluation.languages = with_costs_after(costs_before(None, readers["dense"], ()), None, readers["model"])
    measured.enter(evaluation, models["model"], "dense", "model")


def _parts(
    models: Mapping[str, PreTrainedModel], readers: Mapping[str, PreTrainedTokenizerBase]
) -> TokenAlignment | None:
    """Gives the parts of the dense model's tokens; None where the model cannot spell them all.

    It cannot either where it has tokens of its own, or in another order.
    """
    with suppress(StructPruneError):
        parts = TokenAlignment.between(models["dense"], readers["dense"], models["model"], readers["model"])
        return parts if all(parts.spellings[: len(readers["dense"])]) else None
    return None


def _answer(
    evaluation: Evaluation,
    models: Mapping[str, PreTrainedModel],
    parts: TokenAlignment | None,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Answer]],
    dense_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Enter what the models have answered, the dense one first."""
    evaluation.answers = items_of(questions, answers)
    evaluation.figures = figures = {which: figures_of(given) for which, given in answers.items()}
    if "dense" in models:
        if parts is not None:
            prompts = [question.ids(dense_tokenizer) for question in questions]
            distance = answer_divergence(models["dense"], models["model"], parts, prompts, answers["dense"])
            figures["dense"]["KL"], figures["model"]["KL"] = 0.0, distance
        evaluation.paired = {name: paired(evaluation.answers, name) for name in FIGURES}


def check_evaluation(
    models: Mapping[str, PreTrainedModel],
    domains: Sequence[DomainConfig | Mapping[str, Any]],
    answers: str | Path | None,
    seq_length: int,
    dense_tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[str | Path] = (),
) -> None:
    """Refuse an evaluation that cannot be made; the models may be without weights."""
    if not domains and answers is None and not pairs:
        raise StructPruneError("There is nothing to evaluate: name a domain (NAME=SOURCE), or ask for answers.")
    encoders = [model for model in models.values() if not predicts_next(model)]
    for kind, reads in ((type(one).__name__, one.main_input_name) for one in encoders if not reads_text(one)):
        raise StructPruneError(f"{kind} reads {reads}, and this measures text alone; measure it on what it is for.")
    if encoders and (len(encoders) < 2 or answers is not None):
        raise StructPruneError(
            f"{type(encoders[0]).__name__} does not predict the next token: its vectors of text (domains, pairs) are "
            "compared with those of the dense one (--against), which is of this kind too, and nothing else."
        )
    if pairs and not encoders:
        raise StructPruneError(f"{type(models['model']).__name__} predicts the next token; pairs are for encoders.")
    for model in models.values():
        if domains:
            check_positions(model, seq_length, f"seq_length={seq_length}")
    sizes = [model.config.get_text_config().vocab_size for model in models.values()]
    if len(set(sizes)) > 1 and dense_tokenizer is None:
        raise StructPruneError(
            f"The model has a vocabulary of {sizes[1]}, the dense one of {sizes[0]}; name its tokenizer "
            "(dense_tokenizer)."
        )
