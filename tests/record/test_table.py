"""Tables and the format of numbers, which have as many digits as their margins allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from optimum_structprune.record.table import aligned, byte_size, escaped, markdown, number, times, with_margin


@pytest.mark.parametrize(("margin", "documents", "text"), [
    (0.2, 90, "1.5× ± 0.2"),
    (0.04, 90, "1.50× ± 0.04"),
    (0.0004, 90, "1.500× ± 0.000"),
    (2.0, 90, "2× ± 2"),
    (None, 90, "1.500×"),
    (None, 4, "1.5× (few documents)"),
    (0.2, 4, "1.5× ± 0.2 (few documents)"),
])  # fmt: skip
def test_digits_follow_the_margin_and_few_documents_are_mentioned(margin, documents, text):
    assert times(1.5, margin, documents) == text


@pytest.mark.parametrize(("count", "text"), [
    (200, "200 bytes"), (68_224, "68.2 kB"), (269_030_016, "269 MB"), (16_000_000_000, "16.0 GB"),
])  # fmt: skip
def test_bytes_are_shown_in_decimal_units(count, text):
    assert byte_size(count) == text


def test_ranges_and_unknown_numbers():
    assert number([1024, 1536, 1100]) == "1,024-1,536"
    assert number([8, 8]) == "8"
    assert number(None) == "–"
    assert with_margin(0.95, 0.02) == "0.95 ± 0.02"
    assert with_margin(0.95, None) == "0.950"


cells = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=9)


@given(st.lists(st.tuples(cells, cells), min_size=2, max_size=4))
def test_a_markdown_table_shows_only_its_cells(rows):
    tokens = MarkdownIt().enable("table").parse(markdown(rows))

    (table,) = (token for token in tokens if token.type == "table_open")
    assert table.nesting == 1

    cell_tokens = [token for token in tokens if token.type == "inline"]
    assert len(cell_tokens) == 2 * len(rows)
    for cell_token in cell_tokens:
        assert {child.type for child in cell_token.children} <= {"text", "text_special"}


@given(st.text())
def test_escaped_text_is_one_line(text):
    assert len(escaped(text).splitlines()) <= 1


def test_columns_are_aligned():
    assert aligned([["", "a"], ["long name", "1"], ["b", "1,000"]]).splitlines() == [
        "               a",
        "long name      1",
        "b          1,000",
    ]
