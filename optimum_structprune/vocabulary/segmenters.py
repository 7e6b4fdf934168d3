"""The models of `tokenizer.json`, as far as they say which tokens spell a removed token."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cache
from itertools import pairwise
from math import exp, inf
from typing import Any


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNMERGED_RANK = 1 << 62  # the rank of a pair that is not merged
UNSPELLED_SCORE = -inf  # the score of text that no tokens spell
UNKNOWN_PENALTY = 10  # the score of an unknown character lies below the lowest score by this much in SentencePiece


class Segmenter:
    """Spells a piece of text as a model of `tokenizer.json` does.

    Args:
        model: The model in `tokenizer.json`.
        ids: The id of each piece.
    """

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        self.ids = ids
        self.pieces = {number: piece for piece, number in ids.items()}
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""
        self.bytes: dict[int, int] = {}
        if model.get("byte_fallback") and all(byte in ids for byte in BYTES):
            self.bytes = {ids[byte]: number for number, byte in enumerate(BYTES)}
        self.by_byte = list(self.bytes)
        self.lowest: int | None = None

    def letters(self, piece: str) -> list[str]:
        """Return the pieces of one character each of which a piece consists."""
        if not self.prefix and not self.suffix:
            return list(piece)

        body = piece.removeprefix(self.prefix).removesuffix(self.suffix)
        letters = [self.prefix + char for char in body]
        if letters and not piece.startswith(self.prefix):
            letters[0] = body[0]
        if letters and piece.endswith(self.suffix):
            letters[-1] += self.suffix
        return letters

    def as_bytes(self, letter: str) -> tuple[int, ...]:
        """Return the byte tokens of a character; none if the tokenizer has no byte tokens."""
        if not self.bytes:
            return ()
        return tuple(self.by_byte[byte] for byte in letter.encode("utf-8", "replace"))

    def prior(self, token: int) -> float:
        """Estimate the relative frequency of a token by its id: frequent tokens have low ids."""
        return 1 / (token + 1000)  # the first thousand tokens are about as frequent

    def is_irreplaceable(self, token: int) -> bool:
        """Return whether no other tokens spell a token, or a letter in it."""
        if self.bytes:
            return token in self.bytes
        letters = self.letters(self.pieces[token])
        return len(letters) == 1 or any(letter not in self.ids for letter in letters)

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        """Return the tokens that spell a token without itself.

        Args:
            token: The id of the token.
            kept: The ids of the tokens that may be used; None for all.

        Returns:
            Ids of tokens; none if the tokenizer never yields the token.
        """
        raise NotImplementedError

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Return the tokens without which a token cannot be formed."""
        return ()


class BPESegmenter(Segmenter):
    """BPE: a token is formed from its characters or bytes by merges, in the order of the list of merges."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        super().__init__(model, ids)
        self.whole_words = bool(model.get("ignore_merges"))
        self.ranks: dict[tuple[int, int], int] = {}
        self.merged: list[int] = []
        for rank, (first, second) in enumerate(model["merges"]):
            self.ranks[ids[first], ids[second]] = rank
            self.merged.append(ids[first + second[len(self.prefix) :]])
        self.last = cache(self._last)

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        """Return the two tokens of the last merge, or the kept tokens that spell them."""
        last = self.last(token)
        if kept is None:
            return last

        parts: list[int] = []
        for part in last:
            if part in kept:
                parts.append(part)
            else:
                parts += self.parts(part, kept) or [part]
        return tuple(parts)

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Return the tokens of the last merge; a character has none, because it is read before any merge."""
        is_character = len(self.letters(self.pieces.get(token, ""))) <= 1
        if is_character:
            return ()
        return self.parts(token, None)

    def _last(self, token: int) -> tuple[int, ...]:
        """Return the two tokens whose merge forms a token, or the bytes of a character."""
        letters = self.letters(self.pieces[token])
        if len(letters) == 1:
            return self.as_bytes(letters[0])

        symbols: list[int] = []
        for letter in letters:
            if letter in self.ids:
                symbols.append(self.ids[letter])
            else:
                symbols += self.as_bytes(letter)

        pair: list[int] = []
        while len(symbols) > 1:
            ranks = [self.ranks.get(neighbours, UNMERGED_RANK) for neighbours in pairwise(symbols)]
            rank = min(ranks)
            if rank == UNMERGED_RANK:
                return tuple(symbols) if self.whole_words else ()
            place = ranks.index(rank)
            pair = symbols[place : place + 2]
            symbols[place : place + 2] = [self.merged[rank]]
        return tuple(pair) if symbols == [token] else ()


class UnigramSegmenter(Segmenter):
    """Unigram: text is divided into the tokens with the highest sum of scores."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        super().__init__(model, ids)
        self.scores = [score for _, score in model["vocab"]]
        self.longest = max(map(len, ids))
        # The score of unknown text follows from the lowest score, so that token must be kept.
        self.lowest = min(range(len(self.scores)), key=self.scores.__getitem__)
        self.unknown_score = self.scores[self.lowest] - UNKNOWN_PENALTY

    def prior(self, token: int) -> float:
        """Return the probability of a token, whose logarithm is its score."""
        return exp(self.scores[token])

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        """Return the tokens of the best division; none if other tokens have a higher score than the token."""
        score, parts = self._best(token, None)
        if token < len(self.scores) and score > self.scores[token]:
            return ()
        if kept is not None:
            _, parts = self._best(token, kept)
        return parts

    def _best(self, token: int, kept: Container[int] | None) -> tuple[float, tuple[int, ...]]:
        """Return the highest score of a division of a token into other tokens, and these tokens."""
        piece = self.pieces[token]
        unknown_score = self.unknown_score if self.bytes else UNSPELLED_SCORE
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of each beginning of the piece
        for end in range(1, len(piece) + 1):
            score, parts = best[end - 1]
            divisions = [(score + unknown_score, parts + self.as_bytes(piece[end - 1]))]
            for start in range(max(0, end - self.longest), end):
                part = self.ids.get(piece[start:end])
                if part is None or part == token or (kept is not None and part not in kept):
                    continue
                score, parts = best[start]
                divisions.append((score + self.scores[part], (*parts, part)))
            best.append(max(divisions, key=lambda division: division[0]))

        score, parts = best[-1]
        if score == UNSPELLED_SCORE:
            return UNSPELLED_SCORE, ()
        return score, parts


class WordPieceSegmenter(Segmenter):
    """WordPiece: a word is divided from its start, each time after the longest token."""

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        """Return the longest tokens from the start of a token; none if they do not spell it."""
        letters = self.letters(self.pieces[token])
        parts: list[int] = []
        while letters:
            part, length = self._longest(letters, token, kept)
            if part is None:
                return ()
            parts.append(part)
            letters = letters[length:]
        return tuple(parts)

    def _longest(
        self, letters: list[str], token: int, kept: Container[int] | None
    ) -> tuple[int, int] | tuple[None, None]:
        """Return the longest token at the start of letters, other than `token`, and its number of letters."""
        for end in range(len(letters), 0, -1):
            piece = letters[0] + "".join(letter.removeprefix(self.prefix) for letter in letters[1:end])
            part = self.ids.get(piece)
            if part is not None and part != token and (kept is None or part in kept):
                return part, end
        return None, None


KINDS: dict[str, type[Segmenter]] = {"BPE": BPESegmenter, "Unigram": UnigramSegmenter, "WordPiece": WordPieceSegmenter}
