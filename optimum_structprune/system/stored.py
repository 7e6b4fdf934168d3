"""Store tensors and text with a hash of their contents, so that damage is noticed when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StructPruneError, one_line
from .fingerprint import json_hash, tensors_hash


# The field of the metadata of a safetensors file that has the settings and the hash.
RECORD = "record"


class DamagedError(StructPruneError):
    """A stored file cannot be read, or differs from the hash of its contents."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings: str = "") -> None:
    """Write tensors from any device to a safetensors file with settings, and a hash of both."""
    copies = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    record = {"settings": settings, "sha256": tensors_hash(copies.items(), settings)}
    # safetensors writes the fields of the metadata in a random order, so there is one.
    save_file(copies, path, metadata={RECORD: json.dumps(record)})


def open_tensors(path: Path) -> tuple[Any, str]:
    """Open a file that `write_tensors` has written, and read it once to compare its hash.

    Returns:
        The file, whose tensors are memory-mapped, and its settings.

    Raises:
        DamagedError: If the file cannot be read, or its contents have changed.
    """
    try:
        file = safe_open(path, framework="pt")
        record = json.loads((file.metadata() or {})[RECORD])
        settings = record["settings"]
        tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
        is_intact = record["sha256"] == tensors_hash(tensors, settings)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read: {one_line(error)}.") from error
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        # The record itself may be damaged.
        raise DamagedError(f"{path} is damaged.") from error
    if not is_intact:
        raise DamagedError(f"{path} is damaged.")
    return file, settings


def line_of(name: str, value: Any) -> str:
    """Return a named JSON value as a line of a file, with its hash.

    A process that was killed may have written only a part of the line before, so the text begins a new line.
    """
    return f"\n{json.dumps([name, value, json_hash([name, value])])}\n"


def read_line(line: bytes) -> tuple[str, Any]:
    """Return the name and the value in a line. Raise `ValueError` if the line is damaged or not complete."""
    parts = json.loads(line)
    if not isinstance(parts, list) or parts[2:] != [json_hash(parts[:2])]:
        raise ValueError("The line is damaged.")
    return parts[0], parts[1]


class TextCache:
    """A cache of batches of text for later runs, in a file whose name is a hash of all dependencies.

    Args:
        kind: The kind of text, which begins the file's name.
        depends_on: All values that the text depends on. They must be JSON values.
    """

    def __init__(self, kind: str, *depends_on: Any):
        name = f"{kind}-batches-{json_hash(depends_on)[:24]}.jsonl"
        self.path = Path(constants.HF_HOME, "structprune", name).expanduser()

    def read(self) -> dict[str, Any]:
        """Read the batches by their names, without those that are damaged."""
        batches: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                with suppress(ValueError):
                    name, batch = read_line(line)
                    batches[name] = batch
        return batches

    def add(self, name: str, batch: Any) -> None:
        """Add a batch to the file.

        Raises:
            StructPruneError: If the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line_of(name, batch))
        except OSError as error:
            raise StructPruneError(
                f"Self-written text cannot be kept in {self.path.parent} ({error}). Set HF_HOME to another folder."
            ) from error
