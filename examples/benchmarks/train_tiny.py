"""Train a tiny language model from scratch, to check the choices for a larger model on another architecture.

    python examples/benchmarks/train_tiny.py DATA OUT [--family qwen3] [--tokens 3000000]

The script reads DATA/calibration/*.jsonl, trains a tokenizer and a model with less than a million parameters on most
of each file (`set_aside.py` defines the part), and writes an ordinary model folder. The model knows all kinds of text
that the other benchmarks calibrate on or leave out, so it can replace MODEL there. A run then needs a minute:

    python examples/benchmarks/benchmark_domains.py run OUT DATA tiny.json --leave-one-out --samples 60
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from set_aside import split_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)


END = "<|end|>"
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def read_training_texts(folder: Path) -> list[str]:
    """Return the documents of all files without the held-out ones."""
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        lines, _ = split_lines(path)
        texts += [json.loads(line)["text"] for line in lines]
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, torch.Tensor]]:
    """Concatenate all documents, and return rows of `length` tokens."""
    ids = []
    for text in texts:
        ids.append(tokenizer.eos_token_id)
        ids += tokenizer(text)["input_ids"]

    count = len(ids) // length
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def training_arguments(args: Namespace, **fields: Any) -> TrainingArguments:
    """Return the arguments of a training from scratch. Its checkpoints are in the folder `OUT.training`."""
    return TrainingArguments(
        f"{args.out}.training",
        max_steps=max(1, args.tokens // (args.batch_size * args.seq_length)),
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=50,
        report_to="none",
        use_cpu=args.device == "cpu",
        seed=args.seed,
        disable_tqdm=True,
        **fields,
    )


def run(args: Namespace) -> None:
    """Train and save the tokenizer and the model."""
    set_seed(args.seed)
    texts = read_training_texts(Path(args.data, "calibration"))
    tokenizer = train_tokenizer(texts, args.vocabulary)
    rows = rows_of(texts, tokenizer, args.seq_length)

    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        args.family, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=None, **SHAPE
    )
    model = AutoModelForCausalLM.from_config(config)
    print(f"{model.num_parameters():,} parameters, {len(rows) * args.seq_length:,} tokens of text")

    trainer = Trainer(model, training_arguments(args, save_strategy="no"), train_dataset=rows)
    trainer.train()

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--family", default="qwen3", help="a model type of transformers with the shapes of Llama")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)

    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
