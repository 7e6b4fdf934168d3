"""Puts a finished result onto the Hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError  # the last one is of httpx
from huggingface_hub.utils import validate_repo_id

from ..errors import StructPruneError, one_line
from ..system.disk import CARD
from ..written import LIST_NAME, is_unchanged, to_json, written_files


# The files of a result that may name folders of this machine.
TEXTS = re.compile(r".+_(config|manifest|report|details)\.json|(report|evaluation).json|.+\.(html|md)")
HOW_TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a result of this package, in one commit, so that the repository never holds half of it.

    The files that were written with the result are uploaded, as they are by then; what else lies in the folder stays
    where it is. The snippet of the model card names the repository, unless the card has been changed. A model card in
    the repository that somebody has written or changed is kept.

    Args:
        folder: The folder of the result.
        repo_id: The repository, `OWNER/NAME`; it is made if need be.
        private: Whether the repository is private; None leaves it as it is, or as the Hub makes new ones.
        token: A token of the Hub; None takes the one that the machine is logged in with.

    Returns:
        The address of the repository.

    Raises:
        StructPruneError: If the folder holds no finished result, the Hub does not take the token or cannot be reached,
            or the repository is public and should be private.
    """
    listed = written_files(Path(folder))
    files = {name: path for name in sorted(listed) if (path := Path(folder, name)).is_file()}
    if "config.json" not in files:
        raise StructPruneError(f"{folder} holds no model that structprune has saved; name the folder of a result.")
    try:
        if CARD in files:
            files[CARD].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StructPruneError(f"{files[CARD]} is no UTF-8 text, which the Hub takes as a card.") from error
    later = f'The result is complete in {folder}; push_to_hub("{folder}", "{repo_id}") in Python pushes it later.'
    with _refusals(repo_id, later):
        api = _api(repo_id, private, token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if CARD in files and _has_card_of_its_own(api, repo_id):
            del files[CARD]
        texts = _without_places(Path(folder), files)
        if CARD in texts:  # its snippet loads the model from the Hub
            texts[CARD] = re.sub(rb'^name = ".*"$', f'name = "{repo_id}"'.encode(), texts[CARD], flags=re.MULTILINE)
        hashes = {name: digest for name, digest in listed.items() if name in files}
        hashes |= {name: sha256(content).hexdigest() for name, content in texts.items()}
        contents: dict[str, bytes | Path] = {**files, **texts, LIST_NAME: to_json({"files": hashes}).encode() + b"\n"}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo_id, operations, commit_message="Upload a pruned model")
    return str(url)


def check_push(repo_id: str, private: bool) -> None:
    """Refuse what could not be pushed, before work is done for it."""
    with _refusals(repo_id, "Nothing has been done yet."):
        _api(repo_id, private)


def _api(repo_id: str, private: bool | None, token: str | None = None) -> HfApi:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise StructPruneError(f"{repo_id!r} names no owner; a repository is OWNER/NAME.")
    token = token or get_token()
    if token is None:
        raise StructPruneError(f"Pushing to {repo_id} takes a token of the Hub: {HOW_TO_LOG_IN}.")
    api = HfApi(token=token)
    api.whoami()
    if private and api.repo_exists(repo_id) and api.model_info(repo_id).private is False:
        raise StructPruneError(f"{repo_id} is public; make it private in its settings, or name another.")
    return api


def _without_places(folder: Path, files: Mapping[str, Path]) -> dict[str, bytes]:
    """Take the folders of this machine out of the records, the page and the card."""
    ours = [name for name in files if TEXTS.fullmatch(name) and (name != CARD or is_unchanged(files[CARD]))]
    texts = {name: files[name].read_bytes().decode(errors="surrogateescape") for name in ours}
    places = {str(Path.home()), str(Path.cwd()), str(folder.absolute().parent), str(folder.resolve().parent)}
    for text in texts.values():
        places |= {str(Path(path).parent) for path in re.findall(r'"(/[^"\n]+)"', text)}
    for name in texts:
        for place in sorted(places - {"/"}, key=len, reverse=True):
            texts[name] = texts[name].replace(f"{place}/", "")
    return {name: text.encode(errors="surrogateescape") for name, text in texts.items()}


@contextmanager
def _refusals(repo_id: str, state: str) -> Iterator[None]:
    """Turn what the Hub refuses inside `with` into a `StructPruneError`."""
    try:
        yield
    except StructPruneError:
        raise
    except HFValidationError as error:
        raise StructPruneError(f"{repo_id!r} is no name of a repository, OWNER/NAME: {one_line(error)}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reasons = {
            401: f"The Hub does not know the token: {HOW_TO_LOG_IN}.",
            403: f"The token may not write to {repo_id}: name a repository of your own, or {HOW_TO_LOG_IN} there.",
        }
        # What stops an upload of weights comes as the cause of a RuntimeError that names the file alone.
        said = (error.__cause__ or error) if isinstance(error, RuntimeError) else error
        code = getattr(getattr(said, "response", None), "status_code", 0)
        reason = reasons.get(code, f"{repo_id} could not be pushed: {one_line(said).rstrip('.')}.")
        raise StructPruneError(f"{reason} {state}") from error


def _has_card_of_its_own(api: HfApi, repo_id: str) -> bool:
    """Is true if the repository has a model card by others, or one that somebody has changed."""
    card = None
    with suppress(EntryNotFoundError):
        card = Path(api.hf_hub_download(repo_id, CARD))
        api.hf_hub_download(repo_id, LIST_NAME)  # to where the card is, which is changed without it
    return card is not None and not is_unchanged(card)
