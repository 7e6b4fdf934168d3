"""Make pairs for the recovery of an encoder, and measure its retrieval and speed, also in int8.

    python examples/benchmarks/benchmark_encoders.py pairs DATA pairs.jsonl
    python examples/benchmarks/benchmark_encoders.py measure DATA ORIGINAL MODEL …
    python examples/benchmarks/benchmark_encoders.py judges DATA ORIGINAL MODEL …

The pairs come from the calibration text of DATA. The retrieval is measured on text that the recovery has not read.
`judges` shows which figure of a report orders models like the retrieval of labelled pairs.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from optimum_structprune.measure.vectors import Embeddings, Texts, inverse_cloze, reciprocal_ranks, sentences
from optimum_structprune.record.figures import Figure


SENTENCE = re.compile(r"(?<=[.!?])\s+")
DEFINITION = re.compile(r"(.{3,60}?) (is|are|was|were) ((?:an?|the) [^.,;]{5,150})")
TURN = re.compile(r"User: (.+)\nAssistant: (.+)")
REPEATS = 5
# The figures of a report that judge an encoder, the documents of each text that they read, and the pairs of a kind.
FIGURES = ("retrieval", "neighbours", "cosine")
JUDGED = 128
LABELLED = 200
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


def questions_of(data: Path, *names: str) -> list[Pair]:
    """Return the questions of tasks with their correct answers."""
    questions = []
    for name in names:
        for line in (data / f"tasks/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
            row = json.loads(line)
            questions.append((row["query"].removeprefix("Question: ").strip(), row["choices"][row["gold"]]))
    return questions


def measured_pairs(data: Path) -> dict[str, list[Pair]]:
    """Return the pairs that measure the retrieval, by kind. No pair may choose a setting."""
    web = texts_of(data / "heldout/web.jsonl")
    for path in sorted((data / "unseen").glob("masc*.jsonl")):
        web += texts_of(path)
    return {
        "wiki": first_sentences(texts_of(data / "heldout/wiki.jsonl"))[:400],
        "web": first_sentences(web)[:284],
        "questions": questions_of(data, "arc_easy", "openbookqa"),
    }


def labelled_pairs(data: Path) -> dict[str, list[Pair]]:
    """Return questions with answers by kind. No query is a sentence of the text around its passage."""
    definitions = []
    for text in texts_of(data / "heldout/wiki.jsonl"):
        found = DEFINITION.match(text)
        if found:
            definitions.append((f"What {found[2]} {found[1]}?", found[3]))

    turns: list[Pair] = []
    for text in texts_of(data / "heldout/dialogue.jsonl")[JUDGED:]:
        turns += TURN.findall(text)[:1]

    problems = []
    for text in texts_of(data / "heldout/math.jsonl"):
        question, _, answer = text.partition("\n")
        if answer:
            problems.append((question, answer))
    kinds = {
        "definitions": definitions,
        "dialogue": turns,
        "math": problems,
        "science questions": questions_of(data, "arc_easy", "openbookqa"),
        "everyday tasks": questions_of(data, "piqa"),
    }
    return {kind: pairs[:LABELLED] for kind, pairs in kinds.items()}


def in_int8(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model whose linear layers compute in int8, by dynamic quantization."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def mean_reciprocal_rank(queries: torch.Tensor, passages: torch.Tensor) -> float:
    """Return the mean reciprocal rank of the passage of each query, both of shape `(pairs, channels)`."""
    return float(reciprocal_ranks(queries, passages, torch.arange(len(queries))).mean())


def measure(models: dict[str, Any], pairs_by_kind: dict[str, list[Pair]]) -> None:
    """Print the retrieval of models as a share of the first model's, and the cosine to its vectors."""
    for kind, pairs in pairs_by_kind.items():
        original = None
        for name, model in models.items():
            vectors = encoded(model, pairs)
            original = vectors if original is None else original
            expected = mean_reciprocal_rank(*original)
            share = mean_reciprocal_rank(*vectors) / expected
            cosine = float((torch.cat(vectors) * torch.cat(original)).sum(1).mean())
            print(f"{kind:10} {name:30} {share:.3f} of {expected:.3f}, cosine {cosine:.3f}", flush=True)


def judge(models: dict[str, Any], data: Path) -> None:
    """Print how well each figure of a report orders models like the retrieval of labelled pairs.

    The figures of a report are means over documents of wiki, web and dialogue. Labelled retrieval is a share of the
    first model's.
    """
    original = next(iter(models.values()))
    texts: dict[str, Texts] = {}
    for name in ("wiki", "web", "dialogue"):
        documents = texts_of(data / f"heldout/{name}.jsonl")[:JUDGED]
        texts[name] = sentences(documents)._replace(pairs=inverse_cloze(documents))
    judged = Embeddings(original[0].auto_model, texts, original.tokenizer, False)

    kinds = labelled_pairs(data)
    print("model |", " | ".join([*FIGURES, *kinds]), flush=True)
    columns: dict[str, list[float]] = {name: [] for name in [*FIGURES, *kinds]}
    expected: dict[str, float] = {}
    for name, model in models.items():
        results = judged.figures(model[0].auto_model)[0].values()
        for figure in FIGURES:
            columns[figure].append(fmean(value_of(getattr(result, figure)) for result in results))
        for kind, pairs in kinds.items():
            found = mean_reciprocal_rank(*encoded(model, pairs))
            columns[kind].append(found / expected.setdefault(kind, found))
        print(name, "|", " | ".join(f"{column[-1]:.3f}" for column in columns.values()), flush=True)

    columns["mean"] = [fmean(row) for row in zip(*(columns[kind] for kind in kinds), strict=True)]
    for figure in FIGURES:
        # Every figure of the original model is 1.
        taus = [concordance(columns[figure][1:], columns[kind][1:]) for kind in [*kinds, "mean"]]
        print(f"Kendall's tau of {figure} |", " | ".join(f"{tau:.2f}" for tau in taus), flush=True)


def encoded(model: Any, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of queries and of their passages, both of shape `(pairs, channels)`."""
    texts = [query for query, _ in pairs] + [passage for _, passage in pairs]
    queries, passages = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True).chunk(2)
    return queries, passages


def value_of(figure: Figure) -> float:
    """Return the value of the last model, as a share of the original's if there is one."""
    return figure.ratio or figure.last or 0.0


def concordance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau: the share of pairs of models in the same order, less the share in the other order."""
    signs = []
    for left, right in combinations(zip(first, second, strict=True), 2):
        product = (left[0] - right[0]) * (left[1] - right[1])
        signs.append((product > 0) - (product < 0))
    return fmean(signs)


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
    parser.add_argument("command", choices=["pairs", "measure", "judges"])
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
    if args.command == "judges":
        judge(models, args.data)
        return
    measure(models, measured_pairs(args.data))
    measure_speed(models, [text[:500] for text in texts_of(args.data / "calibration/wiki.jsonl")[:64]])


if __name__ == "__main__":
    main()
