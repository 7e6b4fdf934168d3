"""Keeps the state of a run on disk, so that the same call goes on from there after a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import StructPruneError
from ..written import replace_text
from .processes import process_count, process_index, wait_for_all


@dataclass(frozen=True)
class Saved:
    """Holds the number of finished layers, values as JSON has them, and the tensors of this process."""

    number: int
    values: dict[str, Any]
    local: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Resume:
    """A folder that remembers how far a run, told by `key`, has come with one kind of work."""

    folder: Path
    key: str
    kind: str

    def save(
        self,
        number: int,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        local: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep what `number` layers have reached: `tensors` of the last one, and `local` ones of each process."""
        processes = None if local is None else process_count()
        state = {"key": self.key, "number": number, "values": values, "processes": processes}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if local is not None:
                _write(self._local(number), local)
            wait_for_all()
            if process_index() == 0:
                if tensors is not None:
                    _write(self._shared(number), tensors)
                # Not `replace_json`, which has no word for infinity: a loss may be infinite.
                replace_text(self.state, json.dumps(state))
            wait_for_all()
            ours = re.compile(rf"{self.kind}-\d+-{process_index()}-of-{process_count()}\.safetensors")
            for path in [*self.folder.iterdir()]:
                if ours.fullmatch(path.name) and path != self._local(number):
                    path.unlink()
        except (OSError, SafetensorError) as error:
            layer = f"{self.kind.partition('-')[0].capitalize()} {number}"
            reason = f"{layer} could not be saved to {self.folder}: {error}"
            raise StructPruneError(f"{reason}. What was saved before is intact; the same call goes on.") from error

    def load(self) -> Saved | None:
        """Read what was saved last; None if nothing was."""
        state = self.check()
        saved = None
        if state is not None:
            number = int(state["number"])
            with self.readable():
                local = {} if state["processes"] is None else load_file(self._local(number))
                saved = Saved(number, dict(state["values"]), local)
        wait_for_all()  # before the first process writes again
        return saved

    def check(self) -> dict[str, Any] | None:
        """Read the description of what was saved last, None if nothing was; another run's is refused."""
        if not self.state.exists():
            return None
        with self.readable():
            state = json.loads(self.state.read_text(encoding="utf-8"))
            key, number, processes = state["key"], int(state["number"]), state["processes"]
        holds, count = f"{self.folder} holds {self.kind} {number} of a run with", process_count()
        if key != self.key:
            raise StructPruneError(f"{holds} another model, config or calibration text; name another, or remove it.")
        if processes not in (None, count):
            raise StructPruneError(f"{holds} {processes} processes, this run has {count}; start {processes}.")
        return state

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Read the tensors that were saved with a number."""
        with self.readable():
            return load_file(self._shared(number))

    @property
    def state(self) -> Path:
        """Name the file that describes the last state."""
        return self.folder / f"{self.kind}.json"

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Turn any error of a damaged file inside `with` into one that names it."""
        try:
            yield
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            message = f"{self.state} is not a readable checkpoint ({error}); remove it to start anew."
            raise StructPruneError(message) from error

    def _shared(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number}.safetensors"

    def _local(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number}-{process_index()}-of-{process_count()}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
