"""Compare the text embeddings of a pruned encoder with the embeddings of the original model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, dropwhile, groupby, islice, zip_longest
from math import inf
from random import Random
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import evaluating, last_states
from ..arch.meta import positions_of
from ..arch.modules import PROMPTS, module_files
from ..config.domains import DomainConfig, written_by_model
from ..domains.languages import texts as language_texts
from ..domains.manifest import JUDGED, Entry, Manifest
from ..domains.packing import Domain, document_hash
from ..domains.sources import documents
from ..record.figures import ORIGINAL, PRUNED, Figure, TextResult
from ..system.margins import MIN_DOCUMENTS, MIN_RELATIVE_MARGIN, margin_of_error
from ..system.modules import MODULES
from ..system.stages import progress
from .gaps import Gaps, fills_gaps
from .text import Text


SENTENCE_BREAKS = re.compile(r"(?<=[.!?…।؟])\s+|(?<=[。！？])|\n+")  # in most scripts
MOST_SENTENCES = 128  # per domain, and the most queries
MIN_SENTENCE = 20  # bytes
PASSAGE_SENTENCES = 4  # more would double the time of a comparison
SENTENCE_LENGTH = 200  # characters; longer sentences are divided
UNUSED_PER_TEXT = 8  # one of 8 unused documents is for evaluation
NUM_NEIGHBOURS = 10  # neighbours of a text
MOST_TOKENS = 256  # per text
# A few sentences lose most of the cosine, and the measured sentences may contain none of them. Twice the usual margin,
# and at least `COSINE_UNSEEN` divided by the number of documents, contain 9 of 10 values measured on other text.
COSINE_SPREAD = 2
COSINE_UNSEEN = 0.002
# Cosines that differ by less are the same up to rounding in fp32.
SAME_COSINE = 1e-6
# The prompts of the queries and of the texts that are searched, by the usual names.
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.int().argmax(1)]


def _last_token(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(states.shape[1], device=mask.device)
    return states[torch.arange(len(states)), (mask * places).argmax(1)]


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[:, :, None], -inf).amax(1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask.to(states))


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask * torch.arange(1.0, states.shape[1] + 1).to(states))


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means of states over the tokens, by weights of shape `(texts, tokens)`."""
    return (weights[:, None] @ states)[:, 0] / weights.sum(1, keepdim=True)


# The pooling functions by the names of sentence-transformers, from states of shape `(texts, tokens, channels)` and the
# mask of the pooled tokens to vectors. Its other names divide the sum over tokens by another number, which changes no
# cosine.
POOLING: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "lasttoken": _last_token,
    "max": _max,
    "weightedmean": _weighted_mean,
}


# The figures of vectors by name, by the name of a text; see `embedding_figures`.
Figures = dict[str, dict[str, float]]


class Texts(NamedTuple):
    """Texts or other inputs whose vectors are compared.

    Attributes:
        texts: The texts.
        documents: The number of the document of each text.
        pairs: Queries with the passages that they should find.
    """

    texts: Sequence[str] | Tensor
    documents: Sequence[int]
    pairs: Sequence[tuple[str, str]] = ()

    @classmethod
    def one_each(cls, texts: Sequence[str] | Tensor) -> Texts:
        """Return texts with a document of its own for each text."""
        return cls(texts, range(len(texts)))

    @classmethod
    def of_pairs(cls, texts: Sequence[str]) -> Texts:
        """Return pairs of texts. The second half has the passages of the queries in the first half."""
        half = len(texts) // 2
        return cls(texts, range(len(texts)), list(zip(texts[:half], texts[half:], strict=True)))


class Pooling(NamedTuple):
    """The settings by which sentence-transformers makes the vector of a text.

    Attributes:
        modes: The names of the ways to pool the hidden states; several vectors are concatenated.
        includes_prompt: Whether the tokens of the prompt are pooled.
        prompt: The prompt before each text.
        query_prompt: The prompt before each query.
        passage_prompt: The prompt before each passage that a query should find.
    """

    modes: Sequence[str] = ("mean",)
    includes_prompt: bool = True
    prompt: str = ""
    query_prompt: str = ""
    passage_prompt: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Pooling:
        """Read the pooling and the prompts from the module files of a model. Default to the mean without a prompt."""
        files = module_files(model.config)
        prompts = _prompts_in(files)
        with suppress(Exception):  # of files that are missing, or that somebody has changed
            # Other modules, such as SPLADE's, do not make one vector of the states.
            modules = json.loads(files[MODULES])
            path = next(module["path"] for module in modules if module["type"].endswith(".Pooling"))
            config = json.loads(files[f"{path}/config.json"])
            return cls(_modes_in(config), config.get("include_prompt", True), *prompts)
        return cls(("mean",), True, *prompts)

    def vectors(self, states: Tensor, mask: Tensor | None = None, prompt_tokens: int = 0) -> Tensor:
        """Return vectors of shape `(texts, channels)` of states of shape `(texts, tokens, channels)`.

        Args:
            states: The hidden states.
            mask: Which tokens are no padding, shape `(texts, tokens)`. By default there is no padding.
            prompt_tokens: The number of tokens of the prompt.
        """
        if mask is None:
            mask = torch.ones(states.shape[:2], device=states.device)
        mask = mask.bool()
        if not self.includes_prompt and prompt_tokens:
            mask = mask & (mask.cumsum(1) > prompt_tokens)
        return torch.cat([POOLING.get(mode, _mean)(states, mask) for mode in self.modes], 1)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the number of tokens of a prompt, with the special tokens before it."""
    if tokenizer is None or not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id))


def _modes_in(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the ways to pool in the config of a pooling module of any version."""
    if "pooling_mode" not in config:
        flags = [key for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on]
        return [re.sub("pooling_mode_|_tokens?$", "", flag) for flag in flags]

    modes = config["pooling_mode"]
    if isinstance(modes, str):
        return [modes]
    return list(modes)


def _prompts_in(files: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the prompts for texts, for queries and for passages.

    The prompt for texts is the default prompt, or else the prompt for passages. The other two are the prompts of their
    names, or else the default prompt.
    """
    prompts: Mapping[str | None, str] = {}
    default = None
    with suppress(Exception):  # of a file that is missing, or that somebody has changed
        config = json.loads(files[PROMPTS])
        prompts = config["prompts"]
        default = config.get("default_prompt_name")

    def first(*names: str | None) -> str:
        return next((str(prompts[name]) for name in names if name in prompts), "")

    return first(default, *DOCUMENT_PROMPTS), first(*QUERY_PROMPTS, default), first(*DOCUMENT_PROMPTS, default)


class Embeddings:
    """Comparison of the vectors of a pruned and the original encoder, by domain and for one text in 30 languages.

    The constructor computes the vectors of the original model and does not keep the model.

    Args:
        model: The original model.
        texts: The texts by domain.
        tokenizer: Its tokenizer; None for inputs that are not text.
        languages: Whether the texts in 30 languages are compared.
        pairs: The domains of pairs, whose second half has the translations or the passages of the first half.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Texts | Sequence[str]],
        tokenizer: PreTrainedTokenizerBase | None,
        languages: bool,
        pairs: Collection[str] = (),
    ):
        self.texts: dict[str, Texts] = {}
        for name, domain_texts in texts.items():
            if not isinstance(domain_texts, Texts):
                domain_texts = Texts.one_each(domain_texts)
            self.texts[name] = domain_texts
        self.tokenizer = tokenizer
        self.pairs = pairs

        self.spoken: dict[str, Texts] = {}
        if languages and tokenizer is not None:
            for code, text in language_texts().items():
                self.spoken[code] = Texts.one_each(sentences([text]).texts)

        # The passages of all domains are candidates of each query. Equal passages are one candidate.
        self.passages: dict[str, int] = {}
        for domain_texts in self.texts.values():
            for _, passage in domain_texts.pairs:
                self.passages.setdefault(passage, len(self.passages))

        self.pooling = Pooling.of(model)
        self.original = self._vectors(model)
        self.original_ranks = self._ranks(model)
        self.gaps = self._gaps(model)
        self.original_losses = self.losses(model)

    def _gaps(self, model: PreTrainedModel) -> dict[str, Gaps]:
        """Return the gaps in the texts of each domain, if the model fills gaps."""
        if self.tokenizer is None or not fills_gaps(model, self.tokenizer):
            return {}

        gaps: dict[str, Gaps] = {}
        for name, (texts, *_) in self.texts.items():
            if isinstance(texts, Tensor):
                continue

            if model.config.is_encoder_decoder and name in self.pairs:
                half = len(texts) // 2
                gaps[name] = Gaps(texts[:half], model, self.tokenizer, texts[half:])
            else:
                gaps[name] = Gaps(texts, model, self.tokenizer)
        return gaps

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Encode the texts with another tokenizer from now on."""
        self.tokenizer = tokenizer

    def figures(self, model: PreTrainedModel) -> tuple[dict[str, TextResult], dict[str, TextResult]]:
        """Compare the vectors of the pruned and the original model, by domain and by language.

        The neighbours of a text are texts of all domains, without the texts of its own document.
        """
        vectors, spoken = self._vectors(model)
        original_vectors, original_spoken = self.original

        ranks = self._ranks(model)
        by_domain = {}
        for name, texts in self.texts.items():
            further = _vectors_of_other_domains(vectors, name)
            original_further = _vectors_of_other_domains(original_vectors, name)
            result = embedding_figures(
                vectors[name], original_vectors[name], further, original_further, texts.documents
            )
            by_domain[name] = result
            if name in ranks:
                result.retrieval = retrieval_figure(ranks[name], self.original_ranks[name])

        by_language = {}
        for code, original in original_spoken.items():
            none = original[:0]
            by_language[code] = embedding_figures(spoken[code], original, none, none)
        return by_domain, by_language

    def losses(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the losses of a model in the gaps of each domain, shape `(texts,)`."""
        if self.tokenizer is None:
            return {}
        return {name: gaps.losses(model, self.tokenizer) for name, gaps in self.gaps.items()}

    def _vectors(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the vectors of a model by domain and by language, shape `(texts, channels)`."""
        # All texts are embedded in one call, which groups rows of the same length.
        groups = [group.texts for group in chain(self.texts.values(), self.spoken.values())]
        vectors = self._embed(model, groups, self.pooling.prompt)
        number = len(self.texts)
        by_domain = dict(zip(self.texts, vectors[:number], strict=True))
        by_language = dict(zip(self.spoken, vectors[number:], strict=True))
        return by_domain, by_language

    def _ranks(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the reciprocal rank of each query's passage among all passages by domain, shape `(queries,)`."""
        pairs = {name: texts.pairs for name, texts in self.texts.items() if len(texts.pairs) >= MIN_DOCUMENTS}
        if not pairs:
            return {}

        (passages,) = self._embed(model, [list(self.passages)], self.pooling.passage_prompt)
        queries_by_domain = [[query for query, _ in domain_pairs] for domain_pairs in pairs.values()]
        queries = self._embed(model, queries_by_domain, self.pooling.query_prompt)

        ranks = {}
        for (name, domain_pairs), vectors in zip(pairs.items(), queries, strict=True):
            own = torch.tensor([self.passages[passage] for _, passage in domain_pairs])
            ranks[name] = reciprocal_ranks(vectors, passages, own)
        return ranks

    def _embed(
        self, model: PreTrainedModel, groups: Sequence[Sequence[str] | Tensor], prompt: str
    ) -> tuple[Tensor, ...]:
        """Return the vectors of groups of texts, each of shape `(texts, channels)`."""
        rows = [rows_of(texts, self.tokenizer, model, prompt) for texts in groups]
        vectors = embed(model, list(chain(*rows)), self.pooling, prompt_tokens(prompt, self.tokenizer))
        return vectors.split([len(rows_of_group) for rows_of_group in rows])


def _vectors_of_other_domains(vectors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the vectors of all domains but one, shape `(texts, channels)`."""
    parts = [vectors[name][:0]]
    parts += [vectors[domain] for domain in vectors if domain != name]
    return torch.cat(parts)


def judged_texts(
    domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase | None, seed: int, earlier: Manifest | None = None
) -> tuple[dict[str, Texts], list[Entry]]:
    """Return the texts of domains for the evaluation of an encoder: sentences, and queries with passages.

    The held-out text of a domain has few documents, so unused documents of its source are read too.

    Args:
        domains: The domains of the run.
        tokenizer: The tokenizer; None for inputs that are not text.
        seed: The seed of the order of documents.
        earlier: The text of the runs that produced the model, which is not used again.

    Returns:
        The texts by domain, and the entries of the manifest for the documents that were read.
    """
    hashes_in_use: set[str] = set()
    if earlier is not None:
        hashes_in_use.update(earlier.uses())
    for domain in domains:
        hashes_in_use.update(domain.documents, domain.heldout_documents, domain.probe_documents)

    texts: dict[str, Texts] = {}
    entries: list[Entry] = []
    for domain in domains:
        unused: dict[str, str] = {}
        if tokenizer is not None and domain.origin is not None and not written_by_model(domain.origin):
            unused = _unused_documents(domain.origin, tokenizer, seed, hashes_in_use)
            empty = domain.heldout[:0]
            record = Domain(domain.name, 0.0, empty, empty, origin=domain.origin, heldout_documents=tuple(unused))
            entries.append(Entry.of(record, JUDGED))
        texts[domain.name] = texts_compared(domain.heldout, tokenizer, unused.values())
    return texts, entries


def _unused_documents(
    origin: DomainConfig, tokenizer: PreTrainedTokenizerBase, seed: int, hashes_in_use: Collection[str]
) -> dict[str, str]:
    """Return every `UNUSED_PER_TEXT`-th document of a source whose hash is not in `hashes_in_use`, by hash."""
    unused: dict[str, str] = {}
    for text in islice(documents(origin, seed, tokenizer), MOST_SENTENCES * UNUSED_PER_TEXT):
        name = document_hash(text)
        if name not in hashes_in_use:
            unused[name] = text
    return dict(islice(unused.items(), 0, None, UNUSED_PER_TEXT))


def texts_compared(samples: Tensor, tokenizer: PreTrainedTokenizerBase | None, documents: Iterable[str] = ()) -> Texts:
    """Return the sentences in samples of token ids and in further documents, and queries with their passages.

    Args:
        samples: Samples of shape `(samples, ...)`. If they are not text, they are returned unchanged.
        tokenizer: The tokenizer of the samples; None for inputs that are not text.
        documents: Further documents.
    """
    if tokenizer is None or samples.is_floating_point():
        return Texts.one_each(samples)

    strings = list(chain.from_iterable(Text.of(samples, tokenizer).strings))
    strings += documents
    texts = sentences(strings)
    if not texts.texts:
        return Texts.one_each(samples)
    return texts._replace(pairs=inverse_cloze(strings))


def inverse_cloze(documents: Iterable[str]) -> list[tuple[str, str]]:
    """Return the first sentence of up to `MOST_SENTENCES` documents, each with the next sentences as its passage.

    It is the inverse cloze task of Lee et al., Latent Retrieval for Weakly Supervised Open Domain Question Answering,
    ACL 2019, section 4.2: the sentence should find the text around it. A document with a single sentence is divided in
    the middle. The order of the documents changes nothing.
    """
    pairs: dict[str, str] = {}
    for text in sorted(set(documents), key=document_hash):
        parts = list(dropwhile(_is_short, _parts(text)))
        if len(parts) == 1:
            parts = wrap(parts[0], len(parts[0]) // 2 + 1)
        if not parts:
            continue

        query, *rest = parts
        rest = [part for part in rest if query not in part]
        passage = " ".join(rest[:PASSAGE_SENTENCES])
        if query not in passage and not _is_short(query) and not _is_short(passage):
            pairs[query] = passage
    return list(islice(pairs.items(), MOST_SENTENCES))


def _parts(text: str) -> Iterator[str]:
    """Yield the sentences of a text. Longer sentences are divided into parts of up to 200 characters."""
    for sentence in SENTENCE_BREAKS.split(text):
        yield from wrap(sentence, SENTENCE_LENGTH)


def _is_short(text: str) -> bool:
    """Return whether a text is too short for a vector that can be compared."""
    return len(text.encode()) < MIN_SENTENCE


def sentences(documents: Sequence[str]) -> Texts:
    """Return up to `MOST_SENTENCES` sentences, balanced across documents and without repetitions.

    A sentence has at least 20 bytes. Longer sentences are divided into parts of up to 200 characters.
    """
    unique: set[str] = set()
    by_document: list[list[tuple[int, str]]] = []
    for number, text in enumerate(documents):
        parts = dict.fromkeys(part for part in _parts(text) if not _is_short(part) and part not in unique)
        unique.update(parts)
        shuffled = Random(number).sample(list(parts), len(parts))
        by_document.append([(number, part) for part in shuffled])

    Random(0).shuffle(by_document)
    chosen = sorted(islice(_round_robin(by_document), MOST_SENTENCES))
    numbers = [number for number, _ in chosen]
    if len(set(numbers)) < MIN_DOCUMENTS:
        # There are too few documents for a margin of error, so each run of 8 sentences counts as a document.
        numbers = [place // 8 for place in range(len(chosen))]
    return Texts([part for _, part in chosen], numbers)


def _round_robin(lists: Sequence[Sequence[tuple[int, str]]]) -> Iterator[tuple[int, str]]:
    """Yield the first items of all lists, then the second items, and so on."""
    for items in zip_longest(*lists):
        for item in items:
            if item is not None:
                yield item


def rows_of(
    texts: Sequence[str] | Tensor, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, prompt: str = ""
) -> list[Tensor]:
    """Return texts as token ids with special tokens, cut to the positions of the model and to `MOST_TOKENS`.

    Args:
        texts: The texts, or inputs that are returned as they are.
        tokenizer: The tokenizer of the model.
        model: The model.
        prompt: The prompt before each text.

    Returns:
        A tensor of shape `(tokens,)` for each text.
    """
    if isinstance(texts, Tensor):
        return list(texts)

    assert tokenizer is not None
    max_tokens = int(min(positions_of(model), MOST_TOKENS))
    encoded = tokenizer([prompt + text for text in texts], verbose=False)
    return [torch.tensor(row[:max_tokens]) for row in encoded["input_ids"]]


@torch.no_grad()
def embed(
    model: PreTrainedModel, rows: Sequence[Tensor], pooling: Pooling | None = None, prompt_tokens: int = 0
) -> Tensor:
    """Return the vectors of inputs.

    Rows of the same length run together, so nothing is padded. An encoder-decoder model gets a row as encoder and
    decoder input.

    Args:
        model: The model.
        rows: Token ids of shape `(tokens,)`, or pixels.
        pooling: The pooling of the hidden states; the mean over tokens by default.
        prompt_tokens: The number of tokens of the prompt in each row.

    Returns:
        A tensor of shape `(rows, channels)` in fp32 on the CPU.
    """
    pooling = pooling or Pooling()
    order = sorted(range(len(rows)), key=lambda number: rows[number].shape)

    batches: list[list[int]] = []
    for _, numbers in groupby(order, lambda number: rows[number].shape):
        group = list(numbers)
        batches += [group[start : start + 32] for start in range(0, len(group), 32)]

    parts: list[Tensor] = []
    with evaluating(model):
        for batch in progress(batches, unit="batch", leave=False, delay=1):
            states = last_states(model, torch.stack([rows[number] for number in batch])).float()
            parts.append(pooling.vectors(states, prompt_tokens=prompt_tokens).cpu())

    sorted_vectors = torch.cat(parts)
    return sorted_vectors[torch.tensor(order).argsort()]


def embedding_figures(
    vectors: Tensor,
    original: Tensor,
    further: Tensor,
    original_further: Tensor,
    documents: Sequence[int] | None = None,
) -> TextResult:
    """Compare the vectors of texts of the pruned and the original model.

    Args:
        vectors: The vectors of the pruned model, shape `(texts, channels)`.
        original: The vectors of the original model, shape `(texts, original channels)`.
        further: The vectors of further texts, which can be neighbours too.
        original_further: The vectors of the same texts by the original model.
        documents: The number of the document of each text. Its neighbours are texts of other documents.

    Returns:
        The number of `texts`. If both models have the same number of channels, the mean `cosine` of their vectors,
        with margin, 5th percentile and minimum. With at least 20 texts of other documents, the share of the 10 nearest
        `neighbours` that both models have in common, with its margin.
    """
    result = TextResult(texts=len(vectors))
    if documents is None:
        documents = range(len(vectors))
    numbers = torch.tensor(list(documents))

    if vectors.shape == original.shape:
        cosines = cosine_similarity(vectors.double(), original.double()).clamp(max=1)
        min_margin = COSINE_UNSEEN / len(numbers.unique())
        margin = max(COSINE_SPREAD * margin_of_error(cosines, numbers), min_margin)
        result.cosine = Figure.of({PRUNED: float(cosines.mean())}, margin)
        result.cosine_p5 = Figure.of({PRUNED: float(cosines.quantile(0.05))})
        result.cosine_worst = Figure.of({PRUNED: float(cosines.min())})

    largest_document = int(numbers.bincount().max())
    if len(vectors) + len(further) - largest_document >= 2 * NUM_NEIGHBOURS:
        cosines = nearness(vectors, further, numbers)
        original_cosines = nearness(original, original_further, numbers)
        share = kept_share(cosines, original_cosines)
        result.neighbours = Figure.of({PRUNED: share}, kept_margin(cosines, original_cosines, numbers))
    return result


def nearness(vectors: Tensor, further: Tensor, documents: Tensor) -> Tensor:
    """Return the cosine of each vector to all vectors, and -inf to the vectors of its own document.

    Args:
        vectors: Vectors of shape `(texts, channels)`.
        further: Vectors of further texts.
        documents: The number of the document of each text, shape `(texts,)`.

    Returns:
        A tensor of shape `(texts, texts + further texts)`.
    """
    all_vectors = normalize(torch.cat([vectors, further]).double())
    cosines = all_vectors[: len(vectors)] @ all_vectors.T
    cosines[:, : len(vectors)].masked_fill_(documents[:, None] == documents, -inf)
    return cosines


def kept_share(cosines: Tensor, original_cosines: Tensor) -> float:
    """Return the share of the 10 nearest texts that two models have in common.

    Args:
        cosines: The cosines of one model, shape `(texts, all texts)`.
        original_cosines: The cosines of the other model, of the same shape.
    """
    nearest = cosines.topk(NUM_NEIGHBOURS).indices
    original_nearest = original_cosines.topk(NUM_NEIGHBOURS).indices
    is_common = (nearest[:, :, None] == original_nearest[:, None]).any(2)
    return float(is_common.double().mean())


def kept_margin(cosines: Tensor, original_cosines: Tensor, documents: Tensor) -> float:
    """Estimate the margin of error of `kept_share` by leaving out each document in turn (jackknife).

    A text is also a neighbour of other texts, so the shares of texts are not independent.
    """
    shares: list[float] = []
    for number in documents.unique():
        rows = documents != number
        columns = (documents == number).nonzero().flatten()
        reduced = cosines[rows].index_fill(1, columns, -inf)
        original_reduced = original_cosines[rows].index_fill(1, columns, -inf)
        shares.append(kept_share(reduced, original_reduced))

    return margin_of_error(torch.tensor(shares) * (len(shares) - 1))


def retrieval_figure(ranks: Tensor, original: Tensor) -> Figure:
    """Return the mean reciprocal ranks of the original and the pruned model, with the margin of their ratio.

    Args:
        ranks: The reciprocal ranks of the pruned model, shape `(queries,)`. Each query has a document of its own.
        original: The reciprocal ranks of the original model, of the same shape.
    """
    ratio = ranks.mean() / original.mean()
    # The error of a ratio of means, to first order.
    margin = margin_of_error((ranks - ratio * original) / original.mean())
    values = {ORIGINAL: float(original.mean()), PRUNED: float(ranks.mean())}
    return Figure.of(values, max(margin, MIN_RELATIVE_MARGIN / len(ranks)))


def reciprocal_ranks(queries: Tensor, passages: Tensor, own: Tensor) -> Tensor:
    """Return 1 / rank of the passage that each query should find, by cosine among all passages.

    Passages with the same cosine, or with one that is not a number, count as nearer.

    Args:
        queries: Vectors of shape `(queries, channels)`.
        passages: Vectors of shape `(passages, channels)`.
        own: The number of the passage of each query, shape `(queries,)`.

    Returns:
        A tensor of shape `(queries,)`, fp64.
    """
    cosines = normalize(queries.double()) @ normalize(passages.double()).T
    is_farther = cosines < cosines.gather(1, own[:, None]) - SAME_COSINE
    # The own passage is no farther than itself.
    return 1 / (len(passages) - is_farther.sum(1)).double()
