"""Records that version 2 has saved are still read, and print the same lines.

`version_2` has records of stories260K (pruned by its vocabulary and recovered, and pruned within a loss) and of
MiniLM, and the lines that version 2 printed.
"""

from pathlib import Path

import pytest

from optimum_structprune.record.report import Report
from optimum_structprune.record.version_2 import converted
from optimum_structprune.saving.records import Records


FOLDER = Path(__file__).parent / "version_2"


@pytest.mark.parametrize("name", ["decoder", "encoder", "loss"])
def test_records_of_version_2_print_the_same_lines(name, tmp_path):
    folder = FOLDER / name
    records = Records.read(folder)
    printed = [str(record) for record in (records.report, records.evaluation, records.speed) if record is not None]

    # The original model was called `dense` in the answers of an evaluation.
    expected = (folder / "printed.txt").read_text().replace("  dense (", "  original (")
    assert "\n\n".join(printed) + "\n" == expected

    records.report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == records.report


def test_names_of_users_are_not_converted():
    """Domains may have the names of fields."""
    values = {"domains": {"dense": {"perplexity": {"dense": 2.0, "pruned": None, "margin": 0.1}}, "wish": {}}}

    assert converted(values) == {
        "domains": {
            "dense": {"perplexity": {"original": 2.0, "pruned": None, "margin": 0.1}},
            "wish": {},
        }
    }
