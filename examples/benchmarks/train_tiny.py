"""Train a tiny language model from scratch, to check on another architecture what was chosen on a larger model.

    python examples/benchmarks/train_tiny.py DATA OUT [--family qwen3] [--tokens 3000000]

Reads DATA/calibration/*.jsonl, trains a tokenizer and a model of less than a million parameters on most of each file
(`set_aside.py` says which part is left out), and writes an ordinary model folder. The model knows all kinds of text
that the other benchmarks calibrate on and leave out, so they take it in place of MODEL, and a run takes a minute:

    python examples/benchmarks/benchmark_domains.py run OUT DATA tiny.json --leave-one-out --samples 60
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from set_aside import divided
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


def texts_of(folder: Path) -> list[str]:
    """The documents of all files that nothing is measured on."""
    parts = [divided(path)[0] for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line)["text"] for part in parts for line in part]


def trained_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
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
    """All documents one after the other, cut into rows of `length` tokens."""
    ids = [i for text in texts for i in (tokenizer.eos_token_id, *tokenizer(text)["input_ids"])]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def training_arguments(args: Namespace, **fields: Any) -> TrainingArguments:
    """How a model is trained from scratch on so many tokens, in the folder `OUT.training`."""
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
    """Train and save."""
    set_seed(args.seed)
    texts = texts_of(Path(args.data) / "calibration")
    tokenizer = trained_tokenizer(texts, args.vocabulary)
    rows = rows_of(texts, tokenizer, args.seq_length)
    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        args.family, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=None, **SHAPE
    )
    model = AutoModelForCausalLM.from_config(config)
    arguments = training_arguments(args, save_strategy="no")
    print(f"{model.num_parameters():,} parameters, {len(rows) * args.seq_length:,} tokens of text")
    Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--family", default="qwen3", help="a model type of transformers that takes Llama's shapes")
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
