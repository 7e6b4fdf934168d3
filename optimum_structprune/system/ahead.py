"""What will be needed next, made in the background."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar, cast


T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes the next of several numbered things in a thread, while the one before it is used.

    No more than one is made or waiting at any time, and a thread is there only while one is made.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._number: int | None = None
        self._thread: Thread | None = None
        self._made: T | None = None
        self._error: BaseException | None = None

    def begin(self, number: int) -> None:
        """Begin to make a thing; what was made and not taken is let go."""
        self.drop()
        self._number, self._thread = number, Thread(target=self._run, args=(number,), name=f"ahead-{number}")
        self._thread.start()

    def take(self, number: int) -> T:
        """A thing, which is made now unless it was begun. What was begun of another number stays where it is."""
        if number != self._number:
            return self._make(number)
        self._wait()
        made, error = self._made, self._error
        self.drop()
        if error is not None:
            raise error
        return cast("T", made)

    def drop(self) -> None:
        """Let go of what was begun, once its thread has ended."""
        self._wait()
        self._number = self._made = self._error = None

    def _run(self, number: int) -> None:
        try:
            self._made = self._make(number)
        except BaseException as error:  # `take` raises it where somebody waits for it
            self._error = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
