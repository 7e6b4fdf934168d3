"""What is made in the background is what was asked for, one thing at a time, and errors come out."""

import gc
import threading
import weakref

import pytest

from optimum_structprune.system.offloading import Prefetch


class Thing:
    def __init__(self, number):
        self.number = number


def test_what_was_begun_is_made_once_and_in_another_thread():
    made = []

    def make(number):
        made.append((number, threading.current_thread() is threading.main_thread()))
        return Thing(number)

    ahead = Prefetch(make)
    assert ahead.take(0).number == 0
    ahead.begin(1)
    assert ahead.take(5).number == 5 and ahead.take(1).number == 1 and ahead.take(1).number == 1
    assert sorted(made) == [(0, True), (1, False), (1, True), (5, True)]


def test_one_thing_is_alive_beside_the_one_in_use():
    alive = weakref.WeakSet()
    most = []

    def make(number):
        gc.collect()
        thing = Thing(number)
        alive.add(thing)
        most.append(len(alive))
        return thing

    ahead = Prefetch(make)
    for number in range(6):
        used = ahead.take(number)
        ahead.begin(number + 1)
        assert used.number == number
    ahead.begin(3)
    ahead.drop()
    del used
    gc.collect()
    assert max(most) == 2 and not alive


def test_an_error_is_raised_where_the_thing_is_taken():
    def make(number):
        raise OSError(f"{number} cannot be read")

    ahead = Prefetch(make)
    ahead.begin(2)
    with pytest.raises(OSError, match="2 cannot be read"):
        ahead.take(2)
    ahead.begin(3)
    ahead.drop()  # nobody asks for it
