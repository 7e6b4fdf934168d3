"""How near the vectors that an encoder makes of texts are to the dense model's, each read with its own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby, islice, zip_longest
from math import inf
from pathlib import Path
from random import Random
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..arch.hooks import in_fast_dtype
from ..arch.meta import positions_of
from ..arch.modules import blocks
from ..arch.spec import ArchSpec
from ..config.domains import written_by_model
from ..domains.manifest import JUDGED, Entry, Manifest
from ..domains.packing import Domain, Passages, document_hash
from ..domains.sources import documents
from ..forward.metrics import MIN_DOCUMENTS, evaluating, margin_of_error
from ..method.layers import input_device, run_model
from ..record.report import Report
from ..vocabulary.languages import texts as language_texts


# Where a sentence ends, in most scripts. A passage has so many bytes at least, and at most so many characters and
# tokens; a domain has at most so many passages.
ENDS = re.compile(r"(?<=[.!?…।؟])\s+|(?<=[。！？])|\n+")
SHORTEST, LONGEST, TOKENS, MOST = 20, 200, 256, 128
SET_ASIDE = 8  # one of so many documents that nothing else reads is judged by
RUN = 8  # sentences of one document that are taken for another one where there are too few documents
NEAREST = 10  # neighbours of a text
AT_ONCE = 32  # texts of equal length that run together at most
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
    """The vectors of texts by domain, and of the same text in 30 languages. Those of the dense model are computed at
    once, and it is not kept. In the texts that `pairs` names, the second half are translations of the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Texts | Sequence[str]],
        tokenizer: PreTrainedTokenizerBase | None,
        languages: bool,
        pairs: Collection[str] = (),
    ):
        self.texts = {name: of if isinstance(of, Texts) else Texts.one_each(of) for name, of in texts.items()}
        self.tokenizer, self.pairs = tokenizer, pairs
        by_code = language_texts() if languages and tokenizer is not None else {}
        self.spoken = {code: Texts.one_each(sentences([text]).texts) for code, text in by_code.items()}
        self.pooling = pooling_of(model)
        self.dense = self._vectors(model)

    def read_by(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Read from now on with another tokenizer."""
        self.tokenizer = tokenizer

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Put the figures of the smaller model into the report."""
        report.embeddings, by_language = self.figures(model, "before", "after")
        report.languages = {code: {**of, **by_language.get(code, {})} for code, of in report.languages.items()}

    def figures(
        self, model: PreTrainedModel, before: str, after: str
    ) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
        """The `embedding_figures` of a smaller model by domain, under the names of both models, and by the code of a
        language. The neighbours of a text are those of all domains, but for its own document.
        """
        (ours, ours_spoken), (theirs, theirs_spoken) = self._vectors(model), self.dense
        by_domain = dict[str, dict[str, dict[str, float]]]()
        for name, texts in self.texts.items():
            more, dense_more = (
                torch.cat([by[name][:0], *(of for other, of in by.items() if other != name)]) for by in (ours, theirs)
            )
            figures = embedding_figures(ours[name], theirs[name], more, dense_more, texts.documents)
            by_domain[name] = {before: {}, after: figures}
            for which, by in ((after, ours), (before, theirs)) if name in self.pairs else ():
                shares = retrieved(*by[name].chunk(2))
                by_domain[name][which]["retrieval"] = float(shares.mean())
                by_domain[name][which]["retrieval_margin"] = margin_of_error(shares)
        return by_domain, {
            code: embedding_figures(ours_spoken[code], dense, dense[:0], dense[:0])
            for code, dense in theirs_spoken.items()
        }

    def _vectors(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = [rows_of(of.texts, self.tokenizer, model) for of in (*self.texts.values(), *self.spoken.values())]
        vectors = embed(model, [row for of in rows for row in of], self.pooling).split([*map(len, rows)])
        of_texts, of_spoken = vectors[: len(self.texts)], vectors[len(self.texts) :]
        return dict(zip(self.texts, of_texts, strict=True)), dict(zip(self.spoken, of_spoken, strict=True))


def judged_texts(
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    earlier: Manifest | None = None,
) -> tuple[dict[str, Texts], list[Entry]]:
    """Gives the sentences of domains that judge a model, and the entries of documents that are held out for that.

    Beside what a domain holds out, these are of more documents, as sentences of few say little of others.
    """
    used = {name for of in domains for name in (*of.documents, *of.heldout_documents, *of.probe_documents)}
    used |= set() if earlier is None else earlier.uses().keys()
    texts, entries = {}, []
    for domain in domains:
        more = dict[str, str]()
        if not (tokenizer is None or domain.origin is None or written_by_model(domain.origin)):
            every = islice(documents(domain.origin, seed, tokenizer), MOST * SET_ASIDE)
            others = {name: text for text in every if (name := document_hash(text)) not in used}
            more = dict(islice(others.items(), 0, None, SET_ASIDE))
            none = domain.heldout[:0]
            aside = Domain(domain.name, 0.0, none, none, origin=domain.origin, heldout_documents=(*more,))
            entries.append(Entry.of(aside, JUDGED))
        texts[domain.name] = passages_of(domain.heldout, tokenizer, more.values())
    return texts, entries


def passages_of(samples: Tensor, tokenizer: PreTrainedTokenizerBase | None, more: Iterable[str] = ()) -> Texts:
    """The sentences in samples of token ids and in more documents; inputs, and samples without any, as they are."""
    if tokenizer is None or samples.is_floating_point():
        return Texts.one_each(samples)
    held_out = (text for of in Passages([*samples], tokenizer).texts for text in of)
    found = sentences([*held_out, *more])
    return found if found.texts else Texts.one_each(samples)


def sentences(documents: Sequence[str]) -> Texts:
    """Gives at most 128 sentences of documents, of each document as many as of others where it has them.

    A sentence is taken once, and a long one in parts.
    """
    seen, shuffled = set[str](), []
    for number, text in enumerate(documents):
        parts = (part for sentence in ENDS.split(text) for part in wrap(sentence, LONGEST))
        new = [*dict.fromkeys(part for part in parts if len(part.encode()) >= SHORTEST and part not in seen)]
        seen |= {*new}
        shuffled.append([(number, part) for part in Random(number).sample(new, len(new))])
    Random(0).shuffle(shuffled)
    one_of_each = chain.from_iterable(zip_longest(*shuffled))
    found = sorted(islice(filter(None, one_of_each), MOST))
    numbers = [number for number, _ in found]
    if len({*numbers}) < MIN_DOCUMENTS:
        numbers = [number // RUN for number in range(len(found))]
    return Texts([part for _, part in found], numbers)


def rows_of(
    texts: Sequence[str] | Tensor, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> list[Tensor]:
    """Gives texts as token ids, with what a tokenizer puts around them, cut to what the model reads."""
    if isinstance(texts, Tensor):
        return [*texts]
    assert tokenizer is not None
    most = int(min(positions_of(model) - 2, TOKENS))  # RoBERTa's first two positions are for padding
    return [torch.tensor(row[:most]) for row in tokenizer([*texts], verbose=False)["input_ids"]]


def pooling_of(model: PreTrainedModel) -> list[str]:
    """How sentence-transformers pools the states of a model, as its folder says; "mean" where it says nothing."""
    name, commit = str(model.name_or_path), getattr(model.config, "_commit_hash", None)
    with suppress(Exception):  # of the network, of the Hub, or of a file that somebody has changed

        def read(file: str) -> Any:
            return json.loads(Path(str(cached_file(name, file, revision=commit))).read_text(encoding="utf-8"))

        path = next(module["path"] for module in read("modules.json") if module["type"].endswith("Pooling"))
        config = read(f"{path}/config.json")
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
            for batch in torch.stack([rows[n] for n in same]).split(AT_ONCE):
                states = last_states(model, batch).float()
                vectors = [POOLING.get(how, lambda of: of.mean(1))(states) for how in pooling]
                parts.append(torch.cat(vectors, 1).cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def last_states(model: Any, ids: Tensor) -> Tensor:
    """The last hidden states of a batch, shape `(batch, tokens, channels)`."""
    if not model.config.is_encoder_decoder:
        return run_model(model.base_model, ids)[0]
    # T5's classes have no base model inside them, and give logits.
    encoder, decoder, ids = model.get_encoder(), model.get_decoder(), ids.to(input_device(model))
    with in_fast_dtype(blocks(model)):
        return decoder(input_ids=ids, encoder_hidden_states=encoder(ids)[0], use_cache=False)[0]


def embedding_figures(
    vectors: Tensor, dense: Tensor, more: Tensor, dense_more: Tensor, documents: Sequence[int] | None = None
) -> dict[str, float]:
    """How near the vectors of texts are to the dense model's, each of shape `(texts, channels)`: the cosine (mean, 5th
    percentile, worst), if both have as many channels, and the share of the 10 nearest neighbours that stay, if these
    texts and the texts in `more` are more than twice as many. Neighbours are of other `documents`.
    """
    figures: dict[str, float] = {"texts": len(vectors)}
    numbers = torch.tensor([*range(len(vectors))] if documents is None else [*documents])
    if vectors.shape == dense.shape:
        cosines = cosine_similarity(vectors.double(), dense.double()).clamp(max=1)
        figures |= {"cosine": float(cosines.mean()), "cosine_margin": margin_of_error(cosines, numbers)}
        figures |= {"cosine_p5": float(cosines.quantile(0.05)), "cosine_worst": float(cosines.min())}
    if len(vectors) + len(more) - int(numbers.bincount().max()) >= 2 * NEAREST:
        near = nearness(vectors, more, numbers), nearness(dense, dense_more, numbers)
        figures |= {"neighbours": kept_share(*near), "neighbours_margin": kept_margin(*near, numbers)}
    return figures


def nearness(vectors: Tensor, more: Tensor, documents: Tensor) -> Tensor:
    """The cosine of each vector to these and then the more, shape `(texts, all)`; no document is near to itself."""
    near = normalize(torch.cat([vectors, more]).double())
    cosines = near[: len(vectors)] @ near.T
    cosines[:, : len(vectors)].masked_fill_(documents[:, None] == documents, -inf)
    return cosines


def kept_share(ours: Tensor, theirs: Tensor) -> float:
    """The share of the 10 nearest that two models have in common, from the cosines of each, `(texts, all)`."""
    first, second = ours.topk(NEAREST).indices, theirs.topk(NEAREST).indices
    return float((first[:, :, None] == second[:, None]).any(2).double().mean())


def kept_margin(ours: Tensor, theirs: Tensor, documents: Tensor) -> float:
    """Gives the margin of error of that share over documents, by leaving out each in turn (jackknife): a text is also
    a neighbour of others, so that their shares are not independent.
    """
    shares = []
    for number in documents.unique():
        row, column = documents != number, (documents == number).nonzero().flatten()
        shares.append(kept_share(*(near[row].index_fill(1, column, -inf) for near in (ours, theirs))))
    return margin_of_error(torch.tensor(shares) * (len(shares) - 1))


def retrieved(texts: Tensor, translations: Tensor) -> Tensor:
    """The share of right ones where each of a pair of vectors, shape `(pairs, channels)`, looks for the other among
    all: 0, 0.5 or 1 for each pair, shape `(pairs,)`, fp64.
    """
    cosines, right = normalize(texts) @ normalize(translations).T, torch.arange(len(texts))
    return ((cosines.argmax(1) == right).double() + (cosines.argmax(0) == right).double()) / 2
