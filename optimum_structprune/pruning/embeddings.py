"""Compares the vectors that an encoder makes of texts with the dense model's, each read with its own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby, islice, zip_longest
from math import inf
from random import Random
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import last_states
from ..arch.meta import positions_of
from ..arch.modules import MODULES, module_files
from ..arch.spec import ArchSpec
from ..config.domains import written_by_model
from ..domains.manifest import JUDGED, Entry, Manifest
from ..domains.packing import Domain, Passages, document_hash
from ..domains.sources import documents
from ..forward.gaps import Gaps, fills_gaps
from ..forward.metrics import MIN_DOCUMENTS, evaluating, margin_of_error, margin_of_share, perplexity_figures
from ..record.report import Report, enter_figures
from ..vocabulary.languages import texts as language_texts


SENTENCE_ENDS = re.compile(r"(?<=[.!?…।؟])\s+|(?<=[。！？])|\n+")  # in most scripts
MOST_SENTENCES = 128  # of a domain
SET_ASIDE = 8  # one of so many documents that nothing else reads is judged by
NUM_NEIGHBOURS = 10  # neighbours of a text
# Few sentences lose most of the cosine, and those that were read may be none of them: so many times the usual margin,
# and at least so much over the documents, hold nine in ten of what was measured on other text.
COSINE_SPREAD, COSINE_UNSEEN = 2, 0.002
# How states of shape `(texts, tokens, channels)` become vectors, by the names of sentence-transformers. All others
# divide the sum over tokens by a number, which changes no cosine.
POOLING: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda states: states[:, 0],
    "lasttoken": lambda states: states[:, -1],
    "max": lambda states: states.amax(1),
    "weightedmean": lambda states: torch.arange(1.0, states.shape[1] + 1).to(states) @ states,
}


class Texts(NamedTuple):
    """Texts, or inputs in their place, and the number of the document that each is from."""

    texts: Sequence[str] | Tensor
    documents: Sequence[int]

    @classmethod
    def one_each(cls, texts: Sequence[str] | Tensor) -> Texts:
        """Takes each text for a document."""
        return cls(texts, range(len(texts)))


class Embeddings:
    """Compares vectors of texts by domain, and of the same text in 30 languages.

    Those of the dense model are computed at once, and it is not kept. In the texts that `pairs` names, the second half
    are translations of the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Texts | Sequence[str]],
        tokenizer: PreTrainedTokenizerBase | None,
        languages: bool,
        pairs: Collection[str] = (),
    ):
        self.texts = {name: each if isinstance(each, Texts) else Texts.one_each(each) for name, each in texts.items()}
        self.tokenizer, self.pairs = tokenizer, pairs
        by_code = language_texts() if languages and tokenizer is not None else {}
        self.spoken = {code: Texts.one_each(sentences([text]).texts) for code, text in by_code.items()}
        self.pooling = pooling_of(model)
        self.dense = self._vectors(model)
        self.gaps: dict[str, Gaps] = {}
        if tokenizer is not None and fills_gaps(model, tokenizer):
            for name, texts_of in self.texts.items():
                if isinstance(texts_of.texts, Tensor):
                    continue
                both, half = texts_of.texts, len(texts_of.texts) // 2
                translated = model.config.is_encoder_decoder and name in pairs
                parts = (both[:half], both[half:]) if translated else (both, None)
                self.gaps[name] = Gaps(parts[0], model, tokenizer, parts[1])
        self.dense_losses = self._losses(model)

    def read_by(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Read from now on with another tokenizer."""
        self.tokenizer = tokenizer

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Put the figures of the smaller model into the report."""
        self.enter(report, model, "before", "after")

    def enter(self, record: Any, model: PreTrainedModel, before: str, after: str) -> None:
        """Put the figures of the smaller model into a record of both; perplexity only where a head predicts tokens."""
        record.embeddings, by_language = self.figures(model, before, after)
        for name, losses in self._losses(model).items():
            both, tokens = {before: self.dense_losses[name], after: losses}, int(self.gaps[name].tokens.sum())
            documents = torch.tensor([*self.texts[name].documents])[: len(losses)]
            enter_figures(record, name, perplexity_figures(both, tokens, documents))
        record.languages = {code: {**old, **by_language.get(code, {})} for code, old in record.languages.items()}

    def figures(
        self, model: PreTrainedModel, before: str, after: str
    ) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
        """Gives `embedding_figures` of a smaller model by domain, under the names of both models, and by language.

        The neighbours of a text are those of all domains, but for its own document.
        """
        (ours, ours_spoken), (theirs, theirs_spoken) = self._vectors(model), self.dense
        by_domain = dict[str, dict[str, dict[str, float]]]()
        for name, texts in self.texts.items():
            others = [other for other in self.texts if other != name]
            more, dense_more = (torch.cat([by[name][:0], *map(by.__getitem__, others)]) for by in (ours, theirs))
            figures = embedding_figures(ours[name], theirs[name], more, dense_more, texts.documents)
            by_domain[name] = {before: {}, after: figures}
            for which, by in ((after, ours), (before, theirs)) if name in self.pairs else ():
                shares = retrieved(*by[name].chunk(2))
                found = {"retrieval": float(shares.mean()), "retrieval_margin": margin_of_share(shares)}
                by_domain[name][which] |= found
        return by_domain, {
            code: embedding_figures(ours_spoken[code], dense, dense[:0], dense[:0])
            for code, dense in theirs_spoken.items()
        }

    def _losses(self, model: PreTrainedModel) -> dict[str, Tensor]:
        assert self.tokenizer is not None or not self.gaps
        return {name: gaps.losses(model, self.tokenizer) for name, gaps in self.gaps.items() if self.tokenizer}

    def _vectors(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = [rows_of(each.texts, self.tokenizer, model) for each in (*self.texts.values(), *self.spoken.values())]
        vectors = iter(embed(model, [*chain.from_iterable(rows)], self.pooling).split([*map(len, rows)]))
        return dict(zip(self.texts, vectors, strict=False)), dict(zip(self.spoken, vectors, strict=True))


def judged_texts(
    domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase | None, seed: int, earlier: Manifest | None = None
) -> tuple[dict[str, Texts], list[Entry]]:
    """Gives the sentences of domains to judge a model by, and the entries of the documents held out for them.

    Beside what a domain holds out, these are of more documents, as sentences of few say little of others.
    """
    used = {name for one in domains for name in (*one.documents, *one.heldout_documents, *one.probe_documents)}
    used |= set() if earlier is None else earlier.uses().keys()
    texts, entries = {}, []
    for domain in domains:
        more = dict[str, str]()
        if not (tokenizer is None or domain.origin is None or written_by_model(domain.origin)):
            every = islice(documents(domain.origin, seed, tokenizer), MOST_SENTENCES * SET_ASIDE)
            others = {name: text for text in every if (name := document_hash(text)) not in used}
            more = dict(islice(others.items(), 0, None, SET_ASIDE))
            none = domain.heldout[:0]
            aside = Domain(domain.name, 0.0, none, none, origin=domain.origin, heldout_documents=(*more,))
            entries.append(Entry.of(aside, JUDGED))
        texts[domain.name] = passages_of(domain.heldout, tokenizer, more.values())
    return texts, entries


def passages_of(samples: Tensor, tokenizer: PreTrainedTokenizerBase | None, more: Iterable[str] = ()) -> Texts:
    """Finds the sentences in samples of token ids and in more documents; inputs without any stay as they are."""
    if tokenizer is None or samples.is_floating_point():
        return Texts.one_each(samples)
    found = sentences([*chain.from_iterable(Passages([*samples], tokenizer).texts), *more])
    return found if found.texts else Texts.one_each(samples)


def sentences(documents: Sequence[str]) -> Texts:
    """Gives at most `MOST_SENTENCES` of documents, of each document as many as of others where it has them.

    A sentence is taken once, if it has 20 bytes, and a long one in parts of up to 200 characters.
    """
    seen, shuffled = set[str](), []
    for number, text in enumerate(documents):
        parts = (part for sentence in SENTENCE_ENDS.split(text) for part in wrap(sentence, 200))
        new = [*dict.fromkeys(part for part in parts if len(part.encode()) >= 20 and part not in seen)]
        seen |= {*new}
        shuffled.append([(number, part) for part in Random(number).sample(new, len(new))])
    Random(0).shuffle(shuffled)
    found = sorted(islice(filter(None, chain.from_iterable(zip_longest(*shuffled))), MOST_SENTENCES))
    numbers = [number for number, _ in found]
    if len({*numbers}) < MIN_DOCUMENTS:  # too few for a margin of error, so each run of sentences is taken for one
        numbers = [number // 8 for number in range(len(found))]
    return Texts([part for _, part in found], numbers)


def rows_of(
    texts: Sequence[str] | Tensor, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> list[Tensor]:
    """Gives texts as token ids with the special tokens around them, cut to the positions of the model and to 256."""
    if isinstance(texts, Tensor):
        return [*texts]
    assert tokenizer is not None
    most = int(min(positions_of(model), 256))
    return [torch.tensor(row[:most]) for row in tokenizer([*texts], verbose=False)["input_ids"]]


def pooling_of(model: PreTrainedModel) -> list[str]:
    """Reads how sentence-transformers pools the states of a model; "mean" where its folder does not say."""
    files = module_files(model.config)
    with suppress(Exception):  # of files that are not there, or that somebody has changed
        # Others, such as SPLADE's, pool no states into one.
        path = next(module["path"] for module in json.loads(files[MODULES]) if module["type"].endswith(".Pooling"))
        config = json.loads(files[f"{path}/config.json"])
        older = [key for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on]
        found = config.get("pooling_mode", [re.sub("pooling_mode_|_tokens?$", "", key) for key in older])
        return [found] if isinstance(found, str) else [*found]
    return ["mean"]


@torch.no_grad()
def embed(model: PreTrainedModel, rows: Sequence[Tensor], pooling: Sequence[str] = ("mean",)) -> Tensor:
    """Gives the pooled last hidden states of rows of token ids or pixels, shape `(rows, channels)`, fp32, on the CPU.

    An encoder-decoder model reads a row on both sides. A row runs with others of its length, so nothing is padded.
    """
    order, parts = sorted(range(len(rows)), key=lambda n: rows[n].shape), []
    with evaluating(model):
        for _, same in groupby(order, lambda n: rows[n].shape):
            for batch in torch.stack([rows[n] for n in same]).split(32):
                states = last_states(model, batch).float()
                vectors = [POOLING.get(name, lambda states: states.mean(1))(states) for name in pooling]
                parts.append(torch.cat(vectors, 1).cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def embedding_figures(
    vectors: Tensor, dense: Tensor, more: Tensor, dense_more: Tensor, documents: Sequence[int] | None = None
) -> dict[str, float]:
    """Compares the vectors of texts with the dense model's, each of shape `(texts, channels)`.

    The cosine (mean, 5th percentile, worst) is given if both have as many channels. The share of the 10 nearest
    neighbours that stay is given if these texts and those in `more` are twice as many. They are of other `documents`.
    """
    figures: dict[str, float] = {"texts": len(vectors)}
    numbers = torch.tensor([*range(len(vectors))] if documents is None else [*documents])
    if vectors.shape == dense.shape:
        cosines = cosine_similarity(vectors.double(), dense.double()).clamp(max=1)
        margin = max(COSINE_SPREAD * margin_of_error(cosines, numbers), COSINE_UNSEEN / len(numbers.unique()))
        figures |= {"cosine": float(cosines.mean()), "cosine_margin": margin}
        figures |= {"cosine_p5": float(cosines.quantile(0.05)), "cosine_worst": float(cosines.min())}
    if len(vectors) + len(more) - int(numbers.bincount().max()) >= 2 * NUM_NEIGHBOURS:
        near = nearness(vectors, more, numbers), nearness(dense, dense_more, numbers)
        figures |= {"neighbours": kept_share(*near), "neighbours_margin": kept_margin(*near, numbers)}
    return figures


def nearness(vectors: Tensor, more: Tensor, documents: Tensor) -> Tensor:
    """Gives the cosine of each vector to these and `more`, shape `(texts, all)`, -inf in its own document."""
    near = normalize(torch.cat([vectors, more]).double())
    cosines = near[: len(vectors)] @ near.T
    cosines[:, : len(vectors)].masked_fill_(documents[:, None] == documents, -inf)
    return cosines


def kept_share(ours: Tensor, theirs: Tensor) -> float:
    """Gives the share of the 10 nearest that two models have in common, from the cosines of each, `(texts, all)`."""
    first, second = ours.topk(NUM_NEIGHBOURS).indices, theirs.topk(NUM_NEIGHBOURS).indices
    return float((first[:, :, None] == second[:, None]).any(2).double().mean())


def kept_margin(ours: Tensor, theirs: Tensor, documents: Tensor) -> float:
    """Estimates the margin of error of that share by leaving out each document in turn (jackknife).

    A text is also a neighbour of others, so their shares are not independent.
    """
    shares = []
    for number in documents.unique():
        row, column = documents != number, (documents == number).nonzero().flatten()
        shares.append(kept_share(*(near[row].index_fill(1, column, -inf) for near in (ours, theirs))))
    return margin_of_error(torch.tensor(shares) * (len(shares) - 1))


def retrieved(texts: Tensor, translations: Tensor) -> Tensor:
    """Scores how each of a pair of vectors, shape `(pairs, channels)`, finds the other: 0, 0.5 or 1, `(pairs,)`."""
    cosines, right = normalize(texts) @ normalize(translations).T, torch.arange(len(texts))
    return ((cosines.argmax(1) == right).double() + (cosines.argmax(0) == right).double()) / 2
