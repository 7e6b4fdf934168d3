"""Spell removed tokens by other tokens, as the model in a `tokenizer.json` does."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cache
from itertools import pairwise
from math import exp, inf
from typing import Any


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNMERGED_RANK = 1 << 62  # the rank of a pair that is not merged
UNSPELLED_SCORE = -inf  # the score of text that no tokens spell
UNKNOWN_PENALTY = 10  # in SentencePiece, the score of an unknown character is the lowest score minus this number


class Segmenter:
    """A model in a `tokenizer.json`, which divides text into tokens.

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
        """Divide a piece into pieces of one character each."""
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
        """Return the byte tokens of a character, or no tokens if the tokenizer has no byte tokens."""
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

    def parts(self, token: int, keep: Container[int] | None) -> tuple[int, ...]:
        """Return the other tokens that spell a token.

        Args:
            token: The id of the token.
            keep: The ids of the tokens that may be used, or None for all tokens.

        Returns:
            The ids of tokens, or no ids if the tokenizer never yields the token.
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

    def parts(self, token: int, keep: Container[int] | None) -> tuple[int, ...]:
        """Return the two tokens of the last merge, or the kept tokens that spell them."""
        pair = self.last(token)
        if keep is None:
            return pair

        parts: list[int] = []
        for part in pair:
            if part in keep:
                parts.append(part)
            else:
                parts += self.parts(part, keep) or [part]

        return tuple(parts)

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Return the tokens of the last merge. A character has none, because it is read before any merge."""
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
                if self.whole_words:
                    return tuple(symbols)
                return ()

            place = ranks.index(rank)
            pair = symbols[place : place + 2]
            symbols[place : place + 2] = [self.merged[rank]]

        if symbols != [token]:
            return ()
        return tuple(pair)


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

    def parts(self, token: int, keep: Container[int] | None) -> tuple[int, ...]:
        """Return the tokens of the best division, or no tokens if it has a higher score than the token itself."""
        score, parts = self._best(token, None)
        if token < len(self.scores) and score > self.scores[token]:
            return ()
        if keep is not None:
            _, parts = self._best(token, keep)
        return parts

    def _best(self, token: int, keep: Container[int] | None) -> tuple[float, tuple[int, ...]]:
        """Return the highest score of a division of a token into other tokens, and these tokens (Viterbi)."""
        piece = self.pieces[token]
        unknown_score = UNSPELLED_SCORE
        if self.bytes:
            unknown_score = self.unknown_score

        # best[n] is the best division of the first n characters of the piece.
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for end in range(1, len(piece) + 1):
            score, parts = best[end - 1]
            divisions = [(score + unknown_score, parts + self.as_bytes(piece[end - 1]))]
            for start in range(max(0, end - self.longest), end):
                part = self.ids.get(piece[start:end])
                if part is None or part == token or (keep is not None and part not in keep):
                    continue
                score, parts = best[start]
                divisions.append((score + self.scores[part], parts + (part,)))
            best.append(max(divisions, key=lambda division: division[0]))

        score, parts = best[-1]
        if score == UNSPELLED_SCORE:
            return UNSPELLED_SCORE, ()
        return score, parts


class WordPieceSegmenter(Segmenter):
    """WordPiece: a word is divided from its start, each time after the longest token."""

    def parts(self, token: int, keep: Container[int] | None) -> tuple[int, ...]:
        """Return the longest tokens from the start of a token, or no tokens if they do not spell it."""
        letters = self.letters(self.pieces[token])

        parts: list[int] = []
        while letters:
            part, length = self._longest(letters, token, keep)
            if part is None:
                return ()
            parts.append(part)
            letters = letters[length:]

        return tuple(parts)

    def _longest(
        self, letters: list[str], token: int, keep: Container[int] | None
    ) -> tuple[int, int] | tuple[None, None]:
        """Return the longest token at the start of letters, other than `token`, and its number of letters."""
        for end in range(len(letters), 0, -1):
            piece = letters[0] + "".join(letter.removeprefix(self.prefix) for letter in letters[1:end])
            part = self.ids.get(piece)
            if part is not None and part != token and (keep is None or part in keep):
                return part, end
        return None, None


KINDS: dict[str, type[Segmenter]] = {"BPE": BPESegmenter, "Unigram": UnigramSegmenter, "WordPiece": WordPieceSegmenter}
