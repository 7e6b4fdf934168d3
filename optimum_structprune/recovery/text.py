"""The text that a pruned model is trained on, and the validation text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import BUILTIN, GENERAL, DomainConfig
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import WRITTEN, builtin_beside, load_domains, texts_of
from ..domains.manifest import Manifest
from ..domains.packing import Domain, SampleFormat, tokenised
from ..domains.sources import documents, resolve
from ..errors import StructPruneError


# Tokens of each kind of text, and of answers, that a model is measured on at most; of validation text more, since
# checkpoints are compared by it.
HELDOUT_TOKENS, VALIDATION_TOKENS = 1_024, 2_048
VALIDATION, OTHER_TEXT = "validation text", "other text"
# The kind that is kept for validation where the training text is of all built-in kinds.
OTHER_KIND = f"{BUILTIN}news"


def text_config(config: RecoveryConfig, pruning: StructPruneConfig) -> StructPruneConfig:
    """Says what to read for the training, by the seed of the pruning: it decides what is held out."""
    # Short samples give more steps to a small number of tokens.
    seq_length = config.seq_length or min(pruning.seq_length, 128)
    no_general_text: dict[str, Any] = {"general_share": 0.0, "general_text": None}
    if pruning.general_text == WRITTEN:  # which takes the model long and won nothing (benchmarks/LOG.md)
        pruning = replace(pruning, **no_general_text)
    domains = resolve(config.domains or texts_of(pruning))
    if config.validation is None and _is_mixed(domains):
        without = f"-{OTHER_KIND.removeprefix(BUILTIN)}"
        domains = [replace(each, source=f"{each.source}{without}") if _is_mixed([each]) else each for each in domains]
    samples = config.tokens // seq_length
    if samples < len(domains):
        raise StructPruneError(
            f"tokens={config.tokens} does not give each of the {len(domains)} domains a sample of {seq_length} "
            f"tokens; {seq_length * len(domains)} is enough."
        )
    # Nothing is chosen, so no text is set aside for it.
    alone = {**no_general_text, "allocation": "uniform"}
    return replace(pruning, domains=domains, num_samples=samples, seq_length=seq_length, **alone)


def training_text(
    config: RecoveryConfig,
    pruning: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seen: Manifest | None = None,
) -> list[Domain]:
    """Reads the text to train on and held-out text; neither has had the other's use in what was `seen`."""
    text = text_config(config, pruning)
    heldout = max(1, min(8, HELDOUT_TOKENS // text.seq_length))
    return load_domains(text, tokenizer, model, heldout, seen)


def validation_text(
    config: RecoveryConfig,
    pruning: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase,
    trained: Collection[str] = (),
) -> Tensor:
    """Reads text of a kind that is not trained on, without `trained` documents, shape `(samples, seq_length)`."""
    text = text_config(config, pruning)
    domains = text.domains or []
    source = config.validation or (OTHER_KIND if _is_mixed(domains) else builtin_beside(domains))
    frame = SampleFormat.of(tokenizer, text.seq_length)
    read = tokenised(documents(DomainConfig(name=VALIDATION, source=source), text.seed, tokenizer), tokenizer)
    new = (document for document in read if document.hash not in trained)
    samples, _ = frame.pack(frame.take(new, VALIDATION_TOKENS), max(1, VALIDATION_TOKENS // text.seq_length))
    if not len(samples):
        raise StructPruneError(
            f"validation={source!r} has less text than a sample of {text.seq_length} tokens that is not trained on; "
            "add some."
        )
    return samples


def _is_mixed(domains: Sequence[DomainConfig]) -> bool:
    return any(str(domain.source).startswith(BUILTIN + GENERAL) for domain in domains)
