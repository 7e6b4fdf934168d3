"""Prune inside TRL's SFTTrainer.

    python examples/sft_trl.py MODEL OUTPUT [--text FILE.jsonl] [--steps 200]

Needs `pip install "trl>=1.16"`.
"""

from argparse import ArgumentParser

import torch
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from optimum_structprune import StructPruneConfig, attach_pruner
from optimum_structprune.domains.sources import builtin_documents


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--text", help="JSON lines with a `text` column; by default the built-in word problems")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    if args.text:
        texts = load_dataset("json", data_files=args.text, split="train")
    else:
        texts = Dataset.from_dict({"text": [text for _, text in zip(range(2000), builtin_documents("math"))]})  # noqa: B905
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            args.output,
            max_steps=args.steps,
            max_length=256,
            logging_steps=10,
            report_to="none",
            # SFTConfig asks for bfloat16 on a GPU unless told otherwise.
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=texts,
    )
    config = StructPruneConfig(sparsity=args.sparsity, rounds=4, num_samples=32, seq_length=256)
    attach_pruner(trainer, config, start=0.1, end=0.5)
    trainer.train()
    trainer.save_model(args.output)
    print(f"saved to {args.output}: {trainer.model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
