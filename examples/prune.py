"""Prune a model with settings from flags, or from one JSON or YAML file.

    python examples/prune.py --model MODEL --output OUTPUT --sparsity 0.2 --domains prose=builtin:prose notes=n.jsonl
    python examples/prune.py run.yaml

The names in the file are the names of the flags.
"""

import json
import sys
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from optimum_structprune import StructPruneConfig, StructPruner


@dataclass
class Arguments:
    """The arguments of the script. `pruning` may hold any field of StructPruneConfig."""

    model: str = field(metadata={"help": "Model id or folder."})
    output: str = field(metadata={"help": "Folder for the pruned model."})
    sparsity: float | None = field(default=None, metadata={"help": "Share of the layers' parameters to remove."})
    criterion: str | None = field(default=None, metadata={"help": "How units are scored."})
    rounds: int = field(default=1, metadata={"help": "Times that calibration and removal are repeated."})
    domains: list[str] = field(default_factory=list, metadata={"help": "NAME=SOURCE, several."})
    # The flag is JSON text. In a file, it is a mapping.
    pruning: str | None = field(default=None, metadata={"help": "Fields of StructPruneConfig, as JSON."})


def read_arguments(argv: list[str]) -> Arguments:
    """Read the arguments from a file if it is the only argument, else from the flags."""
    parser = HfArgumentParser(Arguments)

    if len(argv) == 1 and argv[0].endswith(".json"):
        (args,) = parser.parse_json_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        (args,) = parser.parse_yaml_file(argv[0])
    else:
        (args,) = parser.parse_args_into_dataclasses(argv)
    return args


def build_config(args: Arguments) -> StructPruneConfig:
    """Return the config that the arguments describe."""
    fields = {"sparsity": args.sparsity, "criterion": args.criterion, "rounds": args.rounds}

    if isinstance(args.pruning, str):
        fields.update(json.loads(args.pruning))
    elif args.pruning is not None:
        fields.update(args.pruning)

    if args.domains:
        domains = []
        for pair in args.domains:
            name, source = pair.split("=", 1)
            domains.append({"name": name, "source": source})
        fields["domains"] = domains

    return StructPruneConfig.from_dict(fields)


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    args = read_arguments(argv)

    pruner = StructPruner(build_config(args))
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    pruned = pruner.prune_model(model, tokenizer)
    pruner.save(pruned, args.output, tokenizer=tokenizer)
    print(pruner.result.report)


if __name__ == "__main__":
    main()
