"""Hash the plans and weights of a set of prunings: `python tests/golden.py` prints the hashes as JSON.

The arithmetic uses only instructions that all x86 processors with AVX2 have. `--write` writes the hashes to
`golden.json`. Use it for a change that is meant to change results, and say so in the commit.
"""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory


FILE = Path(__file__).with_suffix(".json")
TINY = Path(__file__).with_name("tiny_llama")
# By default MKL, ATen and oneDNN choose their kernels by processor.
PORTABLE = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
BOTH = {"mlp": 96, "attention": 2}
# The prunings by name: the kind of model, and the fields of the config.
RUNS = {
    "uniform": ("trained", {"sparsity": 0.2}),
    "attention": ("trained", {"widths": BOTH}),
    "sensitivity": ("trained", {"sparsity": 0.3, "allocation": "sensitivity"}),
    "by_layer": ("trained", {"widths": {"mlp": {0: 64, 2: 100}}}),
    "skipped": ("trained", {"sparsity": 0.2, "skip_layers": (0, 3)}),
    "budget": ("trained", {"budget": {"parameters": 0.8}, "round_to": 8, "targets": ("mlp", "attention")}),
    "hidden": ("trained", {"widths": {"hidden": 42, "mlp": 96}}),
    "layer": ("trained", {"widths": {"layer": 3, "mlp": 96}}),
    "layer_rounds": ("trained", {"widths": {"layer": 2}, "rounds": 2}),
    "vocab": ("trained", {"widths": {"vocab": 300, "mlp": 96}}),
    "vocab_against_mlp": (
        "trained",
        {"budget": {"parameters": 0.9}, "targets": ("vocab", "mlp"), "allocation": "sensitivity"},
    ),
    "rounds": ("trained", {"widths": BOTH, "rounds": 3}),
    "no_feedback": ("trained", {"sparsity": 0.3, "error_feedback": 0.0}),
    "wanda": ("trained", {"widths": BOTH, "criterion": "wanda", "refit": "none"}),
    "flap": ("biased", {"widths": {"mlp": 24}, "criterion": "flap"}),
    "random": ("trained", {"widths": BOTH, "criterion": "random"}),
    "magnitude": ("trained", {"widths": BOTH, "criterion": "magnitude", "rounds": 2}),
    "bfloat16": ("bfloat16", {"sparsity": 0.3}),
    "offload": ("offloaded", {"widths": BOTH, "rounds": 2}),
    "transposed": ("gpt2-tied", {"widths": {"mlp": 24}}),
    "experts": ("qwen3_moe", {"widths": {"expert": 3, "mlp": 24}}),
    "stacked_experts": ("gpt_oss", {"widths": {"mlp": 24}}),
    "shared_experts": ("deepseek_v2", {"widths": {"mlp": 24, "dense_mlp": 32, "expert": 3}}),
    "whole_model": ("gemma4_text-experts", {"widths": {"mlp": 24}}),
}
# The kinds that use the trained model.
TRAINED = ("trained", "bfloat16", "offloaded")


def run(name: str, folder: Path) -> dict[str, str]:
    """Return the hashes of the plan and the weights of a run. The folder is for temporary files."""
    from models import tokenizer
    from transformers import AutoTokenizer

    from optimum_structprune import StructPruneConfig, StructPruner

    kind, fields = RUNS[name]
    trained = kind in TRAINED
    model = model_of(kind, folder)
    reader = AutoTokenizer.from_pretrained(TINY) if trained else tokenizer()
    config = StructPruneConfig(**(text_fields(trained) | fields))

    pruner = StructPruner(config)
    pruned = pruner.prune_model(model, reader, inplace=kind == "offloaded")
    return {"plan": hash_of_plan(pruner.result.plan), "weights": hash_of_weights(pruned)}


def text_fields(trained: bool) -> dict:
    """Return the fields of a config that set the text: two kinds of training text, or random words."""
    from models import documents

    from optimum_structprune import DomainConfig
    from optimum_structprune.domains.sources import TEXTS

    def read(name: str) -> list[str]:
        return (TEXTS / f"{name}.txt").read_text("utf-8").split("\n%\n")

    if trained:
        texts = {"fiction": read("fiction"), "programs": read("programs")}
        seq_length = 48
    else:
        texts = {"a": documents(seed=0)}
        seq_length = 24
    domains = [DomainConfig(name=name, source=source) for name, source in texts.items()]
    return {"domains": domains, "general_share": 0.0, "num_samples": 12, "seq_length": seq_length}


def model_of(kind: str, folder: Path):
    """Return the trained model in float32, in bfloat16 or with its layers on the disk, or a random model."""
    import torch
    from models import build
    from transformers import AutoModelForCausalLM

    from optimum_structprune import layer_device_map

    if kind == "biased":
        return build("llama-bias")
    if kind not in TRAINED:
        return build(kind)

    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
    if kind != "offloaded":
        return model

    places = layer_device_map(model.config, "cpu", "disk")
    offload = folder / "offload"
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, device_map=places, offload_folder=offload)


def hash_of_plan(plan) -> str:
    """Return the SHA-256 of the kept units. The hash of the original model, also in the plan, is left out."""
    keep = [[layer, name, list(units)] for (layer, name), units in sorted(plan.keep.items())]
    return sha256(json.dumps(keep).encode()).hexdigest()[:16]


def hash_of_weights(model) -> str:
    """Return the SHA-256 of the names, shapes and bits of all tensors of a model, including offloaded tensors."""
    import torch
    from accelerate.utils import align_module_device

    tensors = {}
    for prefix, module in model.named_modules():
        if list(module.children()):
            continue
        with align_module_device(module):
            for leaf, tensor in module.state_dict().items():
                tensors[f"{prefix}.{leaf}"] = tensor.detach().cpu().clone()

    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def main(names: list[str]) -> dict[str, dict[str, str]]:
    """Return the hashes of some runs, or of all runs."""
    import torch

    torch.set_num_threads(1)
    results = {}
    for name in names or RUNS:
        with TemporaryDirectory() as folder:
            results[name] = run(name, Path(folder))
            print(name, results[name], file=sys.stderr, flush=True)
    return results


def portable(arguments: list[str]) -> dict[str, dict[str, str]]:
    """Return the hashes from a process whose arithmetic does not depend on the processor."""
    environment = os.environ | PORTABLE
    command = [sys.executable, __file__, "--here", *arguments]
    process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--here"]:
        print(json.dumps(main(arguments[1:])))
    elif arguments[:1] == ["--write"]:
        hashes = {}
        if FILE.exists():
            hashes = json.loads(FILE.read_text())
        hashes.update(portable(arguments[1:]))
        FILE.write_text(json.dumps(hashes, indent=1) + "\n")
    else:
        print(json.dumps(portable(arguments), indent=1))
