"""The tokens of a fast tokenizer, how others spell each, and the tokenizer without some of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import chain, pairwise, product
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..domains.templates import DATES, chat_text
from ..errors import StructPruneError


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # what SentencePiece writes for a space
UNMERGED_RANK = 1 << 62  # the rank of a pair that is not merged
UNSPELLED_SCORE = -float("inf")  # the score of text that no tokens spell
# What a chat template may be asked to write: conversations of these roles, with and without a tool.
ROLES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
NUMBER = {"type": "object", "properties": {"a": {"type": "number", "description": "A."}}, "required": ["a"]}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBER}}]


class Segmenter:
    """Spells a piece of text as a model of `tokenizer.json` does, and knows the id of every piece."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        self.ids, self.pieces = ids, {number: piece for piece, number in ids.items()}
        self.prefix, self.suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        fallback = model.get("byte_fallback") and all(byte in ids for byte in BYTES)
        self.bytes = {ids[byte]: number for number, byte in enumerate(BYTES)} if fallback else {}
        self.by_byte = list(self.bytes)
        self.lowest: int | None = None

    def letters(self, piece: str) -> list[str]:
        """Gives the pieces of one character each that a piece consists of."""
        if not (self.prefix or self.suffix):
            return list(piece)
        body = piece.removeprefix(self.prefix).removesuffix(self.suffix)
        first = self.prefix if piece.startswith(self.prefix) else ""
        last = self.suffix if piece.endswith(self.suffix) else ""
        return [(self.prefix if at else first) + char + last * (at == len(body) - 1) for at, char in enumerate(body)]

    def as_bytes(self, letter: str) -> tuple[int, ...]:
        """Gives the byte tokens of a character, where the tokenizer has them."""
        return tuple(self.by_byte[byte] for byte in letter.encode("utf-8", "replace")) if self.bytes else ()

    def prior(self, token: int) -> float:
        """Estimates the relative frequency of a token by its number: frequent tokens were made first."""
        return 1 / (token + 1000)  # the first thousand occur alike

    def is_irreplaceable(self, token: int) -> bool:
        """Is true if a token, or a letter in it, can be spelled by nothing else."""
        if self.bytes:
            return token in self.bytes
        letters = self.letters(self.pieces[token])
        return len(letters) == 1 or any(letter not in self.ids for letter in letters)

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        """Gives the tokens that spell a token without itself, none if the tokenizer never yields it."""
        raise NotImplementedError

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Gives the tokens without which a token cannot be formed."""
        return ()


class BPESegmenter(Segmenter):
    """BPE: a token is formed from its characters or bytes by merges, the first of the list first."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        super().__init__(model, ids)
        self.whole_words = bool(model.get("ignore_merges"))
        cut = len(self.prefix)
        self.ranks = {(ids[a], ids[b]): rank for rank, (a, b) in enumerate(model["merges"])}
        self.merged = [ids[a + b[cut:]] for a, b in model["merges"]]
        self.last = cache(self._last)

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        # The two tokens of the last merge, or those of `kept` that spell them.
        last = self.last(token)
        if kept is None:
            return last
        return tuple(end for part in last for end in ([part] if part in kept else self.parts(part, kept) or [part]))

    def dependencies(self, token: int) -> tuple[int, ...]:
        # A character needs none, as it is read before any merge.
        return self.parts(token, None) if len(self.letters(self.pieces.get(token, ""))) > 1 else ()

    def _last(self, token: int) -> tuple[int, ...]:
        letters = self.letters(self.pieces[token])
        if len(letters) == 1:
            return self.as_bytes(letters[0])
        read = ([self.ids[letter]] if letter in self.ids else self.as_bytes(letter) for letter in letters)
        symbols = [*chain.from_iterable(read)]
        pair: list[int] = []
        while len(symbols) > 1:
            ranks = [self.ranks.get(two, UNMERGED_RANK) for two in pairwise(symbols)]
            if (rank := min(ranks)) == UNMERGED_RANK:
                return tuple(symbols) if self.whole_words else ()
            at = ranks.index(rank)
            pair = symbols[at : at + 2]
            symbols[at : at + 2] = [self.merged[rank]]
        return tuple(pair) if symbols == [token] else ()


class UnigramSegmenter(Segmenter):
    """Unigram: text is cut into the tokens whose scores add up to the most."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        super().__init__(model, ids)
        self.scores = [score for _, score in model["vocab"]]
        self.longest = max(map(len, ids))
        # What no token spells has a score by the lowest one, which may therefore not go.
        self.lowest = min(range(len(self.scores)), key=self.scores.__getitem__)
        self.unknown_score = self.scores[self.lowest] - 10

    def prior(self, token: int) -> float:
        return exp(self.scores[token])

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        score, parts = self._best(token, None)
        if token < len(self.scores) and score > self.scores[token]:  # it is never read
            return ()
        return parts if kept is None else self._best(token, kept)[1]

    def _best(self, token: int, kept: Container[int] | None) -> tuple[float, tuple[int, ...]]:
        piece, unknown = self.pieces[token], self.unknown_score if self.bytes else UNSPELLED_SCORE
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for end in range(1, len(piece) + 1):
            cuts = [(best[end - 1][0] + unknown, best[end - 1][1] + self.as_bytes(piece[end - 1]))]
            for start in range(max(0, end - self.longest), end):
                part = self.ids.get(piece[start:end])
                if part is not None and part != token and (kept is None or part in kept):
                    cuts.append((best[start][0] + self.scores[part], (*best[start][1], part)))
            best.append(max(cuts, key=lambda cut: cut[0]))
        return best[-1] if best[-1][0] > UNSPELLED_SCORE else (UNSPELLED_SCORE, ())


class WordPieceSegmenter(Segmenter):
    """WordPiece: a word is cut from its start, each time at the end of the longest token."""

    def parts(self, token: int, kept: Container[int] | None) -> tuple[int, ...]:
        letters = self.letters(self.pieces[token])
        parts: list[int] = []
        while letters:
            for end in range(len(letters), 0, -1):
                piece = letters[0] + "".join(letter.removeprefix(self.prefix) for letter in letters[1:end])
                part = self.ids.get(piece)
                if part is not None and part != token and (kept is None or part in kept):
                    break
            else:
                return ()
            parts.append(part)
            letters = letters[end:]
        return tuple(parts)


KINDS: dict[str, type[Segmenter]] = {"BPE": BPESegmenter, "Unigram": UnigramSegmenter, "WordPiece": WordPieceSegmenter}


class Vocabulary:
    """The tokens of a fast tokenizer, as its `tokenizer.json` has them, and how others spell each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, described: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self._names = {number: piece for piece, number in tokenizer.get_vocab().items()}
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self.size = 1 + max(self._names)
        model, vocab = described["model"], described["model"]["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
        self._segmenter = KINDS[model["type"]](model, ids)
        self._unknown = model.get("unk_id", ids.get(model.get("unk_token")))
        steps = json.dumps([described["pre_tokenizer"], described["decoder"]], ensure_ascii=False)
        self._byte_level, self._marks_space = '"ByteLevel"' in steps, SPACE in steps
        self._irreplaceable_are_bytes = self._byte_level or bool(self._segmenter.bytes)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Reads the vocabulary of a tokenizer."""
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise StructPruneError(
                f"The tokenizer is a {type(tokenizer).__name__}, which is slow: it has no tokenizer.json to take "
                "tokens out of; load its fast form by AutoTokenizer, if it has one."
            )
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        if (kind := described["model"]["type"]) not in KINDS:
            raise StructPruneError(
                f"The tokenizer is of the kind {kind}, where no token is spelled by others; tokens can be taken out "
                f"of {', '.join(KINDS)}."
            )
        return cls(tokenizer, described)

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Gives the ids of the tokens to keep for any text, and of all their parts."""
        fixed = {*self._added, *self.tokenizer.all_special_ids, *self.tokenizer("", "").input_ids}
        for token in self._names.keys() - self._added:
            is_byte = self._irreplaceable_are_bytes and self._segmenter.is_irreplaceable(token)
            # Bytes in place of the mark of a space would be decoded to the mark.
            is_mark = token in (self._unknown, self._segmenter.lowest) or self._names[token] == SPACE
            if is_byte or is_mark or self.surface(token).strip() in {*"0123456789"}:
                fixed.add(token)
        for text in chats(self.tokenizer):
            fixed.update(self.tokenizer(text, verbose=False).input_ids)
        return frozenset(with_dependencies(fixed, self._segmenter.dependencies))

    @cached_property
    def letters(self) -> frozenset[int]:
        """Gives the ids of the tokens that single letters need; none if bytes spell all letters."""
        names = () if self._irreplaceable_are_bytes else self._names.keys() - self._added
        return frozenset(filter(self._segmenter.is_irreplaceable, names))

    def parts(self, token: int, kept: Container[int] | None = None) -> tuple[int, ...]:
        """Gives the tokens that spell a removed one, out of `kept` if given; none if it is never read."""
        return () if token in self._added or token not in self._names else self._segmenter.parts(token, kept)

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Gives the tokens without which a token cannot be formed."""
        return () if token in self._added or token not in self._names else self._segmenter.dependencies(token)

    def prior(self, token: int) -> float:
        """Estimates the relative frequency of a token in text of all kinds."""
        return 0.0 if token in self._added or token not in self._names else self._segmenter.prior(token)

    def surface(self, token: int) -> str:
        """Gives the text of a token as it stands in decoded text, with its space."""
        name = self._names.get(token, "")
        if token in self._added:
            return name
        if self._byte_level:
            return str(ByteLevel().decode([name]))
        if token in self._segmenter.bytes:
            return bytes([self._segmenter.bytes[token]]).decode("utf-8", "replace")
        spelling = self._segmenter
        if isinstance(spelling, WordPieceSegmenter):
            return name.removeprefix(spelling.prefix) if name.startswith(spelling.prefix) else f" {name}"
        name = name.replace(SPACE, " ") if self._marks_space else name
        return name.removesuffix(spelling.suffix) + " " if spelling.suffix and name.endswith(spelling.suffix) else name

    def smaller(self, keep: Sequence[int]) -> PreTrainedTokenizerFast:
        """Makes the tokenizer with only some tokens, ascending, numbered by their positions in `keep`."""
        new = {old: number for number, old in enumerate(keep)}
        if hasattr(self.tokenizer, "legacy"):  # LlamaTokenizer reads it and does not write it
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder, legacy_format=False)
            path = Path(folder, "tokenizer.json")
            described = rewritten(json.loads(path.read_text("utf-8")), self._segmenter, new)
            path.write_text(json.dumps(described, ensure_ascii=False), "utf-8")
            smaller = type(self.tokenizer).from_pretrained(folder)
        for name in ("name_or_path", "padding_side", "truncation_side"):  # what was set since it was loaded counts
            setattr(smaller, name, getattr(self.tokenizer, name))
        loaded = json.loads(smaller.backend_tokenizer.to_str())
        for part in described.keys() - {"truncation", "padding"}:
            if loaded[part] != described[part]:
                raise StructPruneError(
                    f"The tokenizer class {type(smaller).__name__} makes another {part} than its tokenizer.json says, "
                    "so that no tokens can be taken out; load the tokenizer as a PreTrainedTokenizerFast."
                )
        return smaller

    def check(self, smaller: PreTrainedTokenizerFast, keep: Sequence[int], texts: Iterable[str]) -> None:
        """Prove that a smaller tokenizer reads texts, and chats in the template, as this one does."""
        if [*chats(smaller)] != (written := [*chats(self.tokenizer)]):
            raise StructPruneError("The chat template of the smaller tokenizer writes something else.")
        new = {old: number for number, old in enumerate(keep)}
        for text in chain(written, texts):
            dense = self.tokenizer(text, verbose=False).input_ids
            ids = smaller(text, verbose=False).input_ids
            if all(token in new for token in dense) and [new[token] for token in dense] != ids:
                raise StructPruneError(
                    f"All tokens of a text stay, and the smaller tokenizer gives other tokens for it: {text!r:.200}"
                )
            # A letter whose script is gone is unknown.
            is_spelled = all(token in new or self.parts(token, new) for token in dense)
            if is_spelled and smaller.decode(ids) != self.tokenizer.decode(dense):
                raise StructPruneError(f"The smaller tokenizer decodes another text than the dense one: {text!r:.200}")


def with_dependencies(tokens: Iterable[int], needs: Callable[[int], Iterable[int]]) -> set[int]:
    """Adds to tokens all that they are formed from."""
    closed: set[int] = set()
    waiting = [*tokens]
    while waiting:
        if (token := waiting.pop()) not in closed:
            closed.add(token)
            waiting += needs(token)
    return closed


def rewritten(described: dict[str, Any], spelling: Segmenter, new: Mapping[int, int]) -> dict[str, Any]:
    """Rewrites `tokenizer.json` for the tokens of `new` alone, under their new numbers."""
    model = described["model"]
    for token in described["added_tokens"]:
        token["id"] = new[token["id"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = new.get(model["unk_id"])
    if isinstance(spelling, BPESegmenter):
        # What the dense tokenizer never yields, the smaller one must not form of what stays either.
        model["merges"] = [
            pair
            for pair, result in zip(model["merges"], spelling.merged, strict=True)
            if result in new and all(piece in model["vocab"] for piece in pair) and spelling.parts(result, None)
        ]
    renumber(described["post_processor"], new)
    described["padding"] = None  # of the last call; transformers sets it for each
    return described


def renumber(step: Any, new: Mapping[int, int]) -> None:
    """Give the tokens that a post-processor writes their new numbers."""
    if not isinstance(step, dict):
        return
    for inner in step.get("processors", ()):
        renumber(inner, new)
    for name in {"sep", "cls"} & step.keys():
        step[name] = [step[name][0], new[step[name][1]]]
    if isinstance(special := step.get("special_tokens"), dict):
        for token in special.values():
            token["ids"] = [new[old] for old in token["ids"]]


def chats(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the text that chat templates write for conversations of the usual roles, in each month."""
    templates: Any = tokenizer.chat_template or {}
    templates = templates.values() if isinstance(templates, dict) else [templates]
    for template, roles, tools in product(templates, ROLES, (None, TOOLS)):
        chat = [{"role": role, "content": "0"} for role in roles]
        for date in DATES if "strftime_now" in template else DATES[:1]:
            with suppress(StructPruneError):  # of the conversations, a template may take a few
                yield chat_text(tokenizer, chat, template, date, tools=tools, add_generation_prompt=True)
