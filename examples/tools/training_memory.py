"""Compute the memory that `examples/recover_sft.py` needs for a student as large as its teacher.

    python examples/tools/training_memory.py [MODEL ...] [--gpus 8] [--tokens 4096]
    python examples/tools/training_memory.py --teacher-file

Only configs are read. Without models, the rows are Llama and Qwen models of 1 to 70 billion parameters.
"""

from argparse import ArgumentParser

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optimum_structprune.distillation.teacher_file_format import bytes_per_token


# The hidden size, the FFN size, the layers, the attention heads, the tokens, and whether the head is tied.
SHAPES = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 128_256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 128_256, True),
    "Llama 3.1 8B": (4096, 14_336, 32, 32, 128_256, False),
    "Qwen 2.5 32B": (5120, 27_648, 64, 40, 152_064, False),
    "Llama 3.1 70B": (8192, 28_672, 80, 64, 128_256, False),
}
# The models of the table for one GPU.
ONE_GPU_SHAPES = {
    **{name: shape for name, shape in SHAPES.items() if name.startswith(("Llama 3.2", "Llama 3.1 8B"))},
    "Qwen 2.5 14B": (5120, 13_824, 48, 40, 152_064, False),
}
RANK = 16
# Bytes of a parameter: bfloat16, and float32 with its gradient and both moments of Adam.
BF16 = 2
TRAINED = 16
# The activations of one layer per token, as multiples of the hidden size and of the FFN size.
STORED_HIDDEN = 12
STORED_FFN = 4
# Six chunks of logits: of student and teacher, their log-probabilities, and gradients.
CHUNKS = 6 * 2**27


def config_of(hidden: int, ffn: int, layers: int, heads: int, tokens: int, tied: bool) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=tokens,
        tie_word_embeddings=tied,
    )


def count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(weight.numel() for weight in module.parameters())


def adapter_size(model: PreTrainedModel) -> int:
    """Return the number of parameters of a LoRA adapter on all linear layers except the head."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return sum(RANK * (module.in_features + module.out_features) for module in linear)


def memory(model: PreTrainedModel, gpus: int, tokens: int) -> list[float]:
    """Return the memory of one GPU for four kinds of training, and the CPU memory of the last, in bytes.

    They are LoRA without and with sharding, and all weights sharded, without and with offload.

    Args:
        model: The model on the meta device.
        gpus: The number of GPUs, each with one process.
        tokens: The number of tokens in one batch of one process.
    """
    config = model.config
    size = count(model)
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    layer = max(count(module) for module in layers)
    # Sharded weights are gathered for the layer that runs and for the next one. Embeddings and head stay gathered.
    gathered = BF16 * (size - sum(count(module) for module in layers) + 2 * layer)

    teacher = BF16 * size
    lora = BF16 * size + TRAINED * adapter_size(model)
    full = TRAINED * size

    # Activation checkpointing stores the input of each layer, and the activations of one layer.
    per_token = config.hidden_size * (len(layers) + STORED_HIDDEN) + STORED_FFN * config.intermediate_size
    batch = BF16 * tokens * per_token + CHUNKS
    # A sharded teacher returns the logits of a batch, and the logits of the counted positions are copied.
    sharded_batch = batch + 2 * BF16 * tokens * config.vocab_size + gathered
    # The gradients of gathered weights are gathered too.
    full_batch = sharded_batch + gathered

    return [
        teacher + lora + batch,
        (teacher + lora) / gpus + sharded_batch,
        (teacher + full) / gpus + full_batch,
        full_batch,
        teacher + full,
    ]


def print_one_gpu(configs: dict[str, PreTrainedConfig], tokens: int) -> None:
    """Print the memory of a training with LoRA on one GPU, and the size of a teacher file."""
    print("| one GPU, LoRA | teacher in memory | teacher file | file of 10 million tokens |")
    print("|---|---|---|---|")
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        live = memory(model, 1, tokens)[0]
        from_file = live - BF16 * count(model)
        size = 10_000_000 * bytes_per_token(config.vocab_size)
        print(f"| {name} | {live / 1e9:,.0f} GB | {from_file / 1e9:,.0f} GB | {size / 1e9:.1f} GB |")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--teacher-file", action="store_true", help="LoRA on one GPU, with the teacher in memory and in a file"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in one batch of one process")
    args = parser.parse_args(argv)

    configs = {name: AutoConfig.from_pretrained(name) for name in args.models}
    if not configs:
        shapes = ONE_GPU_SHAPES if args.teacher_file else SHAPES
        configs = {name: config_of(*shape) for name, shape in shapes.items()}

    if args.teacher_file:
        print_one_gpu(configs, args.tokens)
        return

    print(f"| {args.gpus} GPUs | LoRA, not sharded | LoRA | all weights | all weights, offloaded | their CPU memory |")
    print("|---|---|---|---|---|---|")
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        cells = [f"{value / 1e9:,.0f} GB" for value in memory(model, args.gpus, args.tokens)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
