"""Calibration text that the model writes itself, for when there is no data set (Williams et al., arXiv 2410.17170).

Text of a certain kind answers a question or goes on from an opening. Text of any kind (`ANY`) begins with a word that
is drawn from the vocabulary, so that it is spread over all that the model has learned (LLM-QAT, arXiv 2305.17888,
section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import ANY, SELF, SelfTextConfig
from ..config.fields import read_yaml
from ..errors import StructPruneError
from ..forward.metrics import evaluating, perplexity
from ..registry import did_you_mean
from ..system.fingerprint import fingerprint
from ..system.processes import alone, of_all, of_first, process_index
from .packing import prefix_token
from .templates import Document


SEED_PROMPTS = Path(__file__).with_name("seed_prompts.yaml")
# After so many batches without a usable document, no more are written.
PATIENCE = 8
# Tokens in the runs that tell whether a document repeats itself.
RUN = 4


def self_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SelfTextConfig, name: str, seed: int
) -> Iterator[str]:
    """Documents that a model writes, without end; each batch is kept on the disk and read from there next time.

    The same model, settings and seed give the same documents, however many are taken at a time.
    """
    kinds = read_yaml(SEED_PROMPTS)
    if name not in (*kinds, ANY):
        raise StructPruneError(f"A model does not write {name!r} itself.{did_you_mean(name, [*kinds, ANY])}")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise StructPruneError(f"{SELF}{name} takes a causal language model, and {type(model).__name__} is none.")
    kind = _Kind(words=vocabulary_words(tokenizer)) if name == ANY else _Kind(**kinds[name])
    author = _Author(model, tokenizer, config, kind, seed)
    path = _cache(author, name)
    batches = dict(enumerate(of_first(_read(path))))
    idle = 0
    for number in count():
        if number not in batches:
            batches |= _written(author, number, path)
        documents = batches.pop(number)
        idle = 0 if documents else idle + 1
        if idle == PATIENCE:
            raise StructPruneError(
                f"{SELF}{name}: of {PATIENCE * config.batch_size} documents that the model wrote, none passes the "
                "filters of self_text; use other text for this model."
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
class _Kind:
    """One kind of text: an entry of `seed_prompts.yaml`, or text that begins with a word.

    Attributes:
        ask: Questions for a model with a chat template, with the field `{topic}`.
        begin: Openings for a model without one, with the field `{topic}`.
        topics: What can stand in place of `{topic}`.
        keep: Whether the question stays in the document.
        words: What the text begins with, in place of questions and openings.
    """

    ask: Sequence[str] = ()
    begin: Sequence[str] = ()
    topics: Sequence[str] = ()
    keep: bool = False
    words: Sequence[str] = ()


@dataclass(frozen=True)
class _Author:
    """A model that writes one kind of text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: SelfTextConfig
    kind: _Kind
    seed: int

    @property
    def chats(self) -> bool:
        """Whether the model answers questions; otherwise it continues openings."""
        return bool(self.tokenizer.chat_template) and not self.kind.words

    def prompts(self, number: int) -> list[str]:
        """The prompts of batch `number`: all words, or all pairs of form and topic, in an order that the seed chooses,
        repeated.
        """
        forms = self.kind.ask if self.chats else self.kind.begin
        pairs = [form.replace("{topic}", topic) for form in forms for topic in self.kind.topics]
        prompts = [*self.kind.words, *pairs]
        Random(self.seed).shuffle(prompts)
        size = self.config.batch_size
        return [prompts[i % len(prompts)] for i in range(number * size, (number + 1) * size)]

    def write(self, number: int) -> list[Document]:
        """The documents of batch `number` that pass the filters."""
        prompts = [self._framed(prompt) for prompt in self.prompts(number)]
        with evaluating(self.model):
            written = self._continued(prompts, number)
            pairs = [(prompt, ids) for prompt, ids in zip(prompts, written, strict=True) if self._varied(ids)]
            perplexities = [self._perplexity(ids) for _, ids in pairs]
        ratio = float(self.config.max_perplexity_ratio)
        middle = median(perplexities) if perplexities else 0.0
        return [
            self._document(*pair)
            for pair, ppl in zip(pairs, perplexities, strict=True)
            if middle / ratio <= ppl <= middle * ratio
        ]

    def _framed(self, prompt: str) -> str:
        if not self.chats:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _encoded(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prefix = prefix_token(self.tokenizer)
        # A chat template puts the prefix itself.
        return ids if self.chats or prefix is None else [prefix, *ids]

    @torch.no_grad()
    def _continued(self, prompts: Sequence[str], number: int) -> list[list[int]]:
        from transformers import GenerationConfig

        rows = [self._encoded(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        padding = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        settings = GenerationConfig(
            do_sample=True,
            temperature=float(self.config.temperature),
            top_p=float(self.config.top_p),
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=self._room(longest),
            pad_token_id=padding,
            eos_token_id=self._ends or None,
            use_cache=True,
        )
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            generate: Any = self.model.generate
            output = generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        return [self._until_end(row) for row in output[:, longest:].tolist()]

    @property
    def _ends(self) -> list[int]:
        given = getattr(self.model.generation_config, "eos_token_id", None)
        ends = given if isinstance(given, list) else [given]
        return [end for end in dict.fromkeys([*ends, self.tokenizer.eos_token_id]) if end is not None]

    def _room(self, prompt: int) -> int:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.config.max_new_tokens if positions is None else min(self.config.max_new_tokens, positions - prompt)
        if room < 1:
            raise StructPruneError(f"A prompt of {prompt} tokens leaves no room in the model's {positions} positions.")
        return room

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [ids.index(end) for end in self._ends if end in ids]
        return ids[: min(ends, default=len(ids))]

    def _varied(self, ids: Sequence[int]) -> bool:
        if len(ids) < max(RUN, self.config.min_tokens):
            return False
        runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        return len(set(runs)) >= float(self.config.min_distinct) * len(runs)

    def _perplexity(self, ids: list[int]) -> float:
        # The prompt is left out: the text has to be likely by itself.
        prefix = prefix_token(self.tokenizer)
        sample: Tensor = torch.tensor([ids if prefix is None else [prefix, *ids]])
        return perplexity(self.model, sample)

    def _document(self, prompt: str, ids: list[int]) -> Document:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        shown = self.kind.keep if self.chats else True
        return Document.joined([(prompt if shown else "", False), (text, True)])


def _written(author: _Author, number: int, path: Path) -> dict[int, list[Document]]:
    """A batch, and those after it: each process writes one of them, and the first process keeps all on the disk."""
    own = number + process_index()
    with alone():
        documents = author.write(own)
    batches = dict(enumerate(of_all(documents), number))
    if process_index() == 0:
        for batch in batches.items():
            _append(path, *batch)
    return batches


def _cache(author: _Author, name: str) -> Path:
    """The file of what this model writes with these settings; it need not exist."""
    settings = {key: value for key, value in author.config.to_dict().items() if key != "cache_dir"}
    prompts = author.prompts(0)
    template = author.tokenizer.chat_template
    key = [fingerprint(author.model), len(author.tokenizer), template, settings, prompts, author.seed]
    digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = Path(author.config.cache_dir or Path(constants.HF_HOME) / "structprune").expanduser()
    return folder / f"{name}-{digest[:24]}.jsonl"


def _read(path: Path) -> list[list[Document]]:
    """The batches in a cache file, up to the first that is missing or was only written in part."""
    batches: list[list[Document]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            batch: Mapping[str, Any] = json.loads(line)
            if batch["batch"] == len(batches):
                batches.append([Document.joined(map(tuple, parts)) for parts in batch["documents"]])
        except (ValueError, KeyError, TypeError):
            continue
    return batches


def _append(path: Path, number: int, documents: Sequence[Document]) -> None:
    line = json.dumps({"batch": number, "documents": [list(document.parts()) for document in documents]})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left half a line, so that each batch begins a new one.
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    except OSError as error:
        raise StructPruneError(
            f"Self-written text cannot be kept in {path.parent} ({error}); set cache_dir."
        ) from error
