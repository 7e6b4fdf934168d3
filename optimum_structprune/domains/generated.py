"""Calibration text that the model writes itself (Williams et al., arXiv 2410.17170): answers and continuations, or
text of any kind (`ANY`), which begins with a word that is drawn from the vocabulary (LLM-QAT, arXiv 2305.17888,
section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from math import log
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..arch.meta import positions_of, predicts_next
from ..config.domains import ANY, SELF
from ..config.fields import read_yaml
from ..errors import StructPruneError
from ..forward.generation import continued, end_tokens
from ..forward.metrics import evaluating
from ..registry import did_you_mean
from ..system.fingerprint import fingerprint
from ..system.processes import broadcast_object, gather_objects, process_index, unshared
from ..system.stages import stage
from .packing import tokenize_with_prefix
from .templates import Document, chat_text


SEED_PROMPTS = Path(__file__).with_name("seed_prompts.yaml")
# The documents in the first batch, since few may do. Each batch has twice as many, up to the most: many at a time cost
# less each.
BATCH, MOST = 16, 64
# The number of tokens in a document: at most, and at least if it is to be kept. Short ones take few steps.
MAX_TOKENS, MIN_TOKENS = 64, 32
# What a token is that is never drawn, `min_p` says: one that is so much less likely than the likeliest. Unlike `top_p`
# it does not sort the vocabulary for each token.
SAMPLING = {
    "do_sample": True,
    "temperature": 1.0,
    "min_p": 0.02,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
# A document that repeats itself is dropped: of its runs of so many tokens, this share has to differ.
RUN, MIN_DISTINCT = 4, 0.5
# So is one whose perplexity lies above or below the median of its batch by more than this factor.
MAX_RATIO = 4.0
# After so many documents of which none is of use, no more are written.
PATIENCE = 120


def self_documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, seed: int) -> Iterator[str]:
    """Documents that a model writes, without end, the same for a seed; batches are kept on the disk for next time."""
    kinds = read_yaml(SEED_PROMPTS)
    if name not in (*kinds, ANY):
        raise StructPruneError(f"A model does not write {name!r} itself.{did_you_mean(name, [*kinds, ANY])}")
    if not predicts_next(model):
        raise StructPruneError(f"{SELF}{name} takes a causal language model, and {type(model).__name__} is none.")
    chats = bool(tokenizer.chat_template) and name != ANY
    if name == ANY:
        prompts = vocabulary_words(tokenizer)
    else:
        forms = kinds[name]["ask" if chats else "begin"]
        prompts = [form.replace("{topic}", topic) for form in forms for topic in kinds[name]["topics"]]
    Random(seed).shuffle(prompts)
    keeps = not chats or kinds[name].get("keep", False)
    author = _TextGenerator(model, tokenizer, prompts, chats, keeps, seed)
    path = author.cache(name)
    batches = dict(enumerate(broadcast_object(_read(path))))
    idle = 0
    for number in count():
        if number not in batches:
            batches |= _written(author, number, path)
        documents = batches.pop(number)
        idle = 0 if documents else idle + len(_numbers(number))
        if idle >= PATIENCE:
            raise StructPruneError(
                f"{SELF}{name}: of {idle} documents that the model wrote, all are too short, repeat "
                "themselves or are unlikely; use other text for this model."
            )
        yield from documents


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of a vocabulary that a text may begin with: words of two letters or more with a capital, or of a
    script that has none; where there are no such tokens, all that are not empty.
    """
    special = set(tokenizer.all_special_ids)
    tokens = [str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special]
    words = [token for token in tokens if len(token) > 1 and token.isalpha() and not token[0].islower()]
    return sorted(set(words) or set(filter(None, tokens)))


@dataclass(frozen=True)
class _TextGenerator:
    """A model that writes one kind of text behind prompts, used again and again in their order: questions where it
    `chats`, else openings or words. A document holds its prompt where the author `keeps` it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    chats: bool
    keeps: bool
    seed: int

    def cache(self, name: str) -> Path:
        """The file of what this model writes of a kind; it need not exist."""
        settings = [BATCH, MOST, MAX_TOKENS, MIN_TOKENS, SAMPLING, RUN, MIN_DISTINCT, MAX_RATIO]
        reader = [len(self.tokenizer), self.tokenizer.chat_template, end_tokens(self.model, self.tokenizer)]
        key = [fingerprint(self.model), *reader, *settings, self.prompts[:BATCH], self.seed]
        digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return Path(constants.HF_HOME, "structprune", f"{name}-{digest[:24]}.jsonl").expanduser()

    def write(self, number: int) -> list[Document]:
        """The documents of batch `number` that pass the filters."""
        prompts = [self._framed(self.prompts[i % len(self.prompts)]) for i in _numbers(number)]
        with evaluating(self.model), stage("writing"):
            written = zip(prompts, self._continued(prompts, number), strict=True)
        of_use = [(prompt, ids, loss) for prompt, (ids, loss) in written if _varied(ids)]
        middle = median([loss for *_, loss in of_use] or [0.0])
        documents = []
        for prompt, ids, loss in of_use:
            if abs(loss - middle) <= log(MAX_RATIO):
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                documents.append(Document.joined([(prompt if self.keeps else "", False), (text, True)]))
        return documents

    def _framed(self, prompt: str) -> str:
        if not self.chats:
            return prompt
        return chat_text(self.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)

    @torch.no_grad()
    def _continued(self, prompts: Sequence[str], number: int) -> list[tuple[list[int], float]]:
        """What the model writes behind prompts, as token ids up to the end of each text, with its loss per token."""
        if self.chats:  # the template has put the prefix
            rows = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        else:
            rows = [tokenize_with_prefix(prompt, self.tokenizer) for prompt in prompts]
        room, device = self._room(max(map(len, rows))), self.model.device
        bar = tqdm(total=room, desc=f"writing {len(rows)} documents", unit="token")
        with torch.random.fork_rng([device] if device.type == "cuda" else []), bar:
            torch.manual_seed(self.seed * 1_000_003 + number)
            listener = _LogprobRecorder(bar)
            texts = continued(self.model, self.tokenizer, rows, {**SAMPLING, "max_new_tokens": room}, [listener])
        return [(text, listener.loss(row, len(text))) for row, text in enumerate(texts)]

    def _room(self, prompt: int) -> int:
        positions = positions_of(self.model)
        if positions <= prompt:
            raise StructPruneError(f"A prompt of {prompt} tokens leaves no room in the model's {positions} positions.")
        return int(min(MAX_TOKENS, positions - prompt))


class _LogprobRecorder:
    """Hears how likely each token was that the model has written, and shows how far it is. It changes nothing."""

    def __init__(self, bar: Any):
        self.bar = bar
        self.expected: list[Tensor] = []
        self.losses: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.losses += [-self.expected.pop().gather(1, input_ids[:, -1:])] if self.expected else []
        self.expected.append(scores.log_softmax(1))
        self.bar.update()
        return scores

    def loss(self, row: int, tokens: int) -> float:
        """The mean loss per token of so many tokens of a document; what came last is not heard."""
        return float(torch.cat(self.losses, 1)[row, :tokens].mean()) if self.losses else 0.0


def _numbers(batch: int) -> range:
    """The numbers of the documents of a batch, among all that are written."""
    sizes = [min(BATCH << before, MOST) for before in range(batch + 1)]
    return range(sum(sizes[:-1]), sum(sizes))


def _varied(ids: Sequence[int]) -> bool:
    runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
    return len(ids) >= MIN_TOKENS and len(set(runs)) >= MIN_DISTINCT * len(runs)


def _written(author: _TextGenerator, number: int, path: Path) -> dict[int, list[Document]]:
    """A batch, and those after it: each process writes one of them, and the first process keeps all on the disk."""
    with unshared():
        documents = author.write(number + process_index())
    batches = dict(enumerate(gather_objects(documents), number))
    if process_index() == 0:
        _append(path, batches)
    return batches


def _read(path: Path) -> list[list[Document]]:
    """The batches in a cache file, up to the first that is missing or was only written in part."""
    batches: list[list[Document]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            batch = json.loads(line)
            if batch["batch"] == len(batches):
                batches.append([Document.joined(map(tuple, parts)) for parts in batch["documents"]])
        except (ValueError, KeyError, TypeError):
            continue
    return batches


def _append(path: Path, batches: dict[int, list[Document]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for number, documents in batches.items():
                line = json.dumps({"batch": number, "documents": [list(document.parts()) for document in documents]})
                # A run that was killed may have left half a line, so that each batch begins a new one.
                file.write(f"\n{line}\n")
    except OSError as error:
        raise StructPruneError(
            f"Self-written text cannot be kept in {path.parent} ({error}); set HF_HOME to another folder."
        ) from error
