"""Upload a result to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..system.disk import CARD
from ..system.errors import StructPruneError, one_line
from ..system.written import LIST_NAME, replace_text, written_files


HOW_TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a result of this package in one commit.

    Only the files that were written with the result are uploaded. The snippet of the model card is changed to load the
    model from the repository.

    Args:
        folder: The folder of the result.
        repo_id: The repository, `OWNER/NAME`. It is created if it does not exist.
        private: Whether the repository is private. None keeps the setting of the repository, or the default of the Hub
            for a new one.
        token: A token of the Hub. None uses the token of the login.

    Returns:
        The address of the repository.

    Raises:
        StructPruneError: If the folder holds no finished result, the Hub refuses the token or cannot be reached, or
            the repository is public and `private` is True.
    """
    folder = Path(folder)
    files = written_files(folder)
    if "config.json" not in files:
        raise StructPruneError(f"{folder} holds no model that structprune has saved. Pass the folder of a result.")

    state = f'The result is complete in {folder}; push_to_hub("{folder}", "{repo_id}") in Python pushes it later.'
    patterns = list(files)
    patterns.append(LIST_NAME)

    with _refusals(repo_id, state):
        api = _api(repo_id, private, token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        _name_repository(folder / CARD, repo_id)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message="Upload a pruned model",
        )

    return str(url)


def check_push(repo_id: str, private: bool) -> None:
    """Raise `StructPruneError` if a result could not be pushed. Call this before the run."""
    with _refusals(repo_id, "Nothing has been done yet."):
        _api(repo_id, private)


def _name_repository(card: Path, repo_id: str) -> None:
    """Change the snippet of a model card to load the model from a repository."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    replace_text(card, re.sub(r'^name = ".*"$', f'name = "{repo_id}"', text, flags=re.MULTILINE))


def _api(repo_id: str, private: bool | None, token: str | None = None) -> HfApi:
    """Return a client of the Hub, after a check of the repository and the token."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise StructPruneError(f"{repo_id!r} has no owner. A repository is OWNER/NAME.")

    token = token or get_token()
    if token is None:
        raise StructPruneError(f"Pushing to {repo_id} needs a token of the Hub: {HOW_TO_LOG_IN}.")

    api = HfApi(token=token)
    api.whoami()
    if private and api.repo_exists(repo_id) and api.model_info(repo_id).private is False:
        raise StructPruneError(f"{repo_id} is public. Make it private in its settings, or choose another repository.")
    return api


@contextmanager
def _refusals(repo_id: str, state: str) -> Iterator[None]:
    """Convert errors of the Hub inside `with` to `StructPruneError`.

    Args:
        repo_id: The repository.
        state: The last sentence of the error: the state of the result.
    """
    try:
        yield
    except StructPruneError:
        raise
    except HFValidationError as error:
        raise StructPruneError(f"{repo_id!r} is not a repository, OWNER/NAME: {one_line(error)}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise StructPruneError(f"{_reason(error, repo_id)} {state}") from error


def _reason(error: Exception, repo_id: str) -> str:
    """Return the reason why the Hub refused a request, and how to fix it."""
    # If the upload of weights fails, the error is a RuntimeError whose cause has the reason.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 401:
        return f"The Hub does not know the token: {HOW_TO_LOG_IN}."
    if status == 403:
        return f"The token may not write to {repo_id}: choose a repository of your own, or {HOW_TO_LOG_IN} there."
    return f"{repo_id} could not be pushed: {one_line(error).rstrip('.')}."
