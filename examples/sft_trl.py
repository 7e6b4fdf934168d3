"""Fine-tune a model in TRL's SFTTrainer, and prune it during the training.

    python examples/sft_trl.py MODEL OUTPUT [--text FILE.jsonl] [--steps 200]

TRL is required: `pip install "trl>=1.16"`.
"""

from argparse import ArgumentParser
from itertools import islice

import torch
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from optimum_structprune import StructPruneConfig, attach_pruner
from optimum_structprune.domains.sources import builtin_documents


def load_texts(path: str | None) -> Dataset:
    """Return the texts of a JSON-lines file, by default 2,000 built-in word problems."""
    if path is not None:
        return load_dataset("json", data_files=path, split="train")
    texts = list(islice(builtin_documents("math"), 2000))
    return Dataset.from_dict({"text": texts})


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--text", help="JSON lines with a `text` column; by default the built-in word problems")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    training_args = SFTConfig(
        args.output,
        max_steps=args.steps,
        max_length=256,
        logging_steps=10,
        bf16=on_gpu,  # The default is True, which needs a GPU.
        use_cpu=not on_gpu,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=args.model,
        args=training_args,
        train_dataset=load_texts(args.text),
    )

    # The added lines: four removals between a tenth and a half of the training, calibrated on the training text.
    config = StructPruneConfig(sparsity=args.sparsity, rounds=4, num_samples=32, seq_length=256)
    attach_pruner(trainer, config, start=0.1, end=0.5)

    trainer.train()
    trainer.save_model(args.output)
    print(f"saved to {args.output}: {trainer.model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
