"""From a row of data to a document, and files of conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.domains import CHAT, DomainConfig, template_fields
from ..errors import StructPruneError, one_line
from ..registry import did_you_mean


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = Mapping[str, Any]
T = TypeVar("T")
# The two usual forms of a message: `role` and `content`, or `from` and `value` with other names of the roles.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# What a message may hold beside its text: calls of tools, and what says to which one it is an answer.
TOOL_FIELDS = ("tool_calls", "tool_call_id", "name")
# In place of the chat template of a model that has none.
TRANSCRIPT = "{% for m in messages %}{{ m['role'].capitalize() }}: {{ m['content'] }}\n\n{% endfor %}"
# A template may write the date, and what is read must not depend on the day. These have each month and each day of the
# week; the numbers in other dates are spelled by digits.
DATES = tuple(datetime(2024, month, 26) for month in range(1, 13))


def rendered(row: Row, domain: DomainConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Gives the text that a row makes."""
    if domain.template is None:
        return _text(row, domain.text_column, domain, "text_column")
    if domain.template != CHAT:
        names = template_fields(domain.template)
        return domain.template.format(**{name: _text(row, name, domain, "template") for name in names})
    assert tokenizer is not None  # nothing is read without one
    template = None if tokenizer.chat_template else TRANSCRIPT
    messages = _messages(row, domain)
    return chat_text(tokenizer, messages, template, where=f" in the domain {domain.name!r}") if messages else ""


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[Mapping[str, Any]],
    template: str | None = None,
    date: datetime = DATES[0],
    where: str = "",
    **options: Any,
) -> str:
    """Renders a conversation by a chat template, by default that of the tokenizer, on a given date."""
    chat = [dict(message) for message in messages]
    try:
        template = tokenizer.get_chat_template(template, options.get("tools"))
        if "strftime_now" in template:  # a clock of the environment, in whose place no argument can stand
            codes = sorted({*re.findall("(?<!{)%-?[A-Za-z]", template)})
            written = "".join(f".replace({code!r}, {date.strftime(code)!r})" for code in codes)
            template = "{% macro strftime_now(form) %}{{ form" + written + " }}{% endmacro %}\n" + template
        return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options))
    except Exception as error:  # a template raises whatever its author chose
        raise StructPruneError(
            f"The chat template of {tokenizer.name_or_path or type(tokenizer).__name__!r} refuses a conversation of "
            f"the roles {', '.join(message['role'] for message in chat)}{where}: {one_line(error)}; set "
            "tokenizer.chat_template to one that takes it, or use other text."
        ) from error


def _messages(row: Row, domain: DomainConfig) -> list[dict[str, Any]]:
    names = [name for name in (domain.text_column, *CHAT_COLUMNS) if name in row]
    conversation = next((row[name] for name in names if not isinstance(row[name], str)), None)
    if not names or (conversation is None and any(row[name] for name in names)):
        raise StructPruneError(
            f"The domain {domain.name!r} has no column of messages; set text_column."
            f"{did_you_mean(domain.text_column, row)}"
        )
    try:
        return messages_of(conversation)
    except StructPruneError as error:
        raise StructPruneError(f"The domain {domain.name!r}: {error}") from error


def messages_of(conversation: Any) -> list[dict[str, Any]]:
    """Gives the messages of a conversation with `role` and `content`; parts of a content are joined."""
    messages = []
    single = isinstance(conversation, Mapping) or not isinstance(conversation, Iterable)
    for item in () if conversation is None else [conversation] if single else conversation:
        fields: Row = item if isinstance(item, Mapping) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if isinstance(content, list):  # of parts, whose text is what can be read
            texts = [(part.get("text") if isinstance(part, Mapping) else part) or "" for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
        if content is None and {"content", "value"} & set(fields):
            content = ""
        if not (isinstance(role, str) and isinstance(content, str)):
            raise StructPruneError(f"a message needs a role and a text, got {item!r:.60}.")
        more = {name: fields[name] for name in TOOL_FIELDS if fields.get(name)}
        messages.append({"role": ROLES.get(role, role), "content": content, **more})
    return messages


def question_messages(row: Any) -> list[dict[str, Any]]:
    """Gives the messages of a row that asks something: its `messages`, or its `prompt`."""
    messages = messages_of(row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}])
    "".join(message["content"] for message in messages).encode()  # half a character, which no tokenizer reads
    return messages


def read_lines(path: Path, parse: Callable[[str], T], form: str) -> list[T]:
    """Parse each line of a file; a refusal says by `form` what a line has to be."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise StructPruneError(f"{path} cannot be read: {one_line(error)}") from error
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed += [parse(line)] if line.strip() else []
        except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise StructPruneError(f"{path}, line {number}, {form}; {reason}; got {line:.80}") from error
    return parsed


def _text(row: Row, column: str, domain: DomainConfig, field: str) -> str:
    if column not in row:
        is_chat = any(name in row and not isinstance(row[name], str) for name in CHAT_COLUMNS)
        field, needed = ("template", CHAT) if is_chat else (field, "…")
        flag = f" (--domain '{{name: {domain.name}, source: {domain.source}, {field}: {needed}}}')"
        flag *= isinstance(domain.source, str)
        raise StructPruneError(
            f"The domain {domain.name!r} has no column {column!r}; set {field}{flag}.{did_you_mean(column, row)}"
        )
    value = row[column]
    return "" if value is None else string(value, domain, f"the column {column!r}")


def string(value: Any, domain: DomainConfig, where: str) -> str:
    """Gives back a value, which has to be a string."""
    if not isinstance(value, str):
        advice = f"; messages take template={CHAT!r}" * isinstance(value, list)
        raise StructPruneError(
            f"The domain {domain.name!r} has to give strings; {where} holds the {type(value).__name__} "
            f"{str(value):.60}{advice}."
        )
    return value
