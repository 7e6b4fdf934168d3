"""A plain fine-tuning script with one added line, which makes the model smaller while it trains.

    python examples/trainer_callback.py MODEL OUTPUT [--text FILE.jsonl] [--sparsity 0.2] [--steps 200]

OUTPUT gets the checkpoints on the way, each of the width of its step, and the final model.
"""

from argparse import ArgumentParser

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


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--text", help="JSON lines with a `text` column; by default the built-in word problems")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.text:
        texts = load_dataset("json", data_files=args.text, split="train")
    else:
        texts = Dataset.from_dict({"text": [text for _, text in zip(range(2000), builtin_documents("math"))]})  # noqa: B905
    texts = texts.select_columns("text")
    rows = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=10,
            save_steps=0.25,
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    # The added line: four removals between a tenth and a half of the way, judged on the training text itself.
    config = StructPruneConfig(sparsity=args.sparsity, rounds=4, num_samples=32, seq_length=256)
    attach_pruner(trainer, config, start=0.1, end=0.5)

    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(args.output)
    width = trainer.model.config.intermediate_size
    print(f"saved to {args.output}: FFN width {width}, {trainer.model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
