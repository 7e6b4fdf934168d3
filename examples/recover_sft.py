"""Recover a pruned model in TRL's SFTTrainer with the original model as its teacher, on one process or on many GPUs.

    python examples/recover_sft.py PRUNED OUTPUT --teacher ORIGINAL [--dataset ID_OR_FILE.jsonl] [--steps 500]
    accelerate launch --config_file fsdp2.yaml examples/recover_sft.py PRUNED OUTPUT --teacher ORIGINAL ...

docs/recovery_many_gpus.md has the files for `accelerate launch`. TRL is required: `pip install trl`.
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from optimum_structprune import attach_teacher
from optimum_structprune.domains.sources import builtin_documents


def builtin_texts():
    """Yield built-in texts."""
    for text in builtin_documents("general"):
        yield {"text": text}


def load_texts(name: str | None, split: str) -> IterableDataset:
    """Return a stream of texts, which reads only the texts that are used."""
    if name is None:
        return IterableDataset.from_generator(builtin_texts)
    if Path(name).is_file():
        return load_dataset("json", data_files=name, split="train", streaming=True)
    return load_dataset(name, split=split, streaming=True)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("pruned")
    parser.add_argument("output")
    parser.add_argument("--teacher", required=True, help="the original model: an id or a folder")
    parser.add_argument("--dataset", help="a dataset on the Hub, or JSON lines with a `text` or `messages` column")
    parser.add_argument("--split", default="train")
    parser.add_argument("--eval-dataset", help="a dataset or file of the same kind, evaluated before each checkpoint")
    parser.add_argument("--eval-split", default="test")
    parser.add_argument("--eval-size", type=int, default=200, help="number of texts that are evaluated")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4, help="samples at once in each process")
    parser.add_argument("--accumulation", type=int, default=4, help="batches in each step")
    parser.add_argument("--learning-rate", type=float, help="by default 1e-3 for LoRA and 1e-4 for all weights")
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA adapter")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--task-weight", type=float, default=0.0, help="weight of the cross-entropy with the text")
    parser.add_argument("--attn-implementation", help="attention of both models, such as sdpa or flash_attention_2")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    if args.full:
        lora_config = None
        default_learning_rate = 1e-4
    else:
        lora_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        default_learning_rate = 1e-3

    eval_texts = None
    if args.eval_dataset is not None:
        eval_texts = Dataset.from_list(list(load_texts(args.eval_dataset, args.eval_split).take(args.eval_size)))

    training_args = SFTConfig(
        args.output,
        max_steps=args.steps,
        max_length=args.seq_length,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate or default_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, min(10, args.steps // 10)),
        save_steps=max(1, args.steps // 4),
        save_total_limit=2,
        eval_strategy="no" if eval_texts is None else "steps",
        eval_steps=max(1, args.steps // 4),
        bf16=on_gpu,  # The forward pass computes in bfloat16.
        use_cpu=not on_gpu,
        report_to="none",
    )

    # The model is loaded after the arguments, which turn on DeepSpeed ZeRO-3. Its weights are then sharded as they are
    # read. Weights that are trained have to be in float32. The frozen weights under an adapter may be in bfloat16.
    dtype = torch.float32
    if on_gpu and not args.full:
        dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        args.pruned, dtype=dtype, attn_implementation=args.attn_implementation
    )

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=load_texts(args.dataset, args.split),
        eval_dataset=eval_texts,
        processing_class=AutoTokenizer.from_pretrained(args.pruned),
        peft_config=lora_config,
    )

    # The added line: the loss becomes the divergence from the predictions of the original model.
    attach_teacher(trainer, args.teacher, temperature=args.temperature, task_weight=args.task_weight)

    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_fsdp_enabled:
        # The checkpoints may be sharded, and the result must load with `from_pretrained`.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output)

    if trainer.accelerator.is_main_process:
        kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
        print(f"saved to {args.output}; KL per token: {kl[0]:.5f} in the first logged steps, {kl[-1]:.5f} in the last")


if __name__ == "__main__":
    main()
