"""Prune a text classifier (BERT, RoBERTa, DistilBERT, ModernBERT …) and show its accuracy before and after.

    python examples/prune_bert_classifier.py --model MODEL --output OUTPUT --data FILE.csv --sparsity 0.3

FILE is a CSV or JSON-lines file with the columns `text` and `label`; a fifth of it is for testing. Without one, the
task is to tell the built-in prose, code and word problems apart. `--epochs 0` takes a classifier as it is.
"""

import sys
from dataclasses import dataclass, field
from itertools import islice

from datasets import ClassLabel, Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner
from optimum_structprune.domains.sources import builtin_documents


@dataclass
class Arguments:
    """What the script takes."""

    model: str = field(metadata={"help": "Model id or folder."})
    output: str = field(metadata={"help": "Folder for the pruned classifier."})
    data: str | None = field(default=None, metadata={"help": "CSV or JSON-lines file with `text` and `label`."})
    sparsity: float = field(default=0.3, metadata={"help": "The share of the layers' parameters to remove."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of fine-tuning before pruning."})
    epochs_after: float = field(default=1.0, metadata={"help": "Epochs of fine-tuning after pruning."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The learning rate of both."})
    num_samples: int = field(default=64, metadata={"help": "Calibration samples."})
    seq_length: int = field(default=128, metadata={"help": "Tokens per text and per calibration sample."})


def read_data(path: str | None):
    """The texts, with labels from 0 on, in a training and a test part."""
    if path is None:
        pairs = [(text, kind) for kind in ("prose", "code", "math") for text in islice(builtin_documents(kind), 200)]
        data = Dataset.from_dict({"text": [text for text, _ in pairs], "label": [kind for _, kind in pairs]})
    else:
        data = load_dataset("csv" if path.endswith(".csv") else "json", data_files=path, split="train")
    data = data.select_columns(["text", "label"])
    if not isinstance(data.features["label"], ClassLabel):
        data = data.class_encode_column("label")
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def accuracy(prediction) -> dict[str, float]:
    """Share of texts whose likeliest label is the right one."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)[0]
    data = read_data(args.data)
    names = data["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    # A head for other labels is made anew where there is training for it.
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, **labels, ignore_mismatched_sizes=args.epochs > 0
    )
    rows = data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=args.seq_length), batched=True
    ).remove_columns("text")

    def trainer(classifier, epochs: float) -> Trainer:
        return Trainer(
            classifier,
            TrainingArguments(
                f"{args.output}.checkpoints",
                num_train_epochs=epochs,
                learning_rate=args.learning_rate,
                per_device_train_batch_size=16,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )

    def fit(classifier, epochs: float, name: str) -> None:
        run = trainer(classifier, epochs)
        if epochs:
            run.train()
        print(f"{name}: accuracy {run.evaluate()['eval_accuracy']:.3f}, {classifier.num_parameters():,} parameters")

    fit(model, args.epochs, "dense")
    pruner = StructPruner(
        StructPruneConfig(
            sparsity=args.sparsity,
            domains=[DomainConfig(name="train", source=data["train"])],
            num_samples=args.num_samples,
            seq_length=args.seq_length,
        )
    )
    pruned = pruner.prune_model(model.to("cpu"), tokenizer)
    fit(pruned, 0, "pruned")
    if args.epochs_after:
        fit(pruned, args.epochs_after, "fine-tuned again")
    pruner.save(pruned.to("cpu"), args.output, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
