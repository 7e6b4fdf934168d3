"""Writes a folder so that it appears only once everything in it has been written."""

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
    """Give a temporary folder beside the target, and move it into place if everything inside `with` goes well.

    Args:
        folder: The target; folders above it are made if need be.
        overwrite: Whether a folder that exists is replaced.

    Raises:
        StructPruneError: If the folder exists, or something cannot be written; what was there before stays.
    """
    target = Path(folder).resolve()  # a link keeps pointing to the folder
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
    """Refuse a folder that must not be written to.

    Args:
        target: The folder.
        overwrite: Whether a folder that exists may be replaced.

    Raises:
        StructPruneError: If the folder is not empty and `overwrite` is off, or the target is a file.
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
    former = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(former)
        staging.rename(target)
    except OSError:
        if target.exists():
            former.rmdir()
        else:
            former.rename(target)
        raise
    shutil.rmtree(former)
