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
from copy import deepcopy
from math import exp
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, measure_speed
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.token_space import named_ids
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.passages import Passages
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import row_losses
from optimum_structprune.removals.resize import drop_tokens_
from optimum_structprune.vocabulary.choose import keep_tokens, predicted_shares, removal_order, token_shares
from optimum_structprune.vocabulary.tokens import Vocabulary


def files(args: Namespace, folder: str) -> list[DomainConfig]:
    """The domains of a folder of DATA; in `calibration` those that `--domains` names."""
    paths = sorted(Path(args.data, folder).glob("*.jsonl"))
    named = args.domains if args.domains and folder == "calibration" else [path.stem for path in paths]
    return [DomainConfig(name=path.stem, source=str(path)) for path in paths if path.stem in named]


def text(args: Namespace, samples: int) -> dict:
    """The fields that name the calibration text."""
    kinds = files(args, "calibration")
    return {"domains": kinds, "general_share": 0, "num_samples": samples, "seq_length": args.seq_length}


def evidence(args: Namespace, model, tokenizer) -> dict:
    """What the choice goes by."""
    size = len(tokenizer)
    config = StructPruneConfig(sparsity=0.1, **text(args, args.calibration))  # nothing is pruned: this names the text
    domains = load_domains(config, tokenizer, heldout_samples=2, counts=True)
    start = perf_counter()
    predicted = predicted_shares(model, domains, size)
    return {"shares": token_shares(domains, size), "predicted": predicted, "seconds": perf_counter() - start}


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


def channels_row(args: Namespace, model, tokenizer, parameters: int, texts, dense) -> dict:
    """The figures where FFN channels go instead, so that so many parameters stay."""
    config = StructPruneConfig(budget={"parameters": parameters}, targets=("mlp",), **text(args, args.channels))
    pruner, start = StructPruner(config), perf_counter()
    small = pruner.prune_model(model, tokenizer)
    figures = {"widths": pruner.report.widths, "parameters": small.num_parameters() / model.num_parameters() - 1}
    figures |= {"seconds": perf_counter() - start}
    return figures | ratios(args, dense, losses(small, tokenizer, texts))


def row(args: Namespace, model, tokenizer, number: int, known: dict, texts, dense) -> dict:
    """The figures of one number of tokens; the seconds are those of choosing and cutting."""
    start = perf_counter()
    vocabulary, small = Vocabulary.of(tokenizer), deepcopy(model)
    always = {*vocabulary.always, *named_ids(model)}
    order = removal_order(vocabulary, known["shares"], always, known["predicted"])
    keep = keep_tokens(vocabulary.size, order, number)
    reader = vocabulary.smaller(keep)
    drop_tokens_(small, describe(small), keep)
    seconds = perf_counter() - start
    figures = {"tokens": number, "parameters": small.num_parameters() / model.num_parameters() - 1, "seconds": seconds}
    figures |= ratios(args, dense, losses(small, reader, texts))
    if args.speed:
        speed = measure_speed({"dense": model, "small": small}, prompts=[16], new_tokens=16, threads=1, repeats=5)
        ((_, decode),) = speed.decode.items()
        figures["speed"] = decode["small"]["speedup"]["median"]
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
    parser.add_argument("--calibration", type=int, default=256, help="samples; 20 times as many are counted")
    parser.add_argument("--samples", type=int, default=4, help="samples of each evaluation file")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--channels", type=int, help="calibration samples, for FFN channels in place of tokens")
    parser.add_argument("--speed", action="store_true", help="measure decoding at batch size 1 too")
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    known, texts = {} if args.channels or args.folders else evidence(args, model, tokenizer), passages(args, tokenizer)
    dense, rows = losses(model, tokenizer, texts), []
    print("tokens | parameters | held-out | unseen | seconds | decoding")
    for number in args.folders or args.sizes:
        if args.folders:
            of = folder_row(args, model, number, texts, dense)
        elif args.channels:
            gone = model.get_input_embeddings().weight[number:].numel()
            of = channels_row(args, model, tokenizer, model.num_parameters() - gone, texts, dense)
        else:
            of = row(args, model, tokenizer, number, known, texts, dense)
        rows.append(of)
        figures = f"{of['parameters']:+.1%} | {of['heldout']:.3f} | {of['unseen']:.3f} | {of['seconds']:.0f}"
        print(f"{of.get('tokens', len(tokenizer)):,} | {figures} | {of.get('speed', float('nan')):.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"expected in": known.get("seconds"), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
