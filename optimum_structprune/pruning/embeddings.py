"""How near the vectors that an encoder makes of texts are to the dense model's, each read with its own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from math import inf
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..arch.hooks import in_fast_dtype
from ..arch.meta import positions_of
from ..arch.modules import blocks
from ..arch.spec import ArchSpec
from ..domains.passages import Passages
from ..forward.metrics import FEWEST, evaluating, margin_of_error
from ..method.layers import input_device, run_model
from ..record.report import Report
from ..vocabulary.languages import texts as language_texts


# Where a sentence ends, in most scripts. A passage has so many bytes at least, and at most so many characters and
# tokens; a domain has at most so many passages.
ENDS = re.compile(r"(?<=[.!?…।؟])\s+|(?<=[。！？])|\n+")
SHORTEST, LONGEST, TOKENS, MOST = 20, 200, 256, 128
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


class Embeddings:
    """The vectors of texts by domain, and of the same text in 30 languages. Those of the dense model are computed at
    once, and it is not kept. In the texts that `pairs` names, the second half are translations of the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Sequence[str] | Tensor],
        tokenizer: PreTrainedTokenizerBase | None,
        languages: bool,
        pairs: Collection[str] = (),
    ):
        self.texts, self.tokenizer, self.pairs = texts, tokenizer, pairs
        by_code = language_texts() if languages and tokenizer is not None else {}
        self.spoken = {code: sentences([text]) for code, text in by_code.items()}
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
        language. The neighbours of a text are those of its own domain or language and of all domains.
        """
        by_domain, both = dict[str, dict[str, dict[str, float]]](), (self._vectors(model), self.dense)
        for name in self.texts:
            others = [torch.cat([of for other, of in by.items() if other != name] or [by[name][:0]]) for by, _ in both]
            by_domain[name] = {before: {}, after: embedding_figures(*(by[name] for by, _ in both), *others)}
            for which, (by, _) in zip((after, before), both, strict=True):
                if name in self.pairs:
                    shares = retrieved(*by[name].chunk(2))
                    figures = {"retrieval": float(shares.mean()), "retrieval_margin": margin_of_error(shares)}
                    by_domain[name][which] |= figures
        every = [torch.cat([*by.values()]) for by, _ in both]
        return by_domain, {code: embedding_figures(*(by[code] for _, by in both), *every) for code in self.spoken}

    def _vectors(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = [rows_of(of, self.tokenizer, model) for of in (*self.texts.values(), *self.spoken.values())]
        vectors = embed(model, [row for of in rows for row in of], self.pooling).split([*map(len, rows)])
        of_texts, of_spoken = vectors[: len(self.texts)], vectors[len(self.texts) :]
        return dict(zip(self.texts, of_texts, strict=True)), dict(zip(self.spoken, of_spoken, strict=True))


def passages_of(samples: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Sequence[str] | Tensor:
    """The sentences in samples of token ids; inputs, and samples without any, as they are."""
    if tokenizer is None or samples.is_floating_point():
        return samples
    return sentences(text for of in Passages([*samples], tokenizer).texts for text in of) or samples


def sentences(texts: Iterable[str]) -> list[str]:
    """The sentences of texts, each once, long ones in parts; evenly chosen ones where there are more than 128."""
    parts = (part for text in texts for sentence in ENDS.split(text) for part in wrap(sentence, LONGEST))
    found = [*dict.fromkeys(part for part in parts if len(part.encode()) >= SHORTEST)]
    return found if len(found) <= MOST else [found[n * len(found) // MOST] for n in range(MOST)]


def rows_of(
    texts: Sequence[str] | Tensor, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> list[Tensor]:
    """Texts as token ids with what a tokenizer puts around them, cut to what the model reads; inputs as they are."""
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
    """The pooled last hidden states of each row of token ids or pixels, shape `(rows, channels)`, fp32, on the CPU; an
    encoder-decoder model reads a row on both sides. A row runs with others of its length, so nothing is padded.
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


def embedding_figures(vectors: Tensor, dense: Tensor, more: Tensor, dense_more: Tensor) -> dict[str, float]:
    """How near the vectors of texts are to the dense model's, each of shape `(texts, channels)`: the cosine (mean, 5th
    percentile, worst), if both have as many channels, and the share of the 10 nearest neighbours that stay, if these
    texts and the texts in `more` are more than twice as many.
    """
    figures: dict[str, float] = {"texts": len(vectors)}
    if vectors.shape == dense.shape:
        cosines = cosine_similarity(vectors.double(), dense.double()).clamp(max=1)
        figures |= {"cosine": float(cosines.mean()), "cosine_margin": error_of(cosines)}
        figures |= {"cosine_p5": float(cosines.quantile(0.05)), "cosine_worst": float(cosines.min())}
    if len(vectors) + len(more) > 2 * NEAREST:
        ours, theirs = nearest(vectors, more), nearest(dense, dense_more)
        kept = (ours[:, :, None] == theirs[:, None]).any(2).double().mean(1)
        figures |= {"neighbours": float(kept.mean()), "neighbours_margin": error_of(kept)}
    return figures


def error_of(values: Tensor) -> float:
    """The margin of error of the mean of figures of texts, shape `(texts,)`: over runs of eight texts, where there are
    enough, as neighbours in a text resemble each other.
    """
    return margin_of_error(values.unfold(0, 8, 8).mean(1) if len(values) >= 8 * FEWEST else values)


def nearest(vectors: Tensor, more: Tensor) -> Tensor:
    """The numbers of the 10 vectors nearest to each, among these and then the more, shape `(texts, 10)`."""
    near = normalize(torch.cat([vectors, more]).double())
    return (near[: len(vectors)] @ near.T).fill_diagonal_(-inf).topk(NEAREST).indices


def retrieved(texts: Tensor, translations: Tensor) -> Tensor:
    """The share of right ones where each of a pair of vectors, shape `(pairs, channels)`, looks for the other among
    all: 0, 0.5 or 1 for each pair, shape `(pairs,)`, fp64.
    """
    cosines, right = normalize(texts) @ normalize(translations).T, torch.arange(len(texts))
    return ((cosines.argmax(1) == right).double() + (cosines.argmax(0) == right).double()) / 2
