"""Fine-tune a model in the Trainer of transformers, and prune it during the training.

    python examples/trainer_callback.py MODEL OUTPUT [--text FILE.jsonl] [--sparsity 0.2] [--steps 200]

OUTPUT receives the checkpoints and the final model. Each checkpoint has the FFN width of its step.
"""

from argparse import ArgumentParser
from itertools import islice

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

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
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenize(row):
        return tokenizer(row["text"], truncation=True, max_length=256)

    texts = load_texts(args.text).select_columns("text")
    tokenized = texts.map(tokenize, remove_columns="text")

    training_args = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=10,
        save_steps=0.25,
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokenized,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )

    # The added lines: four removals between a tenth and a half of the training, calibrated on the training text.
    config = StructPruneConfig(sparsity=args.sparsity, rounds=4, num_samples=32, seq_length=256)
    attach_pruner(trainer, config, start=0.1, end=0.5)

    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(args.output)

    width = trainer.model.config.intermediate_size
    print(f"saved to {args.output}: FFN width {width}, {trainer.model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
