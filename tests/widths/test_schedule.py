"""The steps of a training after which units are removed."""

import pytest
from models import config

from optimum_structprune import StructPruneError
from optimum_structprune.widths.schedule import removal_steps


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"start": 0.2, "end": 1.0}, [2, 5, 7, 10]),
        ({"start": 1.0}, [10]),
        ({"start": 2, "end": 9, "every": 3}, [2, 5, 8]),
        ({"start": 0.0}, [1]),
    ],
)
def test_steps_of_removal(schedule, steps):
    settings = config(rounds=4 if "end" in schedule else 1)
    given = {"end": None, "every": None, **schedule}
    assert removal_steps(settings, given["start"], given["end"], given["every"], 10) == steps


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((0.2, 0.8, None), "end=0.8 divides the removal.*rounds=1 removes everything at once; set rounds=4"),
        ((0.5, 0.2, None), "end=0.2 is step 2, before start=0.5, step 5"),
        ((-3, None, None), "start is a step, or a share of all steps from 0.0 to 1.0, got -3"),
        ((1.5, None, None), "got 1.5"),
        (("0.5", None, None), "got '0.5'"),
        ((2, 8, 0), "every is a number of steps, 1 or more, got 0"),
        ((2, 11, 3), "go after step 11, but training has 10 steps"),
    ],
)
def test_steps_that_mean_nothing(schedule, message):
    with pytest.raises(StructPruneError, match=message):
        removal_steps(config(), *schedule, 10)
