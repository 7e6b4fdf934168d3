"""Calibration text that the model writes itself (Williams et al., arXiv 2410.17170): answers and continuations, or
text of any kind (`ANY`), which begins with a word that is drawn from the vocabulary (LLM-QAT, arXiv 2305.17888,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, log
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, positions_of, predicts_next
from ..config.domains import ANY, OTHER, SELF
from ..config.fields import read_yaml
from ..errors import StructPruneError
from ..forward.generation import continuations, end_tokens
from ..forward.metrics import evaluating
from ..registry import did_you_mean
from ..system.fingerprint import KeptText, fingerprint
from ..system.processes import broadcast_object, gather_objects, process_index, unshared
from ..system.stages import progress, stage
from .packing import tokenize_with_prefix
from .templates import chat_text


SEED_PROMPTS = Path(__file__).with_name("seed_prompts.yaml")
# The documents of a batch: 8 take as long as 16, and more at a time cost less each. The last batch has what is
# missing, up to half as many again.
MIN_BATCH, MAX_BATCH = 16, 64
# The number of tokens in a document: at most, and at least if it is to be kept. Short ones take few steps.
MAX_TOKENS, MIN_TOKENS = 64, 32
EXPECTED_SHARE = 0.9  # of `MAX_TOKENS` that a document has, before any is written
# A token is never drawn that is so much less likely than the likeliest. Text to judge models by needs rare words.
MIN_P, OTHER_MIN_P = 0.02, 1e-4
# A document that repeats itself is dropped: of its runs of so many tokens, this share has to differ.
RUN_TOKENS, MIN_DISTINCT_RUNS = 4, 0.5
# So is one whose perplexity lies above or below the median of its batch by more than this factor.
MAX_PERPLEXITY_RATIO = 4.0
MAX_USELESS_DOCUMENTS = 120  # in a row, after which no more are written


def self_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    seed: int,
    tokens: int,
    openings: Sequence[str] | None = None,
) -> Iterator[str]:
    """Yields documents that a model writes, the same for a seed and `tokens` needed, and kept on the disk.

    With the name `OTHER` they go on from openings of all kinds, or from `openings` that are given.
    """
    kinds = read_yaml(SEED_PROMPTS)
    if name not in (*kinds, ANY, OTHER):
        raise StructPruneError(f"A model does not write {name!r} itself.{did_you_mean(name, [*kinds, ANY])}")
    if not predicts_next(model):
        raise StructPruneError(f"{SELF}{name} takes a causal language model, and {type(model).__name__} is none.")
    chats = bool(tokenizer.chat_template) and name in kinds
    if name == ANY:
        prompts = vocabulary_words(tokenizer)
    elif name == OTHER:
        prompts = [*openings] if openings else [text for kind in kinds.values() for text in _prompts(kind, "begin")]
    else:
        prompts = _prompts(kinds[name], "ask" if chats else "begin")
    seed = Random(f"{name} {seed}").getrandbits(32) if name == OTHER else seed  # nothing that is written for others
    Random(seed).shuffle(prompts)
    keeps = not chats or kinds[name].get("keep", False)
    author = _TextGenerator(model, tokenizer, prompts, chats, keeps, seed, OTHER_MIN_P if name == OTHER else MIN_P)
    kept = author.kept(name)
    known = broadcast_object(kept.read())
    written = have = idle = 0  # documents, tokens of those that are kept, documents since the last of them
    while True:
        mean = have / written if have else EXPECTED_SHARE * MAX_TOKENS
        batches = _batches(written, ceil((tokens - have) / mean))
        for index, batch in enumerate(batches):
            if str(batch) not in known:
                known |= _written(author, batches[index:], kept)
            documents = known.pop(str(batch))
            written, have = batch[-1] + 1, have + sum(len(tokenizer(text)["input_ids"]) for text in documents)
            idle = 0 if documents else idle + len(batch)
            if idle >= MAX_USELESS_DOCUMENTS:
                raise StructPruneError(
                    f"{SELF}{name}: of {idle} documents that the model wrote, all are too short, repeat "
                    "themselves or are unlikely; use other text for this model."
                )
            yield from documents


def _prompts(kind: Mapping[str, Any], form: str) -> list[str]:
    return [prompt.replace("{topic}", topic) for prompt in kind[form] for topic in kind["topics"]]


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Gives the words of a vocabulary that may begin a text, or all its tokens for lack of words."""
    special = set(tokenizer.all_special_ids)
    tokens = [str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special]
    words = [token for token in tokens if len(token) > 1 and token.isalpha() and not token[0].islower()]
    return sorted(set(words) or set(filter(None, tokens)))


@dataclass(frozen=True)
class _TextGenerator:
    """A model that writes one kind of text behind prompts, one after the other.

    They are questions where it `chats`, else openings or words. A document begins with its prompt where it `keeps` it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    chats: bool
    keeps: bool
    seed: int
    min_p: float

    def kept(self, name: str) -> KeptText:
        """Gives the file of what this model writes of a kind."""
        settings = [MAX_TOKENS, MIN_TOKENS, self.min_p, RUN_TOKENS, MIN_DISTINCT_RUNS, MAX_PERPLEXITY_RATIO]
        reader = [len(self.tokenizer), self.tokenizer.chat_template, end_tokens(self.model, self.tokenizer)]
        return KeptText(name, fingerprint(self.model), *settings, *reader, self.prompts[:MAX_BATCH], self.seed)

    def write(self, batch: range) -> list[str]:
        """Writes the documents of these numbers, and gives those that pass the filters."""
        prompts = [self.prompts[i % len(self.prompts)] for i in batch]
        if self.chats:
            asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
            prompts = [chat_text(self.tokenizer, messages, add_generation_prompt=True) for messages in asked]
        with evaluating(self.model), stage("writing"):
            written = zip(prompts, self._continued(prompts, batch[0]), strict=True)
        of_use = [(prompt, ids, loss) for prompt, (ids, loss) in written if _varied(ids)]
        middle = median([loss for *_, loss in of_use] or [0.0])
        usual = [(prompt, ids) for prompt, ids, loss in of_use if abs(loss - middle) <= log(MAX_PERPLEXITY_RATIO)]
        texts = self.tokenizer.batch_decode([ids for _, ids in usual], skip_special_tokens=True)
        return [prompt * self.keeps + text for (prompt, _), text in zip(usual, texts, strict=True)]

    @torch.no_grad()
    def _continued(self, prompts: Sequence[str], number: int) -> list[tuple[list[int], float]]:
        """Gives the texts written behind prompts, as token ids up to the end of each, with the loss per token."""
        if self.chats:  # the template has put the prefix
            rows = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        else:
            rows = [tokenize_with_prefix(prompt, self.tokenizer) for prompt in prompts]
        longest, device = max(map(len, rows)), self.model.device
        check_positions(self.model, 1, "Self-written text", longest)
        room = int(min(MAX_TOKENS, positions_of(self.model) - longest))
        bar = progress(range(room), desc=f"writing {len(rows)} documents", unit="token")
        losses: list[Tensor] = []  # of the tokens in nats, shape `(rows, 1)` each

        def draw(_: Tensor, scores: Tensor) -> Tensor:
            token = drawn(scores, self.min_p)
            losses.append(scores.logsumexp(1, keepdim=True) - scores.gather(1, token))
            next(bar, None)
            return torch.full_like(scores, -inf).scatter(1, token, 0.0)  # which greedy search then takes

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            settings = {"max_new_tokens": room, "use_cache": True}
            texts = continuations(self.model, self.tokenizer, rows, settings, [draw])
        of_row = torch.cat(losses, 1)
        return [(text, float(of_row[row, : len(text)].mean())) for row, text in enumerate(texts)]


def drawn(scores: Tensor, min_p: float = MIN_P) -> Tensor:
    """Draws a token for each row of logits, shape `(rows, 1)`, among those that `min_p` leaves.

    It is the one on whose part of the cumulative sum a uniform number falls, which costs less than `multinomial`.
    """
    highest = scores.max(1, keepdim=True).values
    row, token = (~(scores < highest + log(min_p))).nonzero(as_tuple=True)  # what is NaN is left to later checks
    sums = (scores[row, token] - highest[row, 0]).exp().double().cumsum(0)
    last = row.bincount(minlength=len(scores)).cumsum(0) - 1
    ends = sums[last]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    at = torch.lerp(starts, ends, torch.rand_like(ends))
    return token[torch.searchsorted(sums, at, right=True).minimum(last)].unsqueeze(1)


def _batches(first: int, count: int) -> list[range]:
    """Divides `count` documents, numbered from `first` on, into batches."""
    ends = [first]
    while count > 0 or len(ends) == 1:
        size = MAX_BATCH if count > 1.5 * MAX_BATCH else max(count, MIN_BATCH)
        ends.append(ends[-1] + size)
        count -= size
    return [range(*pair) for pair in pairwise(ends)]


def _varied(ids: Sequence[int]) -> bool:
    runs = [tuple(ids[i : i + RUN_TOKENS]) for i in range(len(ids) - RUN_TOKENS + 1)]
    return len(ids) >= MIN_TOKENS and len(set(runs)) >= MIN_DISTINCT_RUNS * len(runs)


def _written(author: _TextGenerator, batches: Sequence[range], kept: KeptText) -> dict[str, list[str]]:
    """Lets each process write one of the first batches, and keeps them on the disk."""
    own = batches[process_index() : process_index() + 1]
    with unshared():
        texts = [author.write(batch) for batch in own]
    by_process = zip(batches, filter(None, gather_objects(texts)), strict=False)
    written = {str(batch): documents for batch, (documents,) in by_process}
    for batch, documents in written.items() if process_index() == 0 else ():
        kept.add(batch, documents)
    return written
