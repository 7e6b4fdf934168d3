"""Save checkpoints of a run, so that the same call resumes after the run was killed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .errors import StructPruneError
from .fingerprint import json_hash
from .processes import process_count, process_index, wait_for_all
from .stored import open_tensors, write_tensors
from .written import replace_text


@dataclass(frozen=True)
class Saved:
    """The state of a checkpoint.

    Attributes:
        number: The number of finished layers.
        values: JSON values.
        local: The tensors of this process.
    """

    number: int
    values: dict[str, Any]
    local: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Resume:
    """The checkpoints of one stage of a run.

    Attributes:
        folder: The checkpoint directory.
        key: The identity of the run. A checkpoint of another run is refused.
        kind: The name of the stage, which begins the names of its files.
    """

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
        """Save a checkpoint. All processes call this.

        Args:
            number: The number of finished layers.
            values: JSON values.
            tensors: The tensors of the last layer. The main process saves them, and they are kept.
            local: The tensors of each process. They replace the tensors of the previous checkpoint.

        Raises:
            StructPruneError: If the checkpoint cannot be written. The previous checkpoint is intact.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if local is not None:
                write_tensors(self._local_path(number), local)
            wait_for_all()

            if process_index() == 0:
                if tensors is not None:
                    write_tensors(self._shared_path(number), tensors)
                self._write_state(number, values, has_local=local is not None)
            wait_for_all()

            self._remove_previous(number)
        except (OSError, SafetensorError) as error:
            stage = self.kind.partition("-")[0].capitalize()
            raise StructPruneError(
                f"{stage} {number} could not be saved to {self.folder}: {error}. The previous checkpoint is intact. "
                "Run the same command again to resume."
            ) from error

    def load(self) -> Saved | None:
        """Return the last checkpoint, or None without one. All processes call this."""
        state = self.check()
        saved = None

        if state is not None:
            number = int(state["number"])
            local = {}
            with self.readable():
                if state["processes"] is not None:
                    local = _read(self._local_path(number))
                saved = Saved(number, dict(state["values"]), local)

        # The main process must not save the next checkpoint before all processes have read this one.
        wait_for_all()
        return saved

    def check(self) -> dict[str, Any] | None:
        """Return the description of the last checkpoint, or None without one.

        Raises:
            StructPruneError: If the checkpoint is of another run or of another number of processes, or is damaged.
        """
        if not self.state.exists():
            return None

        with self.readable():
            state = json.loads(self.state.read_text(encoding="utf-8"))
            if state.pop("sha256") != json_hash(state):
                raise ValueError(f"{self.state} is damaged")
            key = state["key"]
            number = int(state["number"])
            processes = state["processes"]

        checkpoint = f"{self.folder} contains {self.kind} {number} of a run with"
        if key != self.key:
            raise StructPruneError(
                f"{checkpoint} another model, config or calibration text. Choose another folder, or remove this one."
            )
        if processes not in (None, process_count()):
            raise StructPruneError(
                f"{checkpoint} {processes} processes, and this run has {process_count()}. Start {processes} processes."
            )
        return state

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a finished layer."""
        with self.readable():
            return _read(self._shared_path(number))

    @property
    def state(self) -> Path:
        """Return the path of the file that describes the last checkpoint."""
        return self.folder / f"{self.kind}.json"

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Convert errors of damaged files into a `StructPruneError` that names the file."""
        try:
            yield
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StructPruneError(
                f"{self.state} is not a readable checkpoint ({error}). Remove it to start again."
            ) from error

    def _write_state(self, number: int, values: Mapping[str, Any], has_local: bool) -> None:
        """Write the description of a checkpoint, which makes it valid."""
        state: dict[str, Any] = {"key": self.key, "number": number, "values": values, "processes": None}
        if has_local:
            state["processes"] = process_count()
        # `replace_json` refuses infinity, and a loss may be infinite. The hash is that of the state as it is read.
        state = json.loads(json.dumps(state))
        replace_text(self.state, json.dumps(state | {"sha256": json_hash(state)}))

    def _remove_previous(self, number: int) -> None:
        """Remove the tensors that this process saved in previous checkpoints."""
        own_file = re.compile(rf"{self.kind}-\d+-{process_index()}-of-{process_count()}\.safetensors")

        for path in list(self.folder.iterdir()):
            if own_file.fullmatch(path.name) and path != self._local_path(number):
                path.unlink()

    def _shared_path(self, number: int) -> Path:
        """Return the file of the tensors that all processes share."""
        return self.folder / f"{self.kind}-{number}.safetensors"

    def _local_path(self, number: int) -> Path:
        """Return the file of the tensors of this process."""
        return self.folder / f"{self.kind}-{number}-{process_index()}-of-{process_count()}.safetensors"


def _read(path: Path) -> dict[str, Tensor]:
    file, _ = open_tensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}
