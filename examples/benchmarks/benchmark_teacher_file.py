"""Time a training step with a teacher file, by turns with a cross-entropy step and with the teacher in memory.

    python examples/benchmarks/benchmark_teacher_file.py TEACHER STUDENT TEXT.jsonl [--rounds 8]

All three steps run in one process: the forward pass, the backward pass, and no optimizer. The text is cut into samples
of 256 tokens, four in a batch.
"""

import json
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from optimum_structprune import attach_teacher, write_teacher


LENGTH = 256
BATCH = 4


def rows_of(path: str, tokenizer, count: int) -> list[dict[str, list[int]]]:
    """Return samples of token ids."""
    ids: list[int] = []
    for line in Path(path).read_text().splitlines():
        ids += tokenizer(json.loads(line)["text"])["input_ids"]
        if len(ids) >= count * LENGTH:
            break
    samples = [ids[start : start + LENGTH] for start in range(0, count * LENGTH, LENGTH)]
    return [{"input_ids": sample, "labels": sample} for sample in samples]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("text")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    student.get_input_embeddings().requires_grad_(False)  # as in a training with LoRA
    rows = rows_of(options.text, tokenizer, BATCH * options.rounds)

    with tempfile.TemporaryDirectory() as folder:
        write_teacher(teacher, rows, f"{folder}/file", tokenizer)
        trainers = {}
        for name in ("cross-entropy", "teacher file", "teacher in memory"):
            arguments = TrainingArguments(folder, use_cpu=True, report_to="none", per_device_train_batch_size=BATCH)
            trainers[name] = Trainer(student, arguments, train_dataset=rows, data_collator=default_data_collator)
        attach_teacher(trainers["teacher file"], f"{folder}/file")
        attach_teacher(trainers["teacher in memory"], teacher)

        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for start in range(0, len(rows), BATCH):
            for name, trainer in trainers.items():
                batch = trainer.data_collator(rows[start : start + BATCH])
                student.zero_grad()
                student.train()
                begin = time.process_time()
                loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(BATCH * (LENGTH - 1)))
                loss.backward()
                seconds[name].append(time.process_time() - begin)

    reference = seconds["cross-entropy"][1:]
    for name, times in seconds.items():
        ratio = median(own / other for own, other in zip(times[1:], reference, strict=True))
        print(f"{name:<18} {median(times[1:]):6.2f} CPU seconds per step, {ratio:.2f} x cross-entropy")


if __name__ == "__main__":
    main()
