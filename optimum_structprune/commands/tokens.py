"""`structprune plan --tokens`: how much text keeps its tokens in a vocabulary of each size."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping

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


SIZES = 8  # from all tokens to the fewest


def plan_tokens(args: Namespace) -> Result:
    """Count text as a run would, without weights, and show how much of it each of eight sizes keeps."""
    loading = Loading.of(args, arch_file=getattr(args, "arch_file", None), offload=None)
    tokenizer = loading.tokenizer(args.model)
    model_info = ModelInfo.without_weights(
        loading.config(args.model), loading.arch_file, loading.torch_dtype, loading.trust_remote_code
    )
    model, (space,) = model_info.plain_model, model_info.arch.of(VOCAB)
    config = tokens_config(args, space.size)
    request = VocabularyRequest.of(config, model_info, tokenizer, {VOCAB: space.size})
    domains = load_domains(config, tokenizer)
    held_out = {name for domain in domains for name in domain.heldout_documents}
    wanted, _ = wanted_shares(request, domains, held_out)
    order = request.order(wanted.total())
    words = {LANGUAGES[code]: language_shares([code], tokenizer, len(order)) for code in config.languages or ()}
    named = (domain for domain in domains if domain.name != GENERAL)
    texts = {domain.name: shares_of(domain.probe_or_heldout[:, 1:], len(order)) for domain in named}
    sizes, rows = [], [["tokens", "parameters", "MB", *texts, *words]]
    for number, kept in _kept_by_size(request, order, {**texts, **words}):
        parameters = model.num_parameters() - (space.size - number) * space.unit_params
        byte_count = parameters * model.dtype.itemsize
        sizes.append({"tokens": number, "parameters": parameters, "bytes": byte_count, **kept})
        shares = (f"{share:.2%}" for share in kept.values())
        rows.append([f"{number:,}", f"{parameters:,}", f"{byte_count / 1e6:,.0f}", *shares])
    used = {name: {*counts.nonzero().flatten().tolist()} for name, counts in {"text": wanted.text, **words}.items()}
    counts = {name: len(ids) for name, ids in [*used.items(), ("all", set().union(*used.values()))]}
    lines = [
        f"{args.model}: {space.size:,} tokens, {space.size * space.unit_params / model.num_parameters():.1%} of the "
        f"parameters; {len(request.required):,} always stay",
        f"tokens in use: {', '.join(f'{name} {count:,}' for name, count in counts.items())}",
        aligned(rows),
        "the share of held-out text, and of the words of languages as often as they occur, that keeps its tokens",
    ]
    return Result("\n".join(lines), {"model": args.model, "tokens_in_use": counts, "sizes": sizes})


def _kept_by_size(
    request: VocabularyRequest, order: list[int], shares: Mapping[str, Tensor]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Numbers of tokens, each a like part of the one before, and how much of each text they keep."""
    rows, fewest = request.rows, request.allowed.start
    goals = [rows * (fewest / rows) ** (step / (SIZES - 1)) for step in range(SIZES)]
    # Multiples as in the sizes that a budget chooses; of few tokens they are fewer.
    for number in sorted({min(-int(-goal // 64) * 64, rows) for goal in goals}, reverse=True):
        stays = torch.tensor(request.keep(order, number))
        yield number, {name: float(of_text[stays].sum()) for name, of_text in shares.items()}
