"""Run one step of `benchmark_peers.py` in the environment of a tool.

    python examples/benchmarks/benchmark_peers_worker.py prune JOB.json
    python examples/benchmarks/benchmark_peers_worker.py evaluate JOB.json

`prune` loads the model, prunes it with one tool and saves it. `evaluate` loads the saved model with transformers alone
and measures perplexity. If transformers cannot load the model, `prune` with `"measure": true` in the job prunes and
measures. Each step writes its figures to the `answer` of the job.

The environments of the other tools contain neither optimum-structprune nor the other examples. So this file imports
torch, transformers and, to prune, the package of one tool.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module, metadata
from math import exp
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


Texts = dict[str, Tensor]


def resident(field: str) -> int:
    """Return the current (`VmRSS`) or the peak (`VmHWM`) resident set in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no field {field}")


def load_original(path: str) -> nn.Module:
    """Load the original model in fp32, and copy it out of the memory-mapped file, whose pages are resident too."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, and tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def ffn_widths(model: Any) -> list[int]:
    """Return the FFN width of every layer."""
    return [layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers]


@torch.no_grad()
def perplexity(model: nn.Module, samples: Tensor) -> float:
    """Return the perplexity per predicted token. The first token of each sample is context only."""
    loss = 0.0
    for ids in samples.split(1):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        # Parts of the sample need less memory for the logits in fp32.
        for part, targets in zip(logits.split(128), ids[0, 1:].split(128), strict=True):
            loss += float(cross_entropy(part.float(), targets, reduction="sum"))

    return exp(loss / samples[:, 1:].numel())


def backward(model: nn.Module, samples: Tensor) -> None:
    """Compute the gradients of the mean language-modeling loss over the samples, one sample per pass."""
    model.zero_grad()
    for ids in samples.split(1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(samples)
        loss.backward()


def structprune(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune with this package. It calibrates on all samples and holds none out, as the other tools do."""
    from optimum_structprune import StructPruneConfig, StructPruner
    from optimum_structprune.domains.packing import Domain

    if job["options"].get("refit") == "bias":
        sys.path.append(str(Path(__file__).parents[1] / "sisters"))
        from structprune_sisters.flap import with_biases

        model = with_biases(model)

    first_text = next(iter(texts.values()))
    fields = {
        "widths": {"mlp": job["width"]},
        "num_samples": sum(len(samples) for samples in texts.values()),
        "seq_length": first_text.shape[1],
        "seed": job["seed"],
    }
    fields.update(job["options"])
    domains = [Domain(name, 1 / len(texts), samples, samples[:0]) for name, samples in texts.items()]
    StructPruner(StructPruneConfig.from_dict(fields)).prune_to_(model, domains, fields["widths"])
    return model


def torch_pruning(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN with the `BasePruner` of Torch-Pruning, which ignores all other layers as in its examples."""
    import torch_pruning as tp

    options = dict(job["options"])
    importance = getattr(tp.importance, options.pop("importance"))()
    if isinstance(importance, tp.importance.GroupTaylorImportance):
        backward(model, torch.cat(list(texts.values())))

    projections = set()
    for layer in model.model.layers:
        projections.update([layer.mlp.gate_proj, layer.mlp.up_proj])
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]

    size = model.config.intermediate_size
    first_text = next(iter(texts.values()))
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": first_text[:1, :16]},
        importance=importance,
        # The pruner rounds the width down, so a ratio that is slightly too large would remove one more channel.
        pruning_ratio=(size - job["width"] - 0.5) / size,
        ignored_layers=[layer for layer in layers if layer not in projections],
        output_transform=lambda output: output.logits,
        **options,
    )
    pruner.step()
    # The pruner does not change the config. The examples of Torch-Pruning set the width like this.
    model.config.intermediate_size = ffn_widths(model)[0]
    return model


def optipfair(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN with `prune_model` of OptiPFair, with the calibration text if the options request it."""
    from optipfair import prune_model
    from torch.utils.data import DataLoader

    options = dict(job["options"])
    if options.pop("data", False):
        rows = [{"input_ids": ids} for ids in torch.cat(list(texts.values()))]
        options["dataloader"] = DataLoader(rows, batch_size=1)

    size = model.config.intermediate_size
    # OptiPFair rounds the number of removed channels down.
    percentage = 100 * (size - job["width"] + 0.5) / size
    return prune_model(model, "MLP_GLU", pruning_percentage=percentage, show_progress=False, **options)


def quark(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN with OSSCAR of AMD Quark, which refits the down projection."""
    from quark.torch import ModelPruner
    from quark.torch.pruning.config import OSSCARConfig, PConfig
    from torch.utils.data import DataLoader

    down = "mlp.down_proj"
    algorithm = OSSCARConfig(
        inside_layer_modules=[down],
        mlp_pruning_modules=[down],
        mlp_scaling_layers={down: ["mlp.up_proj", "mlp.gate_proj"]},
        mlp_pruning_ratio=1 - job["width"] / model.config.intermediate_size,
        mlp_intermediate_size_name="intermediate_size",
        model_decoder_layers="model.layers",
        **job["options"],
    )

    rows = torch.cat(list(texts.values()))
    return ModelPruner(PConfig(algo_config=algorithm)).pruning_model(model, DataLoader(rows, batch_size=1))


def kirigami(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN with the greedy strategy of torch-kirigami and one ratio for all layers."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    first_text = next(iter(texts.values()))
    inputs = {"input_ids": first_text[:1, :16], "use_cache": False}
    pruner = Pruner(model, graph=DependencyGraph.build(model, kwargs=inputs))
    size = model.config.intermediate_size

    candidates = pruner.discover_candidates(targets=["*.mlp.gate_proj*"])
    model, _ = pruner.prune(
        candidates, budget=ChannelRatio((size - job["width"]) / size), strategy=Greedy(GroupMagnitude(p=2))
    )
    model.config.intermediate_size = ffn_widths(model)[0]
    return model


def modelopt(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN with Minitron, the mode of NVIDIA ModelOpt for language models."""
    import modelopt.torch.prune as mtp

    rows = torch.cat(list(texts.values()))

    def forward_loop(model: Any) -> None:
        for ids in rows.split(1):
            model(input_ids=ids)

    constraints = {"export_config": {"ffn_hidden_size": job["width"]}}
    config = {"forward_loop": forward_loop}
    model, _ = mtp.prune(model, "mcore_minitron", constraints=constraints, dummy_input=rows[:1], config=config)
    return model


# The function and the module of each tool. The import of the module precedes the measurement of memory.
TOOLS = {
    "optimum-structprune": (structprune, "optimum_structprune"),
    "torch-pruning": (torch_pruning, "torch_pruning"),
    "optipfair": (optipfair, "optipfair"),
    "amd-quark": (quark, "quark.torch"),
    "torch-kirigami": (kirigami, "torch_kirigami.pruning"),
    "nvidia-modelopt": (modelopt, "modelopt.torch.prune"),
}


class Samples:
    """Holds the tokens of all rows: calibration samples by domain, texts by name, and a probe."""

    def __init__(self, path: str):
        self.calibration: Texts = {}
        self.texts: Texts = {}
        # The numbers in the names keep the order.
        for name, tensor in sorted(load_file(path).items()):
            if name == "probe":
                self.probe = tensor
                continue

            kind, _, text = name.split("/", 2)
            if kind == "calibration":
                self.calibration[text] = tensor
            else:
                self.texts[text] = tensor

    def perplexities(self, model: Any) -> dict[str, float]:
        """Return the perplexity on each text."""
        return {name: perplexity(model, samples) for name, samples in self.texts.items()}


def prune(job: dict[str, Any]) -> dict[str, Any]:
    """Prune, measure time and memory, and save the model.

    Time includes the calibration of the tool, by the wall clock and as CPU time of all threads. Memory is the peak
    resident set during the pruning, less the resident set before the model was loaded.
    """
    tool, module = TOOLS[job["tool"]]
    import_module(module)
    samples = Samples(job["texts"])
    torch.manual_seed(job["seed"])
    resident_before = resident("VmRSS")

    model = load_original(job["model"])
    # Set the peak of the resident set to its current size.
    Path("/proc/self/clear_refs").write_text("5")

    start = perf_counter()
    cpu_start = process_time()
    model = tool(model, samples.calibration, job)
    seconds = perf_counter() - start
    cpu_seconds = process_time() - cpu_start
    peak = resident("VmHWM") - resident_before

    model.eval().zero_grad()
    answer = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": peak,
        "parameters": count_parameters(model),
        "widths": ffn_widths(model),
        "probe": perplexity(model, samples.probe),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", job["tool"])},
    }
    if job["measure"]:
        answer["perplexity"] = samples.perplexities(model)
    else:
        model.save_pretrained(job["out"])

    return answer


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Load the saved model, and measure perplexity on every text. The probe detects a model that differs."""
    model = AutoModelForCausalLM.from_pretrained(job["out"], dtype=torch.float32).eval()
    samples = Samples(job["texts"])
    probe = perplexity(model, samples.probe)
    expected_probe = job.get("probe", probe)
    if abs(probe / expected_probe - 1) > 1e-3:
        raise ValueError(f"another model comes back: perplexity {probe:.2f} instead of {expected_probe:.2f}")

    return {
        "parameters": count_parameters(model),
        "probe": probe,
        "perplexity": samples.perplexities(model),
    }


def first_line(error: Exception) -> str:
    """Return the first line with text in the message of an error."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return "no message"


def main(argv: list[str] | None = None) -> None:
    """Run the step of the arguments."""
    if argv is None:
        argv = sys.argv[1:]
    step, path = argv

    job = json.loads(Path(path).read_text())
    answer_file = Path(job["answer"])

    steps = {"prune": prune, "evaluate": evaluate}
    try:
        answer = steps[step](job)
    except Exception as error:
        answer_file.write_text(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))
        raise

    answer_file.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
