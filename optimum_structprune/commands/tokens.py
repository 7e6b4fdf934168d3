"""`structprune plan --tokens`: the share of text that keeps its tokens in a vocabulary of each size."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from math import ceil

import torch
from torch import Tensor

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB
from ..config.domains import GENERAL
from ..config.pruning import LANGUAGES
from ..domains.load import load_domains
from ..record.table import aligned
from ..vocabulary.choose import VocabularyRequest, wanted_shares
from ..vocabulary.count import language_shares, shares_of
from .arguments import tokens_config
from .loading import Loading
from .output import Result


NUM_SIZES = 8  # from all tokens to the fewest
MULTIPLE = 64  # the sizes are multiples, like the sizes that a budget chooses


def plan_tokens(args: Namespace) -> Result:
    """Count text as a run would, without weights, and show the share that each of eight sizes keeps."""
    loading = Loading.of(args, arch_file=getattr(args, "arch_file", None), offload=None)
    tokenizer = loading.tokenizer(args.model)
    model_info = ModelInfo.without_weights(
        loading.config(args.model), loading.arch_file, loading.torch_dtype, loading.trust_remote_code
    )
    model = model_info.plain_model
    space = model_info.arch.of(VOCAB)[0]
    config = tokens_config(args, space.size)
    request = VocabularyRequest.of(config, model_info, tokenizer, {VOCAB: space.size})

    domains = load_domains(config, tokenizer)
    held_out = {name for domain in domains for name in domain.heldout_documents}
    wanted, _ = wanted_shares(request, domains, held_out)
    order = request.order(wanted.total())

    texts: dict[str, Tensor] = {}
    for domain in domains:
        if domain.name != GENERAL:
            texts[domain.name] = shares_of(domain.probe_or_heldout[:, 1:], len(order))
    words: dict[str, Tensor] = {}
    for code in config.languages or ():
        words[LANGUAGES[code]] = language_shares([code], tokenizer, len(order))

    num_parameters = model.num_parameters()
    sizes: list[dict[str, float]] = []
    rows = [["tokens", "parameters", "MB", *texts, *words]]
    for number, shares in _shares_by_size(request, order, {**texts, **words}):
        parameters = num_parameters - (space.size - number) * space.unit_params
        num_bytes = parameters * model.dtype.itemsize
        sizes.append({"tokens": number, "parameters": parameters, "bytes": num_bytes, **shares})
        percentages = [f"{share:.2%}" for share in shares.values()]
        rows.append([f"{number:,}", f"{parameters:,}", f"{num_bytes / 1e6:,.0f}", *percentages])

    counts = _tokens_in_use({"text": wanted.text, **words})
    share = space.size * space.unit_params / num_parameters
    lines = [
        f"{args.model}: {space.size:,} tokens, {share:.1%} of the parameters; {len(request.required):,} always stay",
        f"tokens in use: {', '.join(f'{name} {count:,}' for name, count in counts.items())}",
        aligned(rows),
        "the share of held-out text, and of the words of languages as often as they occur, that keeps its tokens",
    ]
    return Result("\n".join(lines), {"model": args.model, "tokens_in_use": counts, "sizes": sizes})


def _tokens_in_use(shares: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of different tokens in each text, and in all texts."""
    counts: dict[str, int] = {}
    every: set[int] = set()
    for name, shares_of_text in shares.items():
        ids = set(shares_of_text.nonzero().flatten().tolist())
        counts[name] = len(ids)
        every |= ids
    counts["all"] = len(every)
    return counts


def _shares_by_size(
    request: VocabularyRequest, order: list[int], shares: Mapping[str, Tensor]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield eight numbers of tokens with equal ratios between them, and the share of each text that each keeps."""
    all_rows, fewest = request.rows, request.allowed.start
    numbers: set[int] = set()
    for step in range(NUM_SIZES):
        number = all_rows * (fewest / all_rows) ** (step / (NUM_SIZES - 1))
        numbers.add(min(ceil(number / MULTIPLE) * MULTIPLE, all_rows))

    for number in sorted(numbers, reverse=True):
        kept = torch.tensor(request.keep(order, number))
        yield number, {name: float(shares_of_text[kept].sum()) for name, shares_of_text in shares.items()}
