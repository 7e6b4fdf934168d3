"""`structprune plan --tokens`: show the share of text that keeps its tokens in vocabularies of several sizes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, Space
from ..config.domains import GENERAL
from ..config.pruning import LANGUAGES, StructPruneConfig
from ..domains.load import load_domains
from ..domains.packing import Domain
from ..record.table import aligned
from ..vocabulary.choose import VocabularyRequest, token_shares
from ..vocabulary.count import language_shares, shares_of
from .arguments import tokens_config
from .loading import loading_without_weights
from .output import Result


# The number of sizes, from all tokens to the fewest.
NUM_SIZES = 8
# The sizes are multiples of this number, like the sizes that a budget chooses.
MULTIPLE = 64


def plan_tokens(args: Namespace) -> Result:
    """Count text as a run would, without weights, and show the share of text that keeps its tokens in each size."""
    loading = loading_without_weights(args, getattr(args, "arch_file", None))
    tokenizer = loading.tokenizer(args.model)
    model_info = ModelInfo.without_weights(
        loading.config(args.model), loading.arch_file, loading.torch_dtype, loading.trust_remote_code
    )
    space = model_info.arch.of(VOCAB)[0]
    config = tokens_config(args, space.size)
    request = VocabularyRequest.of(config, model_info, tokenizer, {VOCAB: space.size})

    domains = load_domains(config, tokenizer)
    heldout_documents: set[str] = set()
    for domain in domains:
        heldout_documents.update(domain.heldout_documents)
    requested, _ = token_shares(request, domains, heldout_documents)
    order = request.order(requested.total())
    text_shares = _text_shares(domains, len(order))
    word_shares = _language_shares(config, tokenizer, len(order))

    model = model_info.plain_model
    shares = dict(text_shares)
    shares.update(word_shares)
    sizes = _sizes(request, order, model, space, shares)
    counts = _tokens_in_use(requested.text, word_shares)
    vocabulary_share = space.size * space.unit_params / model.num_parameters()
    lines = [
        f"{args.model}: {space.size:,} tokens, {vocabulary_share:.1%} of the parameters; "
        f"{len(request.required):,} always stay",
        f"tokens in use: {', '.join(f'{name} {count:,}' for name, count in counts.items())}",
        aligned(_table(sizes)),
        "the share of held-out text, and of the words of languages as often as they occur, that keeps its tokens",
    ]
    values = [size.values() for size in sizes]
    return Result("\n".join(lines), {"model": args.model, "tokens_in_use": counts, "sizes": values})


@dataclass(frozen=True)
class VocabularySize:
    """The size of a model with a vocabulary of one size.

    Attributes:
        tokens: The number of tokens.
        parameters: The number of parameters of the model.
        bytes: The bytes of the weights.
        shares: The share of each text that keeps its tokens.
    """

    tokens: int
    parameters: int
    bytes: int
    shares: dict[str, float]

    def values(self) -> dict[str, float]:
        """Return the plain values for JSON."""
        values: dict[str, float] = {"tokens": self.tokens, "parameters": self.parameters, "bytes": self.bytes}
        values.update(self.shares)
        return values


def _text_shares(domains: Sequence[Domain], size: int) -> dict[str, Tensor]:
    """Return the frequency of each token in the text of each domain, shape `(size,)`."""
    shares = {}
    for domain in domains:
        if domain.name != GENERAL:
            shares[domain.name] = shares_of(domain.probe_or_heldout[:, 1:], size)
    return shares


def _language_shares(config: StructPruneConfig, tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Tensor]:
    """Return the frequency of each token in the words of each language that the config names, shape `(size,)`."""
    shares = {}
    for code in config.languages or ():
        shares[LANGUAGES[code]] = language_shares([code], tokenizer, size)
    return shares


def _sizes(
    request: VocabularyRequest,
    order: list[int],
    model: PreTrainedModel,
    space: Space,
    shares: Mapping[str, Tensor],
) -> list[VocabularySize]:
    """Return the sizes of the model with vocabularies of several sizes.

    Args:
        request: The request for a smaller vocabulary.
        order: The tokens, from the first to keep to the first to remove.
        model: The model, which may be without weights.
        space: The vocabulary of the model.
        shares: The frequency of each token in each text.
    """
    sizes = []
    for num_tokens in _numbers_of_tokens(request):
        parameters = model.num_parameters() - (space.size - num_tokens) * space.unit_params
        kept_tokens = torch.tensor(request.keep(order, num_tokens))
        kept_shares = {name: float(frequencies[kept_tokens].sum()) for name, frequencies in shares.items()}
        sizes.append(VocabularySize(num_tokens, parameters, parameters * model.dtype.itemsize, kept_shares))

    return sizes


def _numbers_of_tokens(request: VocabularyRequest) -> list[int]:
    """Return eight numbers of tokens with about equal ratios between them, the largest first."""
    min_tokens = request.allowed.start
    max_tokens = request.rows
    numbers = set()

    for step in range(NUM_SIZES):
        number = max_tokens * (min_tokens / max_tokens) ** (step / (NUM_SIZES - 1))
        numbers.add(min(ceil(number / MULTIPLE) * MULTIPLE, max_tokens))

    return sorted(numbers, reverse=True)


def _table(sizes: Sequence[VocabularySize]) -> list[list[str]]:
    """Return the sizes as a table."""
    head = ["tokens", "parameters", "MB"]
    head.extend(sizes[0].shares)

    rows = [head]
    for size in sizes:
        row = [f"{size.tokens:,}", f"{size.parameters:,}", f"{size.bytes / 1e6:,.0f}"]
        row.extend(f"{share:.2%}" for share in size.shares.values())
        rows.append(row)
    return rows


def _tokens_in_use(text_shares: Tensor, word_shares: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of different tokens in the text, in the words of each language, and in both.

    Args:
        text_shares: The frequency of each token in the text, shape `(tokens,)`.
        word_shares: The frequency of each token in the words of each language, shape `(tokens,)` each.
    """
    shares = {"text": text_shares}
    shares.update(word_shares)

    counts: dict[str, int] = {}
    all_tokens: set[int] = set()
    for name, frequencies in shares.items():
        tokens = set(frequencies.nonzero().flatten().tolist())
        counts[name] = len(tokens)
        all_tokens.update(tokens)

    counts["all"] = len(all_tokens)
    return counts
