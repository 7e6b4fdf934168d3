"""A folder appears only when it is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import StructPruneError


@contextmanager
def staged(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside the target, moved into place once everything inside `with` has gone well.

    Args:
        folder: The target.
        overwrite: Replace a folder that exists.

    Raises:
        StructPruneError: If the folder exists, or something cannot be written.
    """
    target = Path(folder)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _swap(staging, target)
    except (OSError, SafetensorError) as error:
        raise StructPruneError(f"{target} could not be written, and what was there is as it was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Refuse to write over something.

    Raises:
        StructPruneError: If the folder exists and `overwrite` is off, or it is a file.
    """
    target = Path(target)
    if target.is_file():
        raise StructPruneError(f"{target} is a file; name a folder.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise StructPruneError(f"The folder {target} exists and is not empty; choose another or allow overwriting.")


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
