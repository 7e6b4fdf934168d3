"""Test the progress of a run on a terminal and in a log."""

import io
import sys
from logging import WARNING

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging

from optimum_structprune.system import stages


@pytest.fixture
def run_stage(monkeypatch):
    """Return a function that returns the output of a stage of ten steps of four seconds each."""

    def run(terminal):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        # The command line may have set another level in this process.
        monkeypatch.setattr(stages.logger, "level", WARNING)
        monkeypatch.setattr(sys, "stderr", screen)
        clock = {"seconds": 0}
        monkeypatch.setattr(stages, "perf_counter", lambda: clock["seconds"])

        with stages.stage("pruning", {}):
            for _ in stages.progress(range(10), desc="layers", unit="layer"):
                clock["seconds"] += 4
        return screen.getvalue()

    logging.enable_progress_bar()
    yield run
    logging.enable_progress_bar()


def test_without_a_terminal_a_line_is_written_every_ten_seconds(run_stage):
    lines = run_stage(terminal=False).splitlines()

    assert lines == ["Pruning …", "layers: 3 of 10 layers", "layers: 6 of 10 layers", "layers: 9 of 10 layers"]


def test_lines_are_written_above_an_active_bar(run_stage):
    """The Trainer draws a bar during the training."""
    with tqdm(total=2, file=io.StringIO()):
        assert run_stage(terminal=False).startswith("Pruning …\n")


def test_a_bar_on_the_same_screen_is_cleared_before_a_line_and_drawn_again(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(stages.logger, "level", WARNING)
    monkeypatch.setattr(sys, "stderr", screen)

    with tqdm(total=2, desc="training", file=screen):
        stages.say("Removing layers …")

    text_before, text_after = screen.getvalue().split("Removing layers …\n")
    assert text_before.endswith("\r")
    assert text_after.startswith("\rtraining")


def test_a_terminal_has_bars(run_stage):
    output = run_stage(terminal=True)

    assert output.startswith("Pruning …")
    assert "layers: 100%" in output
    assert "of 10 layers" not in output


def test_disabled_bars_disable_the_lines_as_well(run_stage):
    logging.disable_progress_bar()

    assert run_stage(terminal=False) == ""
    assert run_stage(terminal=True) == ""
