"""Conversations as text: what a chat template raises is one line that names it, and no day changes what it writes."""

from datetime import datetime

import pytest
from helpers import today_is
from models import real_text_model, tokenizer

from optimum_structprune import DomainConfig, StructPruneError
from optimum_structprune.domains.generated import self_documents
from optimum_structprune.domains.templates import DATES, chat_text, rendered
from optimum_structprune.evaluation.answers import read_questions


PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
DOMAIN = DomainConfig("d", [], template="chat")
RAISING = [
    "{{ raise_exception('system\nfirst') }}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ messages | unknown }}",
    "{{ 'a' + 1 }}",
    "{{ [].pop() }}",
    "{{ 'a'.index('b') }}",
    "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    {"rag": PLAIN, "tool_use": PLAIN},
]


@pytest.mark.parametrize("template", RAISING)
def test_whatever_a_template_raises_is_one_line_that_names_it(template):
    model, reader = real_text_model()
    reader.chat_template, reader.name_or_path = template, "some/model"
    for render in (
        lambda: chat_text(reader, CHAT),
        lambda: rendered({"messages": CHAT}, DOMAIN, reader),
        lambda: next(self_documents(model, reader, "dialogue", 0, tokens=64)),
        lambda: read_questions()[0].ids(reader),
    ):
        with pytest.raises(StructPruneError, match="chat template of 'some/model' refuses") as caught:
            render()
        assert "\n" not in str(caught.value) and "set tokenizer.chat_template" in str(caught.value)


DATED = [
    "\n {% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}\n" + PLAIN,
    "{%- macro day(form) %}{{ strftime_now(form) }}{% endmacro %}{% set form = '%A, %-d %b %y' %}{{ day(form) }}"
    + PLAIN,
    "{{ strftime_now(\"%H:%M:%S\") }}{{ strftime_now('%Y') | int + 1 }}\n" + PLAIN,
    "  {%-if true %}\n{{ strftime_now('%F') }}\n  {%- endif %}" + PLAIN,
]


@pytest.mark.parametrize("template", DATED)
def test_a_template_writes_what_it_would_on_the_date_and_never_asks_the_clock(template, monkeypatch):
    reader = tokenizer()
    reader.chat_template = template
    for date in (DATES[0], datetime(2026, 9, 3, 14, 5)):
        today_is(monkeypatch, date)
        expected = reader.apply_chat_template(CHAT, tokenize=False)
        today_is(monkeypatch, datetime(1999, 1, 1, 9))
        assert chat_text(reader, CHAT, date=date) == expected
    assert rendered({"messages": CHAT}, DOMAIN, reader) == chat_text(reader, CHAT)


def test_the_dates_have_every_month_and_every_day_of_the_week():
    assert {date.month for date in DATES} == {*range(1, 13)} and {date.weekday() for date in DATES} == {*range(7)}
