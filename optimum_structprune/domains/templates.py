"""Convert rows of data to documents, and read conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.domains import CHAT, DomainConfig, template_fields
from ..system.errors import StructPruneError, one_line, reason_of
from ..system.registry import did_you_mean


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = Mapping[str, Any]
T = TypeVar("T")
# Messages have the fields `role` and `content`, or `from` and `value` with other names of the roles.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# The fields that a message may have in addition to its text: tool calls, their answers, and reasoning.
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
# The chat template for models without one.
TRANSCRIPT = "{% for m in messages %}{{ m['role'].capitalize() }}: {{ m['content'] }}\n\n{% endfor %}"
# Chat templates may write the date, and calibration text must not depend on the day. These dates cover all months and
# all days of the week.
DATES = tuple(datetime(2024, month, 26) for month in range(1, 13))


def rendered(row: Row, domain: DomainConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of a row."""
    if domain.template is None:
        return _text(row, domain.text_column, domain, "text_column")

    if domain.template != CHAT:
        columns = template_fields(domain.template)
        values = {column: _text(row, column, domain, "template") for column in columns}
        return domain.template.format(**values)

    messages = _messages(row, domain)
    if not messages:
        return ""

    # Chat domains are not read without a tokenizer.
    assert tokenizer is not None
    template = None
    if not tokenizer.chat_template:
        template = TRANSCRIPT
    return chat_text(tokenizer, messages, template, where=f" in the domain {domain.name!r}", tools=_tools_of(row))


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[Mapping[str, Any]],
    template: str | None = None,
    date: datetime = DATES[0],
    where: str = "",
    **options: Any,
) -> str:
    """Render a conversation with a chat template.

    Args:
        tokenizer: The tokenizer.
        messages: The messages.
        template: The template. By default the tokenizer's own.
        date: The date for templates that write one.
        where: The place of the conversation, for errors.
        options: Arguments of `apply_chat_template`.

    Raises:
        StructPruneError: If the template does not accept the conversation.
    """
    chat = [dict(message) for message in messages]

    # A template can raise an exception of any kind.
    try:
        template = tokenizer.get_chat_template(template, options.get("tools"))
        if "strftime_now" in template:
            template = _with_fixed_date(template, date)

        return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options))
    except Exception as error:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        roles = ", ".join(message["role"] for message in chat)
        raise StructPruneError(
            f"The chat template of {name!r} does not accept a conversation with the roles {roles}{where}: "
            f"{reason_of(error)}. Set `tokenizer.chat_template` to one that accepts it, or use other text."
        ) from error


def _tools_of(row: Row) -> list[dict[str, Any]] | None:
    """Return the descriptions of tools in the column `tools` of a row, or None if it has none."""
    tools = row.get("tools")

    if not tools or not isinstance(tools, list):
        return None
    if not all(isinstance(tool, dict) for tool in tools):
        return None
    return tools


def _with_fixed_date(template: str, date: datetime) -> str:
    """Define `strftime_now` in a template. Otherwise transformers would define it with today's date."""
    replacements = ""

    for code in sorted(set(re.findall("(?<!{)%-?[A-Za-z]", template))):
        replacements += f".replace({code!r}, {date.strftime(code)!r})"

    return "{% macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}\n" + template


def _messages(row: Row, domain: DomainConfig) -> list[dict[str, Any]]:
    """Return the messages of a row, or an empty list if it has none."""
    columns = [column for column in (domain.text_column,) + CHAT_COLUMNS if column in row]
    conversation = None
    for column in columns:
        if not isinstance(row[column], str):
            conversation = row[column]
            break

    if not columns or (conversation is None and any(row[column] for column in columns)):
        raise StructPruneError(
            f"The domain {domain.name!r} has no column of messages. Set `text_column`."
            f"{did_you_mean(domain.text_column, row)}"
        )

    try:
        return messages_of(conversation)
    except StructPruneError as error:
        raise StructPruneError(f"The domain {domain.name!r}: {error}") from error


def messages_of(conversation: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation with `role` and `content`.

    Raises:
        StructPruneError: If a message has no role or no text.
    """
    if conversation is None:
        return []
    if isinstance(conversation, Mapping) or not isinstance(conversation, Iterable):
        conversation = [conversation]

    messages = []
    for item in conversation:
        fields: Row = {}
        if isinstance(item, Mapping):
            fields = item
        role = fields.get("role", fields.get("from"))
        content = _content_of(fields)

        if not (isinstance(role, str) and isinstance(content, str)):
            raise StructPruneError(f"a message needs a role and a text, got {item!r:.60}.")

        message = {"role": ROLES.get(role, role), "content": content}
        for name in MESSAGE_FIELDS:
            if fields.get(name):
                message[name] = fields[name]
        messages.append(message)

    return messages


def _content_of(fields: Row) -> Any:
    """Return the text of a message, joined from its parts. A message with tool calls needs no text."""
    content = fields.get("content", fields.get("value"))

    if content is None:
        may_be_empty = "content" in fields or "value" in fields or fields.get("tool_calls")
        if may_be_empty:
            return ""
    if not isinstance(content, list):
        return content

    texts = []
    for part in content:
        if isinstance(part, Mapping):
            part = part.get("text")
        texts.append(part or "")

    if all(isinstance(text, str) for text in texts):
        return "".join(texts)
    return texts


def question_messages(row: Any) -> list[dict[str, Any]]:
    """Return the messages of a row with `messages` or with a `prompt`.

    Raises:
        ValueError: If the row is not an object, or its text has half a character, which no tokenizer reads.
    """
    if not isinstance(row, Mapping):
        raise ValueError("each line must be an object")

    if "messages" in row:
        messages = messages_of(row["messages"])
    else:
        messages = messages_of([{"role": "user", "content": row["prompt"]}])

    "".join(message["content"] for message in messages).encode()
    return messages


def read_lines(path: Path, parse: Callable[[str], T], form: str) -> list[T]:
    """Parse each line of a file that is not empty.

    Args:
        path: The file.
        parse: The function that parses a line.
        form: A description of a line, for errors.

    Raises:
        StructPruneError: If the file cannot be read or a line cannot be parsed.
    """
    try:
        # `splitlines` would also split at characters that JSON allows in a string.
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise StructPruneError(f"{path} cannot be read: {one_line(error)}") from error

    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue

        try:
            values.append(parse(line))
        except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise StructPruneError(f"{path}, line {number}, {form}; {reason}; got {line:.80}") from error

    return values


def _text(row: Row, column: str, domain: DomainConfig, field: str) -> str:
    """Return the text in a column; `field` is the field of the domain that names it."""
    if column not in row:
        raise StructPruneError(_missing_column(row, column, domain, field))

    value = row[column]
    if value is None:
        return ""
    return string(value, domain, f"the column {column!r}")


def _missing_column(row: Row, column: str, domain: DomainConfig, field: str) -> str:
    """Return the error message for a column that a row does not have."""
    value = "…"
    if any(name in row and not isinstance(row[name], str) for name in CHAT_COLUMNS):
        field = "template"
        value = CHAT

    example = ""
    if isinstance(domain.source, str):
        example = f" (--domain '{{name: {domain.name}, source: {domain.source}, {field}: {value}}}')"

    suggestion = did_you_mean(column, row)
    return f"The domain {domain.name!r} has no column {column!r}. Set `{field}`{example}.{suggestion}"


def string(value: Any, domain: DomainConfig, where: str) -> str:
    """Return a value, or raise `StructPruneError` if it is not a string."""
    if isinstance(value, str):
        return value

    advice = ""
    if isinstance(value, list):
        advice = f" Use `template={CHAT!r}` for messages."
    raise StructPruneError(
        f"The domain {domain.name!r} must contain strings, and {where} holds the {type(value).__name__} "
        f"{str(value):.60}.{advice}"
    )


def read_pairs(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Read files with a text and its translation in each line of JSON.

    Returns:
        The texts of each file by its name. The second half translates the first half.

    Raises:
        StructPruneError: If a file cannot be read, has no pairs, or a line is not a pair.
    """
    names = distinct_names([Path(path).stem for path in paths], paths)
    texts_by_name: dict[str, list[str]] = {}

    for path, name in zip(paths, names, strict=True):
        pairs = read_lines(Path(path), _pair, 'is not a pair of two texts, such as {"en": "…", "de": "…"}')
        if not pairs:
            raise StructPruneError(f"The file {path} has no pairs of texts.")

        texts = [text for text, _ in pairs]
        texts += [translation for _, translation in pairs]
        texts_by_name[f"pairs {name}"] = texts

    return texts_by_name


def distinct_names(names: Sequence[str], paths: Sequence[str | Path]) -> list[str]:
    """Return unique names: the path replaces each name that occurs more than once."""
    unique_names = []
    for name, path in zip(names, paths, strict=True):
        unique_names.append(name if names.count(name) == 1 else str(path))
    return unique_names


def _pair(line: str) -> tuple[str, str]:
    """Return the text and its translation in a line of JSON."""
    row = json.loads(line)
    values = row.values() if isinstance(row, dict) else row
    text, translation = map(str.strip, values)

    # Encoding also raises an error for half of a surrogate pair.
    if not text.encode() or not translation.encode():
        raise ValueError("a text is empty")
    return text, translation
