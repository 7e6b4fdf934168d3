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
    """Return a function that returns the output of a stage of ten steps of four seconds each.

    A step of `seconds` runs inner iterations of as many seconds, and `options` are options of `progress`.
    """

    def run(terminal, seconds=0, **options):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        # The command line may have set another level in this process.
        monkeypatch.setattr(stages.logger, "level", WARNING)
        monkeypatch.setattr(sys, "stderr", screen)
        clock = {"seconds": 0}
        monkeypatch.setattr(stages, "perf_counter", lambda: clock["seconds"])

        with stages.stage("pruning", {}):
            for _ in stages.progress(range(10), unit="layer", mininterval=0, **options):
                for _ in stages.progress(range(seconds), desc="inner"):
                    clock["seconds"] += 1
                clock["seconds"] += 4
        return screen.getvalue()

    logging.enable_progress_bar()
    yield run
    logging.enable_progress_bar()


def test_without_a_terminal_a_line_is_written_every_ten_seconds(run_stage):
    lines = run_stage(terminal=False, desc="layers").splitlines()

    assert lines == [
        "Pruning …",
        "layers: 3 of 10 layers, about 28 s left",
        "layers: 6 of 10 layers, about 16 s left",
        "layers: 9 of 10 layers, about 4 s left",
    ]


@pytest.mark.parametrize(("seconds", "inner_lines"), [(6, 0), (12, 10), (25, 20)])
def test_inner_iterations_write_lines_only_if_they_are_slow(seconds, inner_lines, run_stage):
    """Otherwise their lines would take the place of the lines of the outer iteration."""
    labels = [line.partition(":")[0] for line in run_stage(False, seconds).splitlines()]
    assert labels.count("inner") == inner_lines
    assert labels.count("Pruning") == 9, "the tenth layer is the last one"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_label_is_the_announcement_of_the_stage_and_a_note_follows(terminal, run_stage):
    output = run_stage(terminal, note=lambda: "KL 0.25")
    assert "Pruning: " in output
    assert "KL 0.25" in output


def test_a_stage_is_announced_again_after_another_stage(monkeypatch):
    lines = []
    monkeypatch.setattr(stages, "say", lines.append)
    seconds = {}
    for name in ("perplexity", "perplexity", "vocabulary", "perplexity", "measuring C4"):
        with stages.stage(name, seconds):
            pass
    assert lines == ["Measuring the model …", "Choosing tokens …", "Measuring the model …", "Measuring C4 …"]


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
    output = run_stage(terminal=True, desc="layers")

    assert output.startswith("Pruning …")
    assert "layers: 100%" in output
    assert "of 10 layers" not in output


def test_disabled_bars_disable_the_lines_as_well(run_stage):
    logging.disable_progress_bar()

    assert run_stage(terminal=False) == ""
    assert run_stage(terminal=True) == ""
