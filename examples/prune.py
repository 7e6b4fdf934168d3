"""Prune a model with settings from flags, or from one JSON or YAML file.

    python examples/prune.py --model MODEL --output OUTPUT --sparsity 0.2 --domains prose=builtin:prose notes=n.jsonl
    python examples/prune.py run.yaml

The file holds the same names as the flags.
"""

import json
import sys
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from optimum_structprune import StructPruneConfig, StructPruner


@dataclass
class Arguments:
    """What the script takes; any field of StructPruneConfig has a place under `pruning`."""

    model: str = field(metadata={"help": "Model id or folder."})
    output: str = field(metadata={"help": "Folder for the pruned model."})
    sparsity: float | None = field(default=None, metadata={"help": "Share of the layers' parameters to remove."})
    criterion: str | None = field(default=None, metadata={"help": "How units are scored."})
    rounds: int = field(default=1, metadata={"help": "Times that calibration and removal are repeated."})
    domains: list[str] = field(default_factory=list, metadata={"help": "NAME=SOURCE, several."})
    # A flag gives text, a file gives the mapping itself.
    pruning: str | None = field(default=None, metadata={"help": "Fields of StructPruneConfig, as JSON."})


def read(argv: list[str]) -> Arguments:
    """From a file if that is all there is, else from flags."""
    parser = HfArgumentParser(Arguments)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])[0]
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])[0]
    return parser.parse_args_into_dataclasses(argv)[0]


def main(argv: list[str] | None = None) -> None:
    args = read(sys.argv[1:] if argv is None else argv)
    more = json.loads(args.pruning) if isinstance(args.pruning, str) else args.pruning or {}
    fields = {"sparsity": args.sparsity, "criterion": args.criterion, "rounds": args.rounds, **more}
    if args.domains:
        fields["domains"] = [dict(zip(("name", "source"), pair.split("=", 1), strict=True)) for pair in args.domains]
    pruner = StructPruner(StructPruneConfig.from_dict(fields))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pruned = pruner.prune_model(AutoModelForCausalLM.from_pretrained(args.model), tokenizer)
    pruner.save(pruned, args.output, tokenizer=tokenizer)
    print(pruner.report)


if __name__ == "__main__":
    main()
