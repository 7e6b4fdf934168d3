"""Upload a result to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..errors import StructPruneError, one_line
from ..system.disk import CARD
from ..written import LIST_NAME, replace_text, written_files


HOW_TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a result of this package in one commit.

    Only the files that were written with the result are uploaded. The snippet of the model card is changed, so that it
    loads the model from the repository.

    Args:
        folder: The folder of the result.
        repo_id: The repository, `OWNER/NAME`. It is created if it does not exist.
        private: Whether the repository is private. None keeps the setting of the repository or the default of the Hub.
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
    later = f'The result is complete in {folder}; push_to_hub("{folder}", "{repo_id}") in Python pushes it later.'
    with _refusals(repo_id, later):
        api = _api(repo_id, private, token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        _name_repository(folder / CARD, repo_id)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*files, LIST_NAME],
            commit_message="Upload a pruned model",
        )
    return str(url)


def check_push(repo_id: str, private: bool) -> None:
    """Raise if a result could not be pushed, before there is one."""
    with _refusals(repo_id, "Nothing has been done yet."):
        _api(repo_id, private)


def _name_repository(card: Path, repo_id: str) -> None:
    """Let the snippet of a model card load the model from a repository."""
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        replace_text(card, re.sub(r'^name = ".*"$', f'name = "{repo_id}"', text, flags=re.MULTILINE))


def _api(repo_id: str, private: bool | None, token: str | None = None) -> HfApi:
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
    """Convert errors of the Hub inside `with` to `StructPruneError`."""
    try:
        yield
    except StructPruneError:
        raise
    except HFValidationError as error:
        raise StructPruneError(f"{repo_id!r} is not a repository, OWNER/NAME: {one_line(error)}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload of weights that fails raises a RuntimeError, whose cause says why.
        cause: Exception = error
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            cause = error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if status == 401:
            reason = f"The Hub does not know the token: {HOW_TO_LOG_IN}."
        elif status == 403:
            reason = (
                f"The token may not write to {repo_id}: choose a repository of your own, or {HOW_TO_LOG_IN} there."
            )
        else:
            reason = f"{repo_id} could not be pushed: {one_line(cause).rstrip('.')}."
        raise StructPruneError(f"{reason} {state}") from error
