"""How many tokens of its vocabulary a model needs: quality by number of tokens, with all other weights as they were.

    python examples/benchmarks/benchmark_vocabulary.py MODEL DATA --sizes 156928 131072 94592 [--samples 4] [--speed]
        [--channels 48]
    python examples/benchmarks/benchmark_vocabulary.py MODEL DATA --folders PRUNED ... [--domains wiki code math]

DATA holds `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. Tokens are chosen on the
calibration text alone. Perplexity is per token of the dense tokenizer, on the same text, as a multiple of the dense
model's: held-out text is of the kinds that were counted, unseen text is not. With `--channels N` FFN channels alone go
instead, for as many parameters: by the defaults, on N samples of the same text. With `--folders` pruned models
are measured on the same text; `--domains` names the kinds that they were calibrated on.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, measure_speed
from optimum_structprune.domains.packing import Passages
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import row_losses


def files(args: Namespace, folder: str) -> list[DomainConfig]:
    """The domains of a folder of DATA; in `calibration` those that `--domains` names."""
    paths = sorted(Path(args.data, folder).glob("*.jsonl"))
    named = args.domains if args.domains and folder == "calibration" else [path.stem for path in paths]
    return [DomainConfig(name=path.stem, source=str(path)) for path in paths if path.stem in named]


def text(args: Namespace, samples: int) -> dict:
    """The fields that name the calibration text."""
    kinds = files(args, "calibration")
    return {"domains": kinds, "general_share": 0, "num_samples": samples, "seq_length": args.seq_length}


def passages(args: Namespace, tokenizer) -> dict[str, dict[str, Passages]]:
    """The first samples of every evaluation file, by folder and name; of `heldout` those of calibrated kinds."""
    kinds = {domain.name for domain in files(args, "calibration")}
    texts: dict[str, dict[str, Passages]] = {"heldout": {}, "unseen": {}}
    for folder, by_name in texts.items():
        for domain in files(args, folder):
            if folder == "unseen" or domain.name in kinds:
                samples = read_heldout(domain, tokenizer, args.seq_length, args.samples).samples
                by_name[domain.name] = Passages([*samples], tokenizer)
    return texts


def losses(model, tokenizer, texts) -> dict[str, dict[str, float]]:
    """The mean loss of a sample in nats, by folder and file."""
    return {
        folder: {name: float(row_losses(model, of.rows(tokenizer, model)).mean()) for name, of in by_name.items()}
        for folder, by_name in texts.items()
    }


def ratios(args: Namespace, dense, after) -> dict[str, float]:
    """Perplexity as a multiple of the dense model's, by folder."""
    return {
        folder: exp(fmean(after[folder][name] - loss for name, loss in of.items()) / (args.seq_length - 1))
        for folder, of in dense.items()
    }


def row(args: Namespace, model, tokenizer, number: int, texts, dense) -> dict:
    """The figures of one number of tokens, or where FFN channels go instead for as many parameters."""
    parameters = model.num_parameters() - model.get_input_embeddings().weight[number:].numel()
    amount = {"budget": {"parameters": parameters}, "targets": ("mlp",)} if args.channels else {}
    amount = amount or {"widths": {"vocab": number}}
    pruner = StructPruner(StructPruneConfig(**amount, **text(args, args.channels or args.calibration)))
    start = perf_counter()
    small = pruner.prune_model(model, tokenizer)
    figures = {"seconds": perf_counter() - start, "widths": pruner.report.widths, "tokens": small.config.vocab_size}
    figures |= {"parameters": small.num_parameters() / model.num_parameters() - 1}
    figures |= ratios(args, dense, losses(small, pruner.tokenizer, texts))
    if args.speed:
        torch.set_num_threads(1)
        speed = measure_speed({"dense": model, "small": small}, prompts=[16], new_tokens=16, repeats=5)
        ((_, decode),) = speed.decode.items()
        figures["speed"] = decode["small"].speedup.median
    return figures


def folder_row(args: Namespace, model, folder: str, texts, dense) -> dict:
    """The figures of a model that is pruned already."""
    start, tokenizer = perf_counter(), AutoTokenizer.from_pretrained(folder)
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures = {"tokens": len(tokenizer), "parameters": small.num_parameters() / model.num_parameters() - 1}
    figures |= ratios(args, dense, losses(small, tokenizer, texts))
    return figures | {"seconds": perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and print a row for each number of tokens or each folder."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    of_what = parser.add_mutually_exclusive_group(required=True)
    of_what.add_argument("--sizes", nargs="+", type=int)
    of_what.add_argument("--folders", nargs="+", help="models that are pruned already")
    parser.add_argument("--domains", nargs="+", help="names of calibration files; the default is all")
    parser.add_argument("--calibration", type=int, default=256, help="samples; all text is counted")
    parser.add_argument("--samples", type=int, default=4, help="samples of each evaluation file")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--channels", type=int, help="calibration samples, for FFN channels in place of tokens")
    parser.add_argument("--speed", action="store_true", help="measure decoding at batch size 1 too")
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = passages(args, tokenizer)
    dense, rows = losses(model, tokenizer, texts), []
    print("tokens | parameters | held-out | unseen | seconds | decoding")
    for number in args.folders or args.sizes:
        if args.folders:
            of = folder_row(args, model, number, texts, dense)
        else:
            of = row(args, model, tokenizer, number, texts, dense)
        rows.append(of)
        figures = f"{of['parameters']:+.1%} | {of['heldout']:.3f} | {of['unseen']:.3f} | {of['seconds']:.0f}"
        print(f"{of.get('tokens', len(tokenizer)):,} | {figures} | {of.get('speed', float('nan')):.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
