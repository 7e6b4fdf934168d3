"""How far the work is, for those who look at a terminal and for those who read a log."""

import io
import sys
from logging import WARNING

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging

from optimum_structprune.system import stages


@pytest.fixture
def shown(monkeypatch):
    """What ten steps of four seconds each write in a stage, on a terminal or into a file."""

    def run(terminal):
        screen, seconds = io.StringIO(), iter(range(0, 4000, 4))
        screen.isatty = lambda: terminal
        monkeypatch.setattr(stages.logger, "level", WARNING)  # whatever the command line has set before
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(stages, "perf_counter", lambda: now[0])
        now = [next(seconds)]
        with stages.stage("pruning", {}):
            for _ in stages.progress(range(10), desc="layers", unit="layer"):
                now[0] = next(seconds)
        return screen.getvalue()

    logging.enable_progress_bar()
    yield run
    logging.enable_progress_bar()


def test_without_a_terminal_a_line_comes_after_ten_seconds(shown):
    assert shown(terminal=False).splitlines() == ["Pruning …", *(f"layers: {done} of 10 layers" for done in (3, 6, 9))]


def test_lines_are_written_above_a_bar_that_is_being_drawn(shown):
    with tqdm(total=2, file=io.StringIO()):  # as the Trainer's
        assert shown(terminal=False).startswith("Pruning …\n")


def test_a_bar_on_the_same_screen_is_cleared_before_a_line_and_drawn_again(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(stages.logger, "level", WARNING)
    monkeypatch.setattr(sys, "stderr", screen)

    with tqdm(total=2, desc="training", file=screen):
        stages.say("Removing layers …")

    before, after = screen.getvalue().split("Removing layers …\n")
    assert before.endswith("\r") and after.startswith("\rtraining")


def test_a_terminal_has_bars_and_who_wants_none_has_neither(shown):
    text = shown(terminal=True)
    assert text.startswith("Pruning …") and "layers: 100%" in text and "of 10 layers" not in text
    logging.disable_progress_bar()
    assert shown(terminal=False) == shown(terminal=True) == ""
