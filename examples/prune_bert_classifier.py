"""Prune a text classifier (BERT, RoBERTa, DistilBERT, ModernBERT …) and print its accuracy before and after.

    python examples/prune_bert_classifier.py --model MODEL --output OUTPUT --data FILE.csv --sparsity 0.3

FILE is a CSV or JSON-lines file with the columns `text` and `label`. A fifth of its rows are the test set. Without a
file, the model learns to distinguish the built-in prose, code and word problems. `--epochs 0` prunes a model that is a
classifier already, without fine-tuning.
"""

import sys
from dataclasses import dataclass, field
from itertools import islice

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner
from optimum_structprune.domains.sources import builtin_documents


@dataclass
class Arguments:
    """The arguments of the script."""

    model: str = field(metadata={"help": "Model id or folder."})
    output: str = field(metadata={"help": "Folder for the pruned classifier."})
    data: str | None = field(default=None, metadata={"help": "CSV or JSON-lines file with `text` and `label`."})
    sparsity: float = field(default=0.3, metadata={"help": "The share of the layers' parameters to remove."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of fine-tuning before pruning."})
    epochs_after: float = field(default=1.0, metadata={"help": "Epochs of fine-tuning after pruning."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The learning rate of both."})
    num_samples: int = field(default=64, metadata={"help": "Calibration samples."})
    seq_length: int = field(default=128, metadata={"help": "Tokens per text and per calibration sample."})


def builtin_texts() -> Dataset:
    """Return built-in texts of three kinds, with their kinds as labels."""
    texts = []
    labels = []
    for kind in ("prose", "code", "math"):
        for text in islice(builtin_documents(kind), 200):
            texts.append(text)
            labels.append(kind)
    return Dataset.from_dict({"text": texts, "label": labels})


def read_data(path: str | None) -> DatasetDict:
    """Return labelled texts as a training set and a test set. The labels are integers from 0."""
    if path is None:
        data = builtin_texts()
    elif path.endswith(".csv"):
        data = load_dataset("csv", data_files=path, split="train")
    else:
        data = load_dataset("json", data_files=path, split="train")

    data = data.select_columns(["text", "label"])
    if not isinstance(data.features["label"], ClassLabel):
        data = data.class_encode_column("label")
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of texts with a correct label."""
    labels = prediction.predictions.argmax(-1)
    is_correct = labels == prediction.label_ids
    return {"accuracy": float(is_correct.mean())}


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)

    data = read_data(args.data)
    names = data["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        # With fine-tuning, a head for other labels is replaced by a random head.
        ignore_mismatched_sizes=args.epochs > 0,
    )

    def tokenize(batch):
        return tokenizer(batch["text"], truncation=True, max_length=args.seq_length)

    tokenized = data.map(tokenize, batched=True).remove_columns("text")

    def build_trainer(classifier, epochs: float) -> Trainer:
        training_args = TrainingArguments(
            f"{args.output}.checkpoints",
            num_train_epochs=epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
        )

        return Trainer(
            model=classifier,
            args=training_args,
            train_dataset=tokenized["train"],
            eval_dataset=tokenized["test"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
        )

    def print_accuracy(name: str, trainer: Trainer) -> None:
        accuracy = trainer.evaluate()["eval_accuracy"]
        print(f"{name}: accuracy {accuracy:.3f}, {trainer.model.num_parameters():,} parameters")

    # Fine-tune the original model.
    trainer = build_trainer(model, args.epochs)
    if args.epochs:
        trainer.train()
    print_accuracy("original", trainer)

    # Prune it. The training texts are the calibration text.
    config = StructPruneConfig(
        sparsity=args.sparsity,
        domains=[DomainConfig(name="train", source=data["train"])],
        num_samples=args.num_samples,
        seq_length=args.seq_length,
    )
    pruner = StructPruner(config)
    pruned = pruner.prune_model(model.to("cpu"), tokenizer)
    print_accuracy("pruned", build_trainer(pruned, epochs=0))

    # Fine-tune the pruned model.
    if args.epochs_after:
        trainer = build_trainer(pruned, args.epochs_after)
        trainer.train()
        print_accuracy("fine-tuned again", trainer)

    pruner.save(pruned.to("cpu"), args.output, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
