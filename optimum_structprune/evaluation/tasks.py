"""Scores of embedding models in tasks of MTEB (Muennighoff et al. 2022, arXiv 2210.07316), which its package runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from ..errors import StructPruneError


def check_tasks(names: Sequence[str]) -> None:
    """Refuse tasks where the packages that run them are not installed, and those that MTEB does not have."""
    if lacking := [package for package in ("mteb", "sentence_transformers") if find_spec(package) is None]:
        raise StructPruneError(
            f"MTEB takes the packages mteb and sentence-transformers, and {' and '.join(lacking)} cannot be found: "
            "pip install mteb sentence-transformers."
        )
    import mteb

    try:
        mteb.get_tasks(tasks=[*names])
    except KeyError as error:
        raise StructPruneError(f"MTEB has no such task: {str(error.args[0]).removeprefix('KeyError: ')}") from error


def task_scores(
    models: Mapping[str, str], names: Sequence[str], device: str, trust_remote_code: bool = False
) -> dict[str, dict[str, float]]:
    """Give the main score of each task by the names of models, which sentence-transformers loads from their folders.

    The text of a task comes from the Hub or its cache.
    """
    import mteb
    from sentence_transformers import SentenceTransformer

    scores: dict[str, dict[str, float]] = {}
    for model, path in models.items():
        encoder = SentenceTransformer(path, device=device, trust_remote_code=trust_remote_code)
        for result in mteb.evaluate(encoder, mteb.get_tasks(tasks=[*names]), cache=None).task_results:
            scores.setdefault(result.task_name, {})[model] = float(result.get_score())
    return scores
