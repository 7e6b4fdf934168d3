"""Make pairs for the recovery of an encoder, and measure its retrieval and speed, also in int8.

    python examples/benchmarks/benchmark_encoders.py pairs DATA pairs.jsonl
    python examples/benchmarks/benchmark_encoders.py measure DATA ORIGINAL MODEL …

The pairs come from the calibration text of DATA. The retrieval is measured on text that the recovery has not read.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from sentence_transformers import SentenceTransformer


SENTENCE = re.compile(r"(?<=[.!?])\s+")
DEFINITION = re.compile(r"(.{3,60}?) (is|are|was|were) ((?:an?|the) [^.,;]{5,150})")
TURN = re.compile(r"User: (.+)\nAssistant: (.+)")
REPEATS = 5
Pair = tuple[str, str]


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def training_pairs(data: Path) -> Iterator[Pair]:
    """Yield definitions of the encyclopedia, turns of dialogues and problems as questions with answers."""
    for text in texts_of(data / "calibration/wiki.jsonl"):
        found = DEFINITION.match(text)
        if found:
            yield f"What {found[2]} {found[1]}?", found[3]

    for text in texts_of(data / "calibration/dialogue.jsonl"):
        yield from TURN.findall(text)[:2]

    for text in texts_of(data / "calibration/math.jsonl")[:300]:
        question, _, answer = text.partition("\n")
        if answer:
            yield question, answer


def first_sentences(texts: list[str]) -> list[Pair]:
    """Return the first sentence of each text with the rest of it."""
    pairs = []
    for text in texts:
        first, *rest = SENTENCE.split(text.strip(), maxsplit=1)
        if rest:
            pairs.append((first, rest[0]))
    return pairs


def measured_pairs(data: Path) -> dict[str, list[Pair]]:
    """Return the pairs that measure the retrieval, by kind. No pair may choose a setting."""
    questions = []
    for name in ("arc_easy", "openbookqa"):
        for line in (data / f"tasks/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
            row = json.loads(line)
            questions.append((row["query"].removeprefix("Question: "), row["choices"][row["gold"]]))

    web = texts_of(data / "heldout/web.jsonl")
    for path in sorted((data / "unseen").glob("masc*.jsonl")):
        web += texts_of(path)
    return {
        "wiki": first_sentences(texts_of(data / "heldout/wiki.jsonl"))[:400],
        "web": first_sentences(web)[:284],
        "questions": questions,
    }


def in_int8(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model whose linear layers compute in int8, by dynamic quantization."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def mean_reciprocal_rank(queries: torch.Tensor, passages: torch.Tensor) -> float:
    """Return the mean reciprocal rank of the passage of each query, both of shape `(pairs, channels)`."""
    cosines = queries @ passages.T
    ranks = (cosines > cosines.diagonal()[:, None]).sum(1) + 1
    return float((1 / ranks).mean())


def measure(models: dict[str, Any], pairs_by_kind: dict[str, list[Pair]]) -> None:
    """Print the retrieval of models as a share of the first model's, and the cosine to its vectors."""
    for kind, pairs in pairs_by_kind.items():
        texts = [query for query, _ in pairs] + [passage for _, passage in pairs]
        original = None
        for name, model in models.items():
            vectors = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
            original = vectors if original is None else original
            expected = mean_reciprocal_rank(original[: len(pairs)], original[len(pairs) :])
            share = mean_reciprocal_rank(vectors[: len(pairs)], vectors[len(pairs) :]) / expected
            cosine = float((vectors * original).sum(1).mean())
            print(f"{kind:10} {name:30} {share:.3f} of {expected:.3f}, cosine {cosine:.3f}", flush=True)


def measure_speed(models: dict[str, Any], texts: list[str]) -> None:
    """Print the speed of models as a multiple of the first model's, measured by turns on one thread."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS + 1):
        for name, model in models.items():
            start = time.process_time()
            model.encode(texts, batch_size=32)
            seconds[name].append(time.process_time() - start)

    original = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = [first / second for first, second in zip(original[1:], values[1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        print(f"speed      {name:30} {middle:.2f}x, quartiles {low:.2f} to {high:.2f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pairs", "measure"])
    parser.add_argument("data", type=Path)
    parser.add_argument("paths", nargs="+", type=Path)
    args = parser.parse_args(arguments)

    if args.command == "pairs":
        lines = [json.dumps({"query": query, "passage": passage}) for query, passage in training_pairs(args.data)]
        args.paths[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return

    torch.set_num_threads(1)
    models: dict[str, Any] = {}
    for path in args.paths:
        models[path.name] = SentenceTransformer(str(path), device="cpu")
    for path in args.paths:
        models[f"{path.name}, int8"] = in_int8(SentenceTransformer(str(path), device="cpu"))
    measure(models, measured_pairs(args.data))
    measure_speed(models, [text[:500] for text in texts_of(args.data / "calibration/wiki.jsonl")[:64]])


if __name__ == "__main__":
    main()
