"""Measure the quality of a model: perplexity by domain, divergence from the original model, vectors, and answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, positions_of, predicts_next, reads_text
from ..arch.settings import own_settings
from ..config.domains import DomainConfig, as_domain
from ..domains.manifest import CALIBRATED, Manifest, check_kinds, check_tokens
from ..domains.packing import check_reads_any_text, check_vocabulary, prefix_token
from ..domains.sources import resolve
from ..domains.templates import read_pairs
from ..measure.languages import costs_before, with_costs_after
from ..measure.losses import Losses, measure, totals
from ..measure.text import Text
from ..measure.vectors import Embeddings, Texts, texts_compared
from ..pruning.comparison import enter_vectors
from ..record.figures import (
    ORIGINAL,
    PRUNED,
    Answer,
    AnswersResult,
    Figure,
    TextResult,
    language_costs,
    perplexity_result,
)
from ..record.report import Evaluation
from ..system.errors import SeenTextWarning, StructPruneError, warn
from ..system.fingerprint import vocabulary_hash
from ..system.placement import check_devices
from ..system.stages import stage
from ..vocabulary.token_alignment import TokenAlignment
from .answers import MIN_BATCH, Question, answers_result, ask, read_answers, read_questions
from .heldout import Heldout, cut_texts, read_heldout


# The number of tokens in a sample, unless a model has fewer positions.
SEQ_LENGTH = 512


@own_settings()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[DomainConfig | Mapping[str, Any]] = (),
    original: PreTrainedModel | None = None,
    *,
    original_tokenizer: PreTrainedTokenizerBase | None = None,
    seq_length: int | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    manifest: Manifest | None = None,
    answers: str | Path | None = None,
    max_new_tokens: int = 120,
    pairs: Sequence[str | Path] = (),
) -> Evaluation:
    """Measure a causal language model, alone or against the original model, or the vectors of an encoder.

    Args:
        model: The model to measure. Its training mode does not change.
        tokenizer: The model's own tokenizer.
        domains: The text for perplexity, read in the order of the source; see `read_heldout`.
        original: Another model to compare with. This adds its own perplexities and answers, the divergence from it and
            the agreement with it, and whether the two differ on the same questions.
        original_tokenizer: The tokenizer of the original model if it differs from the model's own. Each model then
            reads the same text with its own tokenizer, and perplexity is per token of the original one, with or
            without `original`.
        seq_length: The number of tokens in a sample. The default is 512, or the positions of the model with the fewest
            positions. Samples are cut, with a warning, if a model spells them with more tokens than it has positions.
        num_samples: The maximum number of samples per domain; None reads every domain to its end.
        batch_size: The number of samples in a forward pass; see `perplexity` for the default. At least 32 questions
            are asked together.
        limit: The maximum number of questions; None asks all of them.
        manifest: The manifest of the model's calibration text. It shows which domains are calibration domains, and
            text that is in both causes a warning. By default it is the manifest in the folder that the model was
            loaded from, if there is one.
        answers: The questions that the models answer: "builtin" or a JSON-lines file, see `read_questions`.
        max_new_tokens: The maximum number of tokens in an answer.
        pairs: For encoders, JSON-lines files with two texts in each line: a query and its passage, or a text and its
            translation. The retrieval is measured on them.

    Returns:
        The figures.

    Raises:
        StructPruneError: If there is nothing to measure, a domain or the questions cannot be read, or the models do
            not fit each other, the tokenizer or the samples.
    """
    resolved_domains = resolve(as_domain(domain) for domain in domains)
    models = {PRUNED: model} if original is None else {ORIGINAL: original, PRUNED: model}
    tokenizers = {PRUNED: tokenizer, ORIGINAL: original_tokenizer or tokenizer}
    for name, model_tokenizer in tokenizers.items():
        check_kinds(models.get(name, model), model_tokenizer)
        check_reads_any_text(model_tokenizer)
    check_evaluation(list(models.values()), resolved_domains, answers, seq_length, original_tokenizer, pairs)
    for name, compared_model in models.items():
        check_devices(compared_model)
        check_tokens(compared_model, tokenizers[name])
    _check_counts(num_samples=num_samples, batch_size=batch_size, limit=limit, max_new_tokens=max_new_tokens)

    seq_length = seq_length or default_seq_length(models.values())
    # Everything is read before anything is computed, so that an error shows at once.
    texts = [read_heldout(domain, tokenizers[ORIGINAL], seq_length, num_samples) for domain in resolved_domains]
    translations = read_pairs(pairs)
    questions: list[Question] = []
    if answers is not None:
        questions = read_questions(answers, tokenizers.values())[:limit]

    tokens_differ = _tokens_differ(models, tokenizers)
    is_causal = predicts_next(model)
    if texts and is_causal and tokens_differ:
        texts = cut_texts(texts, models, tokenizers)
        seq_length = texts[0].samples.shape[1]
    parts = None
    if is_causal and original is not None:
        parts = _parts(models, tokenizers)

    # An error shows that a model cannot read a text.
    texts_by_model: dict[str, dict[str, Text]] = {}
    if is_causal:
        for text in texts:
            texts_by_model[text.domain.name] = _texts_by_model(text.samples, models, tokenizers, tokens_differ)

    evaluation = _empty_evaluation(models, tokenizers[ORIGINAL], seq_length)
    manifest = manifest or Manifest.seen_by(model)
    if manifest is not None:
        _compare_text(evaluation, manifest, texts)

    tokens = None if batch_size is None else batch_size * seq_length
    for name, by_model in texts_by_model.items():
        with stage(f"measuring {name}", {}):
            evaluation.domains[name] = _domain_result(models, by_model, parts, tokens)
    if not is_causal:
        _compare_vectors(evaluation, models, tokenizers, texts, translations, tokens_differ)
    if questions:
        evaluation.answers = _answers(models, tokenizers, questions, max_new_tokens, batch_size)
    return evaluation


def default_seq_length(models: Iterable[PreTrainedModel]) -> int:
    """Return the number of tokens in a sample that models read: 512, or fewer if a model has fewer positions."""
    return int(min(SEQ_LENGTH, *map(positions_of, models)))


def _texts_by_model(
    samples: Tensor,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    tokens_differ: bool,
) -> dict[str, Text]:
    """Return one text in the tokens of each model. The original model comes first.

    Args:
        samples: The token ids of the original tokenizer, shape `(samples, seq_length)`.
        models: The models.
        tokenizers: Their tokenizers.
        tokens_differ: Whether the tokenizers differ.
    """
    text = Text.of(samples, tokenizers[ORIGINAL])
    if not tokens_differ:
        check_vocabulary(int(samples.max()), models[PRUNED].config.get_text_config().vocab_size)
        return dict.fromkeys(models, text)
    return {name: text.for_tokenizer(tokenizers[name], model) for name, model in models.items()}


def _domain_result(
    models: Mapping[str, PreTrainedModel],
    texts: Mapping[str, Text],
    parts: TokenAlignment | None,
    tokens: int | None,
) -> TextResult:
    """Return the figures of a domain that the models and their vocabularies allow.

    Args:
        models: The models.
        texts: The text in the tokens of each model.
        parts: The tokens of the original model as parts of the model's tokens; None if the model cannot spell them.
        tokens: The maximum number of tokens in a forward pass.
    """
    model = models[PRUNED]
    original = models.get(ORIGINAL)
    text = texts[PRUNED]
    measured = Losses()
    values: dict[str, list[Tensor]] = {}
    if text.original is None:
        measured = measure(model, text, original, tokens=tokens)
        if original is not None:
            values[ORIGINAL] = measured.other
        values[PRUNED] = measured.loss
    else:
        values = {name: measure(models[name], own_text).loss for name, own_text in texts.items()}
        if parts is not None:
            measured = measure(model, text.original, original, parts)

    sums = {name: totals(by_row) for name, by_row in values.items()}
    losses = {name: total / text.tokens for name, total in sums.items()}
    result = perplexity_result(losses, int(text.tokens.sum()), text.documents)
    result.bits_per_byte = Figure.of({name: text.bits_per_byte(total) for name, total in sums.items()})
    if measured.kl:
        result.divergence = Figure(pruned=float(torch.cat(measured.kl).mean()))
    if measured.agrees:
        result.agreement = Figure(pruned=float(torch.cat(measured.agrees).mean()))
    return result


def _empty_evaluation(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Evaluation:
    """Return an evaluation without figures.

    Args:
        models: The model and, where there is one, the original model.
        tokenizer: The tokenizer that cuts the text into samples.
        seq_length: The number of tokens in a sample.
    """
    evaluation = Evaluation(model=_name(models[PRUNED]), seq_length=seq_length)
    if ORIGINAL in models:
        evaluation.original = _name(models[ORIGINAL])

    prefix = prefix_token(tokenizer)
    if prefix is not None:
        evaluation.prefix = str(tokenizer.convert_ids_to_tokens(prefix))
    return evaluation


def _name(model: PreTrainedModel) -> str:
    """Return the name or the folder of a model, or its class."""
    return model.name_or_path or type(model).__name__


def _check_counts(**counts: int | None) -> None:
    """Raise `StructPruneError` if a number is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise StructPruneError(f"`{name}` must be at least 1, got {count}.")


def _tokens_differ(models: Mapping[str, PreTrainedModel], tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> bool:
    """Return whether the models or their tokenizers have different vocabularies."""
    sizes = {model.config.get_text_config().vocab_size for model in models.values()}
    hashes = {vocabulary_hash(tokenizer) for tokenizer in tokenizers.values()}
    return len(sizes) > 1 or len(hashes) > 1


def _compare_text(evaluation: Evaluation, manifest: Manifest, texts: Sequence[Heldout]) -> None:
    """Enter the domains that the model was calibrated on, and warn of text that it has seen."""
    evaluation.calibrated = []
    overlaps: dict[str, list[str]] = {}

    for text in texts:
        domain = text.domain
        # A calibration domain has the same name or was read from the same place.
        if any(entry.name == domain.name or entry.uses(domain) for entry in manifest.domains):
            evaluation.calibrated.append(domain.name)
        overlaps[domain.name] = list(manifest.overlaps(domain, text.documents))

    # Without calibration text, the manifest does not show which text the model has seen.
    if manifest.with_use(CALIBRATED):
        evaluation.shared = [name for name, sentences in overlaps.items() if sentences]
    for name, sentences in overlaps.items():
        evaluation.warnings += [f"The domain {name!r}: {sentence}." for sentence in sentences]

    for warning in evaluation.warnings:
        warn(warning, SeenTextWarning)


def _compare_vectors(
    evaluation: Evaluation,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    texts: Sequence[Heldout],
    pairs: Mapping[str, Sequence[str]],
    tokens_differ: bool,
) -> None:
    """Enter the similarity of an encoder's vectors to the vectors of the original model."""
    compared_texts: dict[str, Texts] = {}
    for text in texts:
        compared_texts[text.domain.name] = texts_compared(text.samples, tokenizers[ORIGINAL])
    for name, pair_texts in pairs.items():
        compared_texts[name] = Texts.of_pairs(pair_texts)

    embeddings = Embeddings(models[ORIGINAL], compared_texts, tokenizers[ORIGINAL], tokens_differ, pairs)
    embeddings.set_tokenizer(tokenizers[PRUNED], models[PRUNED])
    if embeddings.spoken:
        costs = with_costs_after(costs_before(None, tokenizers[ORIGINAL], ()), None, tokenizers[PRUNED])
        evaluation.languages = language_costs(costs)
    enter_vectors(evaluation, embeddings, models[PRUNED])


def _parts(
    models: Mapping[str, PreTrainedModel], tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> TokenAlignment | None:
    """Return the tokens of the original model as parts of the model's tokens.

    Return None if the model cannot spell all of them, for example because it has tokens of its own.
    """
    try:
        parts = TokenAlignment.between(models[ORIGINAL], tokenizers[ORIGINAL], models[PRUNED], tokenizers[PRUNED])
    except StructPruneError:
        return None

    if not all(parts.spellings[: len(tokenizers[ORIGINAL])]):
        return None
    return parts


def _answers(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int | None,
) -> AnswersResult:
    """Return the answers of the models. The answers of the original model come first.

    Args:
        models: The models.
        tokenizers: Their tokenizers.
        questions: The questions.
        max_new_tokens: The maximum number of tokens in an answer.
        batch_size: The number of samples in a forward pass.
    """
    batch_size = max(batch_size or 0, MIN_BATCH)
    answers: dict[str, list[Answer]] = {}
    for name, model in models.items():
        tokenizer = tokenizers[name]
        answers[name] = ask(model, tokenizer, questions, max_new_tokens, batch_size, is_original=name == ORIGINAL)
        if name != ORIGINAL and ORIGINAL in models:
            read_answers(model, tokenizer, questions, answers[ORIGINAL], answers[name])
    return answers_result(questions, answers, next(iter(tokenizers.values())))


def check_evaluation(
    models: Sequence[PreTrainedModel],
    domains: Sequence[DomainConfig | Mapping[str, Any]],
    answers: str | Path | None,
    seq_length: int | None,
    original_tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[str | Path] = (),
) -> None:
    """Check the arguments of `evaluate`.

    Args:
        models: The original model, where there is one, and the model. They may be without weights.
        domains: The text.
        answers: The questions.
        seq_length: The number of tokens in a sample; None for the default.
        original_tokenizer: The tokenizer of the original model if it differs.
        pairs: The files with translations.

    Raises:
        StructPruneError: If the evaluation cannot be made.
    """
    if not domains and answers is None and not pairs:
        raise StructPruneError("There is nothing to evaluate. Pass a domain (NAME=SOURCE), or questions.")

    encoders = [model for model in models if not predicts_next(model)]
    if encoders:
        _check_encoders(encoders, answers)
    elif pairs:
        raise StructPruneError(
            f"{type(models[-1]).__name__} predicts the next token, and pairs are for encoders. Remove `pairs`."
        )

    if domains and seq_length is not None:
        for model in models:
            check_positions(model, seq_length, f"seq_length={seq_length}")

    sizes = [model.config.get_text_config().vocab_size for model in models]
    if len(set(sizes)) > 1 and original_tokenizer is None:
        raise StructPruneError(
            f"The model has a vocabulary of {sizes[-1]}, and the original model has one of {sizes[0]}. Pass the "
            "original model's tokenizer (`original_tokenizer`)."
        )


def _check_encoders(encoders: Sequence[PreTrainedModel], answers: str | Path | None) -> None:
    """Raise `StructPruneError` if encoders cannot be evaluated.

    Args:
        encoders: The models that do not predict the next token.
        answers: The questions.
    """
    for model in encoders:
        if not reads_text(model):
            raise StructPruneError(
                f"{type(model).__name__} reads {model.main_input_name}, and only models of text can be evaluated. "
                "Evaluate it on its own task."
            )

    if len(encoders) < 2 or answers is not None:
        raise StructPruneError(
            f"{type(encoders[0]).__name__} does not predict the next token. Only its vectors of text can be compared: "
            "pass domains or pairs, and an original model of the same kind (--against)."
        )
