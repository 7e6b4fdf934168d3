"""Generate calibration text with the model itself.

Text of any kind (`ANY`) begins with a random word of the vocabulary (LLM-QAT, Liu et al., 2023, arXiv:2305.17888,
section 3.1). Unseen text continues openings (Williams et al., 2024, arXiv:2410.17170).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf, log
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.generation import continuations, end_tokens
from ..arch.inference import evaluating
from ..arch.meta import check_positions, positions_of, predicts_next
from ..config.domains import OTHER, WRITTEN
from ..config.fields import read_yaml
from ..system.errors import StructPruneError
from ..system.fingerprint import fingerprint
from ..system.processes import broadcast_object, gather_objects, process_index, unshared
from ..system.stages import stage
from ..system.stored import TextCache
from .packing import tokenize_with_prefix


OPENINGS = Path(__file__).with_name("openings.yaml")
# Documents in a batch. 8 documents take as long as 16, and a larger batch is cheaper per document.
FIRST_BATCH = 16
MAX_BATCH = 64
# Tokens in a document. Shorter documents are dropped, and longer ones would take more steps.
MIN_TOKENS = 32
MAX_TOKENS = 64
# The expected length of a document, as a share of `MAX_TOKENS`, before any has been generated.
EXPECTED_SHARE = 0.9
# Tokens whose probability is below this share of the highest one are never sampled. Unseen text needs rare words.
MIN_P = 0.02
OTHER_MIN_P = 1e-4
# A document is dropped as repetitive unless this share of its runs of 4 tokens is distinct.
RUN_TOKENS = 4
MIN_DISTINCT_RUNS = 0.5
# A document is dropped if its perplexity differs from the median of its batch by more than this factor.
MAX_PERPLEXITY_RATIO = 4.0
# After this number of dropped documents in a row, generation stops.
MAX_USELESS_DOCUMENTS = 120


def self_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    seed: int,
    tokens: int,
    openings: Sequence[str] | None = None,
) -> Iterator[str]:
    """Yield documents that a model generates.

    The documents are cached on the disk. They depend only on the model, the seed and `tokens`.

    Args:
        model: A causal language model.
        tokenizer: The tokenizer of the model.
        name: The kind of text: `ANY`, or `OTHER` for unseen text.
        seed: The seed.
        tokens: The number of required tokens, which determines the sizes of batches.
        openings: The openings of unseen text, by default those of `openings.yaml`.

    Raises:
        StructPruneError: If the model is not causal, or if almost all documents are dropped.
    """
    if not predicts_next(model):
        raise StructPruneError(f"{WRITTEN} requires a causal language model, and {type(model).__name__} is not one.")

    # Unseen text must differ from generated calibration text, and it needs rare words.
    min_p = MIN_P
    if name == OTHER:
        min_p = OTHER_MIN_P
        seed = Random(f"{name} {seed}").getrandbits(32)
        prompts = list(openings or _builtin_openings())
    else:
        prompts = vocabulary_words(tokenizer)
    Random(seed).shuffle(prompts)
    yield from _documents(_TextGenerator(model, tokenizer, prompts, seed, min_p), name, tokens)


def _builtin_openings() -> list[str]:
    """Return each opening of each kind of text with each of its topics."""
    openings = []
    for kind in read_yaml(OPENINGS).values():
        for opening in kind["begin"]:
            openings += [opening.replace("{topic}", topic) for topic in kind["topics"]]
    return openings


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the words of a vocabulary that can begin a text, or all its tokens if it has no such words."""
    special_ids = set(tokenizer.all_special_ids)
    texts = set()
    words = set()

    for token_id in range(len(tokenizer)):
        if token_id in special_ids:
            continue

        text = str(tokenizer.decode([token_id])).strip()
        if text:
            texts.add(text)
        if len(text) > 1 and text.isalpha() and not text[0].islower():
            words.add(text)

    return sorted(words or texts)


def _documents(generator: _TextGenerator, name: str, tokens: int) -> Iterator[str]:
    """Yield documents that pass the filters, in batches.

    The first batches are sized to contain `tokens` tokens. Further batches follow without an end.
    """
    cache = generator.cache(name)
    batches_by_name = broadcast_object(cache.read())
    num_generated = 0
    num_tokens = 0
    num_dropped = 0

    while True:
        mean_tokens = EXPECTED_SHARE * MAX_TOKENS
        if num_tokens:
            mean_tokens = num_tokens / num_generated

        batches = _batches(num_generated, ceil((tokens - num_tokens) / mean_tokens))

        for index, batch in enumerate(batches):
            if str(batch) not in batches_by_name:
                batches_by_name.update(_generate(generator, batches[index:], cache))

            documents = batches_by_name.pop(str(batch))
            num_generated = batch[-1] + 1
            num_tokens += sum(len(generator.tokenizer(text)["input_ids"]) for text in documents)
            num_dropped += len(batch)
            if documents:
                num_dropped = 0

            if num_dropped >= MAX_USELESS_DOCUMENTS:
                raise StructPruneError(
                    f"{WRITTEN}: the last {num_dropped} documents of the model are too short, repetitive or "
                    "unlikely. Use other text for this model."
                )
            yield from documents


@dataclass(frozen=True)
class _TextGenerator:
    """A model that generates one kind of text from a list of prompts.

    Attributes:
        model: The model.
        tokenizer: The tokenizer of the model.
        prompts: The beginnings of documents. Document i begins with prompt `i % len(prompts)`.
        seed: The seed.
        min_p: The lowest sampled probability, relative to the highest one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    seed: int
    min_p: float

    def cache(self, name: str) -> TextCache:
        """Return the file of the documents of this generator. Every setting that changes them is part of its key."""
        filters = [MAX_TOKENS, MIN_TOKENS, self.min_p, RUN_TOKENS, MIN_DISTINCT_RUNS, MAX_PERPLEXITY_RATIO]
        tokenizer = [len(self.tokenizer), end_tokens(self.model, self.tokenizer)]
        settings = [fingerprint(self.model)] + filters + tokenizer + [self.prompts[:MAX_BATCH], self.seed]
        return TextCache(name, *settings)

    def generate(self, batch: range) -> list[str]:
        """Generate the documents with these numbers, and return the documents that pass the filters."""
        prompts = [self.prompts[number % len(self.prompts)] for number in batch]
        with evaluating(self.model), stage("writing"):
            continuations_with_loss = self._continue(prompts, batch[0])

        candidates = []
        for prompt, (ids, loss) in zip(prompts, continuations_with_loss, strict=True):
            if _is_varied(ids):
                candidates.append((prompt, ids, loss))

        median_loss = median([loss for *_, loss in candidates] or [0.0])
        documents = []

        for prompt, ids, loss in candidates:
            if abs(loss - median_loss) > log(MAX_PERPLEXITY_RATIO):
                continue

            documents.append(prompt + str(self.tokenizer.decode(ids, skip_special_tokens=True)))

        return documents

    @torch.no_grad()
    def _continue(self, prompts: Sequence[str], first_number: int) -> list[tuple[list[int], float]]:
        """Return the continuation of each prompt as token ids, and its loss in nats per token."""
        rows = [tokenize_with_prefix(prompt, self.tokenizer) for prompt in prompts]
        prompt_length = max(len(row) for row in rows)
        check_positions(self.model, 1, "Generated text", prompt_length)
        max_new_tokens = int(min(MAX_TOKENS, positions_of(self.model) - prompt_length))
        # The losses of each step in nats, shape `(rows, 1)`.
        losses: list[Tensor] = []

        def sample(_: Tensor, scores: Tensor) -> Tensor:
            token = sample_min_p(scores, self.min_p)
            losses.append(scores.logsumexp(1, keepdim=True) - scores.gather(1, token))
            # Greedy search then selects the sampled token.
            return torch.full_like(scores, -inf).scatter(1, token, 0.0)

        devices = []
        if self.model.device.type == "cuda":
            devices.append(self.model.device)
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed * 1_000_003 + first_number)
            settings = {"max_new_tokens": max_new_tokens, "use_cache": True}
            label = f"Generating {len(rows)} documents"
            texts = continuations(self.model, self.tokenizer, rows, settings, label, [sample])

        losses_by_row = torch.cat(losses, 1)
        return [(text, float(losses_by_row[row, : len(text)].mean())) for row, text in enumerate(texts)]


def sample_min_p(scores: Tensor, min_p: float = MIN_P) -> Tensor:
    """Sample a token for each row of logits, by inverse transform sampling, which is cheaper than `multinomial`.

    Args:
        scores: Logits, shape `(rows, vocab_size)`.
        min_p: Tokens whose probability is below this share of the highest one are excluded.

    Returns:
        Token ids, shape `(rows, 1)`.
    """
    highest = scores.max(1, keepdim=True).values
    # This condition keeps NaN, which later checks report.
    candidates = ~(scores < highest + log(min_p))
    row, token = candidates.nonzero(as_tuple=True)

    # One cumulative sum over the candidates of all rows.
    sums = (scores[row, token] - highest[row, 0]).exp().double().cumsum(0)
    last_candidate = row.bincount(minlength=len(scores)).cumsum(0) - 1
    row_ends = sums[last_candidate]
    row_starts = torch.cat([row_ends.new_zeros(1), row_ends[:-1]])

    threshold = torch.lerp(row_starts, row_ends, torch.rand_like(row_ends))
    index = torch.searchsorted(sums, threshold, right=True).minimum(last_candidate)
    return token[index].unsqueeze(1)


def _batches(start: int, count: int) -> list[range]:
    """Divide `count` documents, numbered from `start`, into batches. The last batch may be larger than `MAX_BATCH`."""
    batches: list[range] = []

    while count > 0 or not batches:
        size = max(count, FIRST_BATCH)
        if count > 1.5 * MAX_BATCH:
            size = MAX_BATCH
        batches.append(range(start, start + size))
        start += size
        count -= size

    return batches


def _is_varied(ids: Sequence[int]) -> bool:
    """Return whether a document is long enough and not repetitive."""
    runs = [tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1)]
    return len(ids) >= MIN_TOKENS and len(set(runs)) >= MIN_DISTINCT_RUNS * len(runs)


def _generate(generator: _TextGenerator, batches: Sequence[range], cache: TextCache) -> dict[str, list[str]]:
    """Generate one of the first batches in each process, and add them to the cache.

    Returns:
        The documents of each generated batch, by its name.
    """
    own_batch = batches[process_index() : process_index() + 1]
    with unshared():
        own_documents = [generator.generate(batch) for batch in own_batch]

    # A process without a batch has an empty list.
    gathered = [documents for documents in gather_objects(own_documents) if documents]
    generated = {}

    for batch, (documents,) in zip(batches, gathered, strict=False):
        generated[str(batch)] = documents
        if process_index() == 0:
            cache.add(str(batch), documents)

    return generated
