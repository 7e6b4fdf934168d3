"""Prune a model, train it with the original model as its teacher, and save it.

    python examples/prune_and_recover.py MODEL OUTPUT [--sparsity 0.2] [--tokens 200000] [--domain NAME=SOURCE ...]

`examples/distributed.sh` starts it on several processes.
"""

import json
from argparse import ArgumentParser

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneConfig, StructPruner


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--training", type=json.loads, default={}, help="JSON of TrainingArguments")
    parser.add_argument("--domain", action="append", default=[], help="NAME=SOURCE; by default the built-in texts")
    args = parser.parse_args(argv)

    process = PartialState()
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map=process.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    domains = []
    for pair in args.domain:
        name, source = pair.split("=", 1)
        domains.append(DomainConfig(name=name, source=source))

    recovery = RecoveryConfig(
        tokens=args.tokens,
        lora={"r": 16},
        training={"per_device_train_batch_size": 4} | args.training,
    )
    config = StructPruneConfig(
        sparsity=args.sparsity,
        rounds=args.rounds,
        num_samples=args.num_samples,
        recovery=recovery,
        domains=domains or None,
    )

    # Every process prunes its own copy. When training begins, all processes take the weights of the first process.
    pruner = StructPruner(config)
    pruned = pruner.prune_model(model, tokenizer)

    if process.is_main_process:
        pruner.save(pruned, args.output, tokenizer=tokenizer)
        print(pruner.result.report)


if __name__ == "__main__":
    main()
