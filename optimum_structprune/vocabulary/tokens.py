"""Read the tokens of a fast tokenizer and the tokens that spell each of them, and make smaller tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..domains.templates import DATES, chat_text
from ..system.errors import StructPruneError
from .segmenters import KINDS, BPESegmenter, Segmenter, WordPieceSegmenter


SPACE = "▁"  # SentencePiece writes it for a space
DIGITS = frozenset("0123456789")
# The roles in the conversations that a chat template is checked on.
CHAT_ROLES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
# A tool, and the end of a conversation that calls it.
NUMBER = {"type": "object", "properties": {"a": {"type": "number", "description": "A."}}, "required": ["a"]}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBER}}]
TOOL_CALL = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 0}}}
TOOL_MESSAGES: Any = [
    {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "0"},
]
# Templates of reasoning models write other text without reasoning.
THINKING: Any = ({}, {"enable_thinking": True}, {"enable_thinking": False})


class Vocabulary:
    """The tokens of a fast tokenizer, and the tokens that spell each of them.

    Args:
        tokenizer: The tokenizer.
        described: The contents of its `tokenizer.json`.

    Attributes:
        size: The number of ids, one more than the highest id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, described: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self._names = {number: piece for piece, number in tokenizer.get_vocab().items()}
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self.size = 1 + max(self._names)

        model = described["model"]
        ids = model["vocab"]
        if not isinstance(ids, dict):
            ids = {piece: number for number, (piece, _) in enumerate(ids)}
        self._segmenter = KINDS[model["type"]](model, ids)
        self._unknown = model.get("unk_id", ids.get(model.get("unk_token")))

        steps = json.dumps([described["pre_tokenizer"], described["decoder"]], ensure_ascii=False)
        self._byte_level = '"ByteLevel"' in steps
        self._marks_space = SPACE in steps
        self._irreplaceable_are_bytes = self._byte_level or bool(self._segmenter.bytes)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Read the vocabulary of a tokenizer.

        Raises:
            StructPruneError: If the tokenizer is slow or has no decoder, or no tokens can be removed from its kind.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise StructPruneError(
                f"The tokenizer is a {type(tokenizer).__name__}, which is slow: it has no tokenizer.json to remove "
                "tokens from. Load a fast tokenizer with AutoTokenizer, if the model has one."
            )

        described = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = described["model"]["type"]
        if kind not in KINDS:
            raise StructPruneError(
                f"The tokenizer is of the kind {kind}, where no token is spelled by other tokens. Tokens can be "
                f"removed from {', '.join(KINDS)}."
            )
        if described["decoder"] is None:
            raise StructPruneError(
                "The tokenizer has no decoder, so words that are split into more tokens would be decoded with spaces "
                "inside. Set `tokenizer.backend_tokenizer.decoder`, for example to decoders.ByteLevel(), and save it."
            )
        return cls(tokenizer, described)

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Return the ids of the tokens that any text needs, and of all their parts.

        These are added and special tokens, bytes, digits, the mark of a space, the unknown token, and the tokens of
        chat templates.
        """
        fixed = set(self._added)
        fixed.update(self.tokenizer.all_special_ids, self.tokenizer("", "").input_ids)

        for token in self._names.keys() - self._added:
            is_byte = self._irreplaceable_are_bytes and self._segmenter.is_irreplaceable(token)
            # Bytes that replace the mark of a space would be decoded to the mark.
            is_mark = token in (self._unknown, self._segmenter.lowest) or self._names[token] == SPACE
            if is_byte or is_mark or self.surface(token).strip() in DIGITS:
                fixed.add(token)

        for text in chats(self.tokenizer):
            fixed.update(self.tokenizer(text, verbose=False).input_ids)
        return frozenset(with_dependencies(fixed, self._segmenter.dependencies))

    @cached_property
    def letters(self) -> frozenset[int]:
        """Return the ids of the tokens that single letters need, or no ids if bytes spell all letters."""
        if self._irreplaceable_are_bytes:
            return frozenset()
        return frozenset(filter(self._segmenter.is_irreplaceable, self._names.keys() - self._added))

    def _is_formed(self, token: int) -> bool:
        """Return whether the model of the tokenizer forms a token: it has a name, and is not an added token."""
        return token in self._names and token not in self._added

    def parts(self, token: int, keep: Container[int] | None = None) -> tuple[int, ...]:
        """Return the tokens that spell a removed token.

        Args:
            token: The id of the token.
            keep: The ids of the tokens that may be used. The default is all other tokens.

        Returns:
            The ids of tokens, or no ids if the tokenizer never yields the token.
        """
        if not self._is_formed(token):
            return ()
        return self._segmenter.parts(token, keep)

    def dependencies(self, token: int) -> tuple[int, ...]:
        """Return the tokens without which a token cannot be formed."""
        if not self._is_formed(token):
            return ()
        return self._segmenter.dependencies(token)

    def prior(self, token: int) -> float:
        """Estimate the relative frequency of a token in general text."""
        if not self._is_formed(token):
            return 0.0
        return self._segmenter.prior(token)

    def surface(self, token: int) -> str:
        """Return the text that a token decodes to, with its space."""
        name = self._names.get(token, "")
        if token in self._added:
            return name
        if self._byte_level:
            return str(ByteLevel().decode([name]))

        segmenter = self._segmenter
        if token in segmenter.bytes:
            return bytes([segmenter.bytes[token]]).decode("utf-8", "replace")
        if isinstance(segmenter, WordPieceSegmenter):
            if name.startswith(segmenter.prefix):
                return name.removeprefix(segmenter.prefix)
            return f" {name}"

        if self._marks_space:
            name = name.replace(SPACE, " ")
        if segmenter.suffix and name.endswith(segmenter.suffix):
            return name.removesuffix(segmenter.suffix) + " "
        return name

    def smaller(self, keep: Sequence[int]) -> PreTrainedTokenizerFast:
        """Return the tokenizer with some of its tokens.

        Args:
            keep: The ids of the kept tokens, ascending. The new id of a token is its place in `keep`.

        Raises:
            StructPruneError: If the class of the tokenizer changes the contents of `tokenizer.json` when it loads it.
        """
        new_ids = {old: new for new, old in enumerate(keep)}
        if hasattr(self.tokenizer, "legacy"):  # LlamaTokenizer reads it and does not write it
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy

        self.tokenizer("")
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder, legacy_format=False)
            path = Path(folder, "tokenizer.json")
            described = rewritten(json.loads(path.read_text("utf-8")), self._segmenter, new_ids)
            path.write_text(json.dumps(described, ensure_ascii=False), "utf-8")
            smaller = type(self.tokenizer).from_pretrained(folder)

        # These attributes may have changed since the tokenizer was loaded.
        for name in ("name_or_path", "padding_side", "truncation_side"):
            setattr(smaller, name, getattr(self.tokenizer, name))

        smaller("")  # a translator writes another post-processor for its input than it is loaded with
        loaded = json.loads(smaller.backend_tokenizer.to_str())
        for part in described.keys() - {"truncation", "padding"}:
            if loaded[part] != described[part]:
                raise StructPruneError(
                    f"The tokenizer class {type(smaller).__name__} replaces the {part} of its tokenizer.json, so no "
                    "tokens can be removed. Load the tokenizer as a PreTrainedTokenizerFast."
                )
        return smaller

    def check(self, smaller: PreTrainedTokenizerFast, keep: Sequence[int], texts: Iterable[str]) -> None:
        """Check that a smaller tokenizer reads texts, and chats in the template, as this tokenizer does.

        Args:
            smaller: The smaller tokenizer.
            keep: The ids of its tokens in this tokenizer, ascending.
            texts: The texts.

        Raises:
            StructPruneError: If the tokens of a text differ although all are kept, or if its decoded text differs.
        """
        chat_texts = list(chats(self.tokenizer))
        if list(chats(smaller)) != chat_texts:
            raise StructPruneError("The chat template of the smaller tokenizer renders other text.")

        new_ids = {old: new for new, old in enumerate(keep)}
        for text in chain(chat_texts, texts):
            original = self.tokenizer(text, verbose=False).input_ids
            ids = smaller(text, verbose=False).input_ids
            if all(token in new_ids for token in original) and [new_ids[token] for token in original] != ids:
                raise StructPruneError(
                    f"All tokens of a text are kept, but the smaller tokenizer returns other tokens: {text!r:.200}"
                )

            # A letter of a removed script is unknown.
            is_spelled = all(token in new_ids or self.parts(token, new_ids) for token in original)
            if is_spelled and smaller.decode(ids) != self.tokenizer.decode(original):
                raise StructPruneError(
                    f"The smaller tokenizer decodes another text than the original one: {text!r:.200}"
                )


def with_dependencies(tokens: Iterable[int], needs: Callable[[int], Iterable[int]]) -> set[int]:
    """Return tokens with all tokens that they need, directly or not."""
    closed: set[int] = set()
    waiting = list(tokens)
    while waiting:
        token = waiting.pop()
        if token not in closed:
            closed.add(token)
            waiting += needs(token)
    return closed


def rewritten(described: dict[str, Any], segmenter: Segmenter, new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Rewrite the contents of a `tokenizer.json` for some of its tokens.

    Args:
        described: The contents, which are changed.
        segmenter: The model of the tokenizer.
        new_ids: The new ids of the kept tokens, by their old ids.
    """
    model = described["model"]
    for added_token in described["added_tokens"]:
        added_token["id"] = new_ids[added_token["id"]]

    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: new_ids[old_id] for piece, old_id in model["vocab"].items() if old_id in new_ids}
    else:
        model["vocab"] = [entry for old_id, entry in enumerate(model["vocab"]) if old_id in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])

    if isinstance(segmenter, BPESegmenter):
        merges = []
        for pair, result in zip(model["merges"], segmenter.merged, strict=True):
            has_parts = all(piece in model["vocab"] for piece in pair)
            # The smaller tokenizer must not form a token that the original tokenizer never yields.
            if result in new_ids and has_parts and segmenter.parts(result, None):
                merges.append(pair)
        model["merges"] = merges

    renumber(described["post_processor"], new_ids)
    described["padding"] = None  # the padding of the last call; transformers sets it for each call
    return described


def renumber(step: Any, new_ids: Mapping[int, int]) -> None:
    """Renumber the tokens that a post-processor adds."""
    if not isinstance(step, dict):
        return
    for inner in step.get("processors", ()):
        renumber(inner, new_ids)

    for name in ("sep", "cls"):
        if name in step:
            token, old = step[name]
            step[name] = [token, new_ids[old]]

    special = step.get("special_tokens")
    if isinstance(special, dict):
        for token in special.values():
            token["ids"] = [new_ids[old] for old in token["ids"]]


def chats(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts that chat templates write for conversations of the usual roles and of a tool, in each month."""
    templates: Any = tokenizer.chat_template or {}
    if not isinstance(templates, dict):
        templates = {"": templates}

    conversations = []
    for roles in CHAT_ROLES:
        conversations.append([{"role": role, "content": "0"} for role in roles])
    conversations.append(conversations[-1] + TOOL_MESSAGES)

    for template, chat, tools in product(templates.values(), conversations, (None, TOOLS)):
        dates = DATES
        if "strftime_now" not in template:
            dates = DATES[:1]
        thinking = THINKING
        if "enable_thinking" not in template:
            thinking = THINKING[:1]

        for date, options in product(dates, thinking):
            with suppress(StructPruneError):  # a template may refuse some of the conversations
                yield chat_text(tokenizer, chat, template, date, tools=tools, add_generation_prompt=True, **options)
