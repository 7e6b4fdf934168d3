"""Answers of models to the same questions. An item is one question, `{"kind": …, "prompt": …, "answers": {"dense":
{"text": …, "right": …}, "pruned": …}}`, the models in the order dense, pruned, recovered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import comb
from typing import Any

import torch

from ..forward.metrics import margin_of_share


Items = Sequence[Mapping[str, Any]]
HELPS = "train the model (--recover), remove tokens in place of channels (--target vocab), or remove less"


def mcnemar(better: int, worse: int) -> float:
    """Gives the probability of such a difference between models that are alike (McNemar's exact test)."""
    apart = better + worse
    tail = sum(comb(apart, wins) for wins in range(min(better, worse) + 1)) / 2**apart
    return min(1.0, 2 * tail)


def paired(items: Items, name: str) -> dict[str, Any]:
    """Compare a figure (`right`, `loops` or `stopped`) of the last model with the first one's, on the same items.

    The result has the mean difference with its margin of error, the numbers of items for which the figure holds of the
    last model alone (`more`) and of the first alone (`less`), `mcnemar`'s probability, and `worse`, `better`, or
    `alike` above 0.05.
    """
    both = [[float(answer[name]) for answer in item["answers"].values()] for item in items]
    differences = torch.tensor([values[-1] - values[0] for values in both], dtype=torch.float64)
    more, less = int((differences > 0).sum()), int((differences < 0).sum())
    p_value, is_better = mcnemar(more, less), (more > less) is not (name == "loops")
    verdict = "alike" if p_value >= 0.05 else "better" if is_better else "worse"
    counted = {"items": len(both), "more": more, "less": less, "p_value": p_value, "verdict": verdict}
    return {"difference": float(differences.mean()), "margin": margin_of_share(differences), **counted}


def outcome(answer: Mapping[str, Any]) -> str:
    """Right or wrong, and what else is the matter with an answer."""
    troubles = ["loops"] * answer["loops"] + ["cut off"] * (not answer["stopped"])
    return ", ".join(["right" if answer["right"] else "wrong", *troubles])


def as_lines(item: Mapping[str, Any]) -> str:
    """A question, and what each model answers, as lines of text."""
    by_model = item["answers"].items()
    answers = [f"  {name} ({outcome(answer)}): {' '.join(answer['text'].split())}" for name, answer in by_model]
    return "\n".join([f"{item['kind']}: {' '.join(item['prompt'].split())}", *answers])


def counts(items: Items, name: str) -> list[int]:
    """Counts the answers of each model that are `right`, `loops` or `stopped`."""
    by_item = ([answer[name] for answer in item["answers"].values()] for item in items)
    return [sum(by_model) for by_model in zip(*by_item, strict=True)]


def remark(items: Items) -> list[str]:
    """The answers in a line, and a warning where the last model errs or loops more than the first; none of none."""
    if not items:
        return []
    verbs = {"right": "right", "loops": "loop", "stopped": "stop by themselves"}
    shown = [f"{' → '.join(map(str, counts(items, name)))} {verb}" for name, verb in verbs.items()]
    line = f"answers to {len(items)} short questions ({' → '.join(items[0]['answers'])}): {', '.join(shown)}"
    verbs = {"right": "errs", "loops": "loops"}
    worse = [verb for name, verb in verbs.items() if paired(items, name)["verdict"] == "worse"]
    return [line, *([f"warning: the model {' and '.join(worse)} clearly more; {HELPS}"] if worse else [])]


def sample_items(items: Items, count: int = 3) -> list[Mapping[str, Any]]:
    """A few items of different outcomes in turn: what the last model has lost, kept, never had and gained."""
    groups: dict[tuple[bool, bool], list[Mapping[str, Any]]] = {
        pair: [] for pair in ((True, False), (True, True), (False, False), (False, True))
    }
    for item in items:
        rights = [answer["right"] for answer in item["answers"].values()]
        groups[rights[0], rights[-1]].append(item)
    in_turn = [item for turn in zip_longest(*groups.values()) for item in turn if item is not None]
    return in_turn[:count]
