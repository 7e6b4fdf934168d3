"""The table that a run prints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.report import Report
from optimum_structprune.record.text import BARS, LONGEST_SPARK, spark_line


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_a_spark_line_has_a_bar_per_layer_or_the_most_there_may_be(shares):
    line = spark_line(shares)
    assert len(line) == min(len(shares), LONGEST_SPARK) and {*line} <= {*BARS}
    rising = spark_line(sorted(shares))
    assert list(rising) == sorted(rising)


@pytest.mark.parametrize(("widths", "bars"), [({0: 4, 1: 8}, "▄█"), ({0: 4, 1: 4}, None)])
def test_the_table_has_one_where_layers_differ(widths, bars):
    sizes = {"before": 10, "after": 5}
    report = Report("llama", "obs", sizes, sizes, {"mlp": widths}, {"mlp": 8})
    row = next(line for line in str(report).splitlines() if line.startswith("width mlp"))
    assert row.endswith(bars or "%") and "%" in row
