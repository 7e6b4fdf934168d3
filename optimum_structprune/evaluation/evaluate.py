"""How good a model is: perplexity by domain, closeness to the dense model, vectors of an encoder, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, predicts_next, reads_text
from ..config.domains import DomainConfig, as_domain
from ..domains.manifest import CALIBRATED, Manifest, check_kinds, check_tokens
from ..domains.packing import prefix_token
from ..domains.sources import resolve
from ..errors import SeenTextWarning, StructPruneError, warn
from ..forward.metrics import own_settings
from ..pruning.embeddings import Embeddings, passages_of
from ..record.evaluation import Evaluation
from ..record.figures import DENSE, PRUNED, AnswersResult, language_costs
from ..system.fingerprint import vocabulary_hash
from ..system.placement import check_devices
from ..vocabulary.languages import costs_before, with_costs_after
from ..vocabulary.token_alignment import TokenAlignment
from .answers import AT_ONCE, Question, answer_divergence, answers_result, ask, read_questions
from .heldout import EvaluationText, Heldout, read_heldout, read_pairs


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
    models = {PRUNED: model} if dense is None else {DENSE: dense, PRUNED: model}
    tokenizers = {PRUNED: tokenizer, DENSE: dense_tokenizer or tokenizer}
    for name, reader in tokenizers.items():
        check_kinds(models.get(name, model), reader)
    check_evaluation(list(models.values()), named, answers, seq_length, dense_tokenizer, pairs)
    for name, checked in models.items():
        check_devices(checked)
        check_tokens(checked, tokenizers[name])
    _check_counts(num_samples=num_samples, batch_size=batch_size, limit=limit, max_new_tokens=max_new_tokens)

    # Everything is read before anything is computed, so that a mistake shows at once.
    texts = [read_heldout(domain, tokenizers[DENSE], seq_length, num_samples) for domain in named]
    translations = read_pairs(pairs)
    questions = [] if answers is None else read_questions(answers, tokenizers.values())[:limit]

    tokens_differ = _tokens_differ(models, tokenizers)
    causal = predicts_next(model)
    parts = _parts(models, tokenizers) if causal and dense is not None else None
    # Models of other kinds cannot read some text, which is refused here.
    judged: dict[str, EvaluationText] = {}
    if causal:
        for text in texts:
            judged[text.domain.name] = EvaluationText(text.samples, models, tokenizers, tokens_differ, parts)

    prefix = prefix_token(tokenizers[DENSE])
    evaluation = Evaluation(
        model=_name(model),
        original=None if dense is None else _name(dense),
        seq_length=seq_length,
        prefix=None if prefix is None else str(tokenizers[DENSE].convert_ids_to_tokens(prefix)),
    )
    manifest = manifest or Manifest.seen_by(model)
    if manifest is not None:
        _compare_text(evaluation, manifest, texts)

    for name, evaluation_text in judged.items():
        evaluation.domains[name] = evaluation_text.measure(batch_size)
    if not causal:
        _compare_vectors(evaluation, models, tokenizers, texts, translations, tokens_differ)
    if questions:
        evaluation.answers = _answers(models, tokenizers, parts, questions, max_new_tokens, batch_size)
    return evaluation


def _name(model: PreTrainedModel) -> str:
    """Return the name or the folder of a model, or its class."""
    return model.name_or_path or type(model).__name__


def _check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1."""
    for label, number in counts.items():
        if number is not None and number < 1:
            raise StructPruneError(f"{label} has to be 1 or more, got {number}.")


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

    # A manifest without calibration text does not record everything that was seen.
    if manifest.of_use(CALIBRATED):
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
    """Enter how near the vectors of an encoder are to the vectors of the original model."""
    by_domain = {text.domain.name: passages_of(text.samples, tokenizers[DENSE]) for text in texts}
    measured = Embeddings(models[DENSE], {**by_domain, **pairs}, tokenizers[DENSE], tokens_differ, pairs)
    measured.read_by(tokenizers[PRUNED], models[PRUNED])
    if measured.spoken:
        costs = with_costs_after(costs_before(None, tokenizers[DENSE], ()), None, tokenizers[PRUNED])
        evaluation.languages = language_costs(costs)
    measured.enter(evaluation, models[PRUNED])


def _parts(
    models: Mapping[str, PreTrainedModel], tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> TokenAlignment | None:
    """Return the tokens of the original model as parts of the remaining ones.

    It is None if the model cannot spell them all, such as a model with tokens of its own or in another order.
    """
    with suppress(StructPruneError):
        parts = TokenAlignment.between(models[DENSE], tokenizers[DENSE], models[PRUNED], tokenizers[PRUNED])
        return parts if all(parts.spellings[: len(tokenizers[DENSE])]) else None
    return None


def _answers(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    parts: TokenAlignment | None,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int | None,
) -> AnswersResult:
    """Return the answers of the models, those of the original model first."""
    batch_size = max(batch_size or 0, AT_ONCE)
    written = {
        name: ask(model, tokenizers[name], questions, max_new_tokens, batch_size) for name, model in models.items()
    }
    result = answers_result(questions, written)
    if parts is not None:
        prompts = [question.ids(tokenizers[DENSE]) for question in questions]
        result.divergence = answer_divergence(models[DENSE], models[PRUNED], parts, prompts, written[DENSE])
    return result


def check_evaluation(
    models: Sequence[PreTrainedModel],
    domains: Sequence[DomainConfig | Mapping[str, Any]],
    answers: str | Path | None,
    seq_length: int,
    dense_tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[str | Path] = (),
) -> None:
    """Refuse an evaluation that cannot be made.

    Args:
        models: The original model, where there is one, and the model; they may be without weights.
        domains: The text.
        answers: The questions.
        seq_length: The number of tokens in a sample.
        dense_tokenizer: The tokenizer of the original model, where it differs.
        pairs: The files with translations.
    """
    if not domains and answers is None and not pairs:
        raise StructPruneError("There is nothing to evaluate: name a domain (NAME=SOURCE), or ask for answers.")

    encoders = [model for model in models if not predicts_next(model)]
    for model in encoders:
        if not reads_text(model):
            raise StructPruneError(
                f"{type(model).__name__} reads {model.main_input_name}, and this measures text alone; measure it on "
                "what it is for."
            )
    if encoders and (len(encoders) < 2 or answers is not None):
        raise StructPruneError(
            f"{type(encoders[0]).__name__} does not predict the next token: its vectors of text (domains, pairs) are "
            "compared with those of the dense one (--against), which is of this kind too, and nothing else."
        )
    if pairs and not encoders:
        raise StructPruneError(f"{type(models[-1]).__name__} predicts the next token; pairs are for encoders.")

    if domains:
        for model in models:
            check_positions(model, seq_length, f"seq_length={seq_length}")
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if len(set(sizes)) > 1 and dense_tokenizer is None:
        raise StructPruneError(
            f"The model has a vocabulary of {sizes[-1]}, the dense one of {sizes[0]}; name its tokenizer "
            "(dense_tokenizer)."
        )
