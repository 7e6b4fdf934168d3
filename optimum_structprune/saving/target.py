"""Where a result may go: what may be replaced there, and whether there is room."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import StructPruneError, some_of
from ..record.text import readable_size
from .ranks import is_first_rank


EXPORT_NAME = "structprune_export.json"
# Files that only this package writes, and fields that each of them has.
MARKERS: Mapping[str, frozenset[str]] = {
    "structprune_config.json": frozenset({"criterion", "refit"}),
    "pruning_plan.json": frozenset({"model_type", "keep"}),
    "recovery_config.json": frozenset({"tokens", "lora"}),
    "statistics.json": frozenset({"model_type", "domains", "files"}),
    "teacher_logits.json": frozenset({"top_k", "shards"}),
    EXPORT_NAME: frozenset({"form"}),
}
# Files that this package, transformers and peft write into a result; whatever else lies there is the user's.
WRITTEN = re.compile(
    r".+\.(json|safetensors|jinja|model|py|gguf)|report\.html|(vocab|merges)\.txt|\.gitattributes|training_args\.bin"
)
WRITTEN_FOLDERS = ("additional_chat_templates", "__pycache__", ".cache")
# The first entry of a GGUF file that this package wrote, among the first bytes of the file.
GGUF_MARK, GGUF_HEAD = "structprune.version", 512
CARD = "README.md"
SIGNATURE = "\n<!-- Written by optimum-structprune; the SHA-256 of all above is {}. -->\n"
SIGNED = re.compile(re.escape(SIGNATURE).replace(r"\{\}", r"(\w{64})") + r"\Z")
# The fields of configs that name files and folders, beside the sources of text.
READ_OR_KEPT = ("stats", "losses_dir", "checkpoint_dir", "teacher_logits", "arch_file", "presets_file")
ADAPTER = "adapter_config.json"
# What temporary folders beside a result are for: one that is being written, a former one that is being replaced, and
# weights that do not fit into memory.
SAVING, OLD, OFFLOAD = LEFTOVERS = ("saving", "old", "offload")


def resolved(target: str | Path) -> Path:
    """The absolute path that a name leads to, over all links."""
    try:
        return Path(target).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StructPruneError(f"{str(target)!r} cannot be written: {error}.") from error


def check_target(target: str | Path, overwrite: bool, used: Iterable[str | Path | None] = ()) -> None:
    """Refuse a folder that must not be written to.

    A folder that holds something is replaced only if this package wrote it: one of its own records is in it, and
    nothing that the package does not write. It is never replaced if it is, holds or lies in what the run reads. Of
    several processes, the first one decides.
    """
    if not is_first_rank():
        return
    folder = resolved(target)
    try:
        if folder.exists() and not folder.is_dir():
            raise StructPruneError(f"{target} is a file; name a folder.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not overwrite:
            raise StructPruneError(
                f"The folder {target} exists and is not empty; choose another or allow overwriting."
            )
        _check_replaceable(folder, used)
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written to: {error}") from error


def _check_replaceable(folder: Path, used: Iterable[str | Path | None]) -> None:
    for name in used:
        if name and (relation := _relation(folder, name)):
            raise StructPruneError(
                f"{folder} {relation} {name}, which this run reads, so it is not overwritten; {_lost(folder)}. "
                "Name another output folder."
            )
    if not is_result(folder):
        raise StructPruneError(
            f"{folder} is no result of structprune, so it is not overwritten; {_lost(folder)}. Name another output "
            "folder, or remove this one yourself."
        )
    if foreign := sorted(foreign_entries(folder)):
        raise StructPruneError(
            f"{folder} holds what structprune did not write ({some_of(foreign)}), so it is not overwritten; "
            f"{_lost(folder)}. Move it elsewhere, or name another output folder."
        )


def check_file(target: str | Path, overwrite: bool) -> None:
    """Refuse a GGUF file that must not be written."""
    file = resolved(target)
    try:
        if file.is_dir():
            raise StructPruneError(f"{target} is a folder; name a file in it, such as {Path(target) / 'model.gguf'}.")
        if not file.exists():
            return
        if not overwrite:
            raise StructPruneError(f"The file {target} exists; choose another or allow overwriting.")
        with open(file, "rb") as opened:
            ours = GGUF_MARK.encode() in opened.read(GGUF_HEAD)
        if not ours:
            raise StructPruneError(
                f"{file} is no GGUF file of structprune, so it is not overwritten "
                f"({readable_size(file.stat().st_size)} would be lost). Name another file, or remove this one."
            )
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written to: {error}") from error


def is_result(folder: Path) -> bool:
    """Whether this package wrote a folder: it holds one of `MARKERS` with the fields that belong there."""
    return any(fields <= _fields(folder / name) for name, fields in MARKERS.items())


def foreign_entries(folder: Path) -> Iterator[str]:
    """The names of what lies in a result and was not written with it."""
    adapter = (folder / ADAPTER).is_file()
    for path in folder.iterdir():
        if path.is_dir() and (path.is_symlink() or path.name not in WRITTEN_FOLDERS):
            yield path.name
        elif path.name == CARD and (adapter or is_signed(path)):
            continue  # peft writes one beside an adapter
        elif not path.is_dir() and not WRITTEN.fullmatch(path.name):
            yield path.name


def signed(text: str) -> str:
    """A text with a last line by which it is known as this package's, as long as nobody changes it."""
    body = SIGNED.sub("", text)
    return body + SIGNATURE.format(sha256(body.encode()).hexdigest())


def is_signed(path: Path) -> bool:
    """Whether a file holds what `signed` gave, unchanged."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return SIGNED.search(text) is not None and signed(text) == text


def used_paths(*configs: Any) -> list[str]:
    """The files and folders that configs name, for `check_target`: text, statistics, checkpoints and the like."""
    names: list[Any] = []
    for config in filter(None, configs):
        names += [domain.source for domain in getattr(config, "domains", None) or ()]
        names += [getattr(config, name, None) for name in READ_OR_KEPT]
        names += [(getattr(config, "training", None) or {}).get("output_dir")]
        names += used_paths(getattr(config, "recovery", None))
    paths = [os.path.expanduser(name) for name in names if isinstance(name, (str, Path))]
    return [match for path in paths for match in (glob(path, recursive=True) if "*" in path else [path])]


def check_apart(target: str | Path, *configs: Any) -> None:
    """Refuse an output folder in which the run would write something else: the result replaces all of it."""
    folder = resolved(target)
    for config in filter(None, configs):
        training = getattr(config, "training", None) or {}
        names = {name: getattr(config, name, None) for name in ("losses_dir", "checkpoint_dir", "teacher_logits")}
        for name, path in {**names, "output_dir": training.get("output_dir")}.items():
            if path and folder in (resolved(path), *resolved(path).parents):
                raise StructPruneError(f"{name} {path} lies in the output folder {target}; name a folder beside it.")
        check_apart(target, getattr(config, "recovery", None))


def remove_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints that a training left in a folder, and the folder if nothing else is in it."""
    for path in [*Path(folder).glob("checkpoint-*"), *Path(folder).glob("round-*/checkpoint-*")]:
        if (path / "trainer_state.json").is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in [*Path(folder).glob("round-*"), Path(folder)]:
        with suppress(OSError):  # it is not there, or not empty
            path.rmdir()


def probe_target(target: str | Path, need_bytes: int = 0) -> None:
    """Refuse a folder that could not be written to the end, before work is done for it."""
    if not is_first_rank():
        return
    folder = resolved(target)
    try:
        if os.path.ismount(folder):
            raise StructPruneError(
                f"{target} is where a file system is mounted, so it cannot be replaced in one step; name a folder "
                "inside it."
            )
        parent = next(path for path in folder.parents if path.exists())
        if not parent.is_dir():
            raise StructPruneError(f"{target} cannot be made: {parent} is a file; name another output folder.")
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.{SAVING}.", dir=parent)).rmdir()
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written: {error.strerror or error}.") from error
    if need_bytes > free:
        raise StructPruneError(
            f"{target} takes about {readable_size(need_bytes)}, and {parent} has {readable_size(free)} left; name "
            "another output folder, or make room."
        )


def probe_folder(folder: str | Path) -> None:
    """Refuse a folder in which no file could be written, before work is done for it."""
    if not is_first_rank():
        return
    try:
        path = resolved(folder)
        nearest = next(place for place in (path, *path.parents) if place.exists())
        if not nearest.is_dir():
            raise StructPruneError(f"{folder} cannot be made: {nearest} is a file; name another folder.")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StructPruneError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _fields(path: Path) -> set[str]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(data) if isinstance(data, dict) else set()


def _relation(folder: Path, name: str | Path) -> str:
    """How a folder lies to something that is read: it `is`, `holds` or `lies in` it; empty if it does neither."""
    try:
        written = Path(os.path.abspath(os.path.expanduser(name)))
        if not written.exists():
            return ""
        # A link counts at its own place too: with the folder it would go.
        for path in (written.resolve(), written):
            if path == folder:
                return "is"
            if folder in path.parents:
                return "holds"
            if path in folder.parents and path != Path(path.anchor):
                return "lies in"
    except (OSError, ValueError, RuntimeError):  # a text that is no path
        pass
    return ""


def _lost(folder: Path) -> str:
    """What a folder holds, in words."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    size = sum(path.lstat().st_size for path in files)
    return f"{len(files):,} file{'' if len(files) == 1 else 's'} ({readable_size(size)}) would be lost"
