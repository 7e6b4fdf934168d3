"""One step of `benchmark_peers.py`, in whichever environment has to do it.

    python examples/benchmarks/benchmark_peers_worker.py prune JOB.json
    python examples/benchmarks/benchmark_peers_worker.py evaluate JOB.json

`prune` loads the model, has one tool prune it, and saves it. `evaluate` loads what was saved by transformers alone,
and measures perplexity; where transformers cannot load it, `prune` with `"measure": true` in the job does both. Each
writes its numbers to the job's `answer`.
The environments of the other tools have neither optimum-structprune nor the other examples, so this file imports
torch, transformers and, where it prunes, the one tool.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
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
FFN = ("gate_proj", "up_proj", "down_proj")


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the highest since the last reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def dense(path: str) -> nn.Module:
    """The dense model in fp32, out of the memory-mapped file, whose pages would count as resident."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def widths(model: Any) -> list[int]:
    """The FFN width of every layer."""
    return [layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers]


@torch.no_grad()
def perplexity(model: nn.Module, samples: Tensor) -> float:
    """E to the mean loss per predicted token; the first token of each sample is context only."""
    loss = 0.0
    for ids in samples.split(1):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss += sum(
            float(cross_entropy(part.float(), target, reduction="sum"))
            for part, target in zip(logits.split(128), ids[0, 1:].split(128), strict=True)
        )
    return exp(loss / samples[:, 1:].numel())


def backward(model: nn.Module, samples: Tensor) -> None:
    """Leave the gradients of the mean language-modelling loss over the samples, one sample per pass."""
    model.zero_grad()
    for ids in samples.split(1):
        (model(input_ids=ids, labels=ids, use_cache=False).loss / len(samples)).backward()


def structprune(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune by this package, which calibrates on all samples here and, like the other tools, sets none aside."""
    from optimum_structprune import StructPruneConfig, StructPruner
    from optimum_structprune.domains.packing import Domain

    if job["options"].get("refit") == "bias":
        sys.path.append(str(Path(__file__).parents[1] / "sisters"))
        from structprune_sisters.flap import with_biases

        model = with_biases(model)
    count, length = sum(len(samples) for samples in texts.values()), next(iter(texts.values())).shape[1]
    widths = {"mlp": job["width"]}
    fields = {"widths": widths, "num_samples": count, "seq_length": length, "seed": job["seed"]}
    domains = [Domain(name, 1 / len(texts), samples, samples[:0]) for name, samples in texts.items()]
    StructPruner(StructPruneConfig.from_dict({**fields, **job["options"]})).prune_to_(model, domains, widths)
    return model


def torch_pruning(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN by Torch-Pruning's `BasePruner`, everything else being ignored, as its examples say."""
    import torch_pruning as tp

    options = dict(job["options"])
    importance = getattr(tp.importance, options.pop("importance"))()
    if isinstance(importance, tp.importance.GroupTaylorImportance):
        backward(model, torch.cat(list(texts.values())))
    size = model.config.intermediate_size
    rows = {getattr(layer.mlp, name) for layer in model.model.layers for name in ("gate_proj", "up_proj")}
    other = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": next(iter(texts.values()))[:1, :16]},
        importance=importance,
        # The width is rounded down, which takes one more where the ratio comes out a little too large.
        pruning_ratio=(size - job["width"] - 0.5) / size,
        ignored_layers=[module for module in other if module not in rows],
        output_transform=lambda output: output.logits,
        **options,
    )
    pruner.step()
    # The pruner knows nothing of configs; its examples set the width like this.
    model.config.intermediate_size = widths(model)[0]
    return model


def optipfair(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN by OptiPFair's `prune_model`, with the calibration text where the options say so."""
    from optipfair import prune_model
    from torch.utils.data import DataLoader

    options = dict(job["options"])
    if options.pop("data", False):
        rows = [{"input_ids": ids} for ids in torch.cat(list(texts.values()))]
        options["dataloader"] = DataLoader(rows, batch_size=1)
    size = model.config.intermediate_size
    percentage = 100 * (size - job["width"] + 0.5) / size  # the number of channels that go is rounded down
    return prune_model(model, "MLP_GLU", pruning_percentage=percentage, show_progress=False, **options)


def quark(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN by AMD Quark's OSSCAR, which refits the down projection."""
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
    """Prune the FFN by torch-kirigami's greedy choice under a ratio per layer."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    ids = next(iter(texts.values()))[:1, :16]
    pruner = Pruner(model, graph=DependencyGraph.build(model, kwargs={"input_ids": ids, "use_cache": False}))
    ratio = ChannelRatio((model.config.intermediate_size - job["width"]) / model.config.intermediate_size)
    candidates = pruner.discover_candidates(targets=["*.mlp.gate_proj*"])
    model, _ = pruner.prune(candidates, budget=ratio, strategy=Greedy(GroupMagnitude(p=2)))
    model.config.intermediate_size = widths(model)[0]
    return model


def modelopt(model: Any, texts: Texts, job: dict[str, Any]) -> Any:
    """Prune the FFN by NVIDIA ModelOpt's Minitron, its mode for language models."""
    import modelopt.torch.prune as mtp

    rows = torch.cat(list(texts.values()))

    def forward_loop(model: Any) -> None:
        for ids in rows.split(1):
            model(input_ids=ids)

    constraints = {"export_config": {"ffn_hidden_size": job["width"]}}
    config = {"forward_loop": forward_loop}
    model, _ = mtp.prune(model, "mcore_minitron", constraints=constraints, dummy_input=rows[:1], config=config)
    return model


# What each tool imports is in memory before anything is measured.
TOOLS = {
    "optimum-structprune": (structprune, "optimum_structprune"),
    "torch-pruning": (torch_pruning, "torch_pruning"),
    "optipfair": (optipfair, "optipfair"),
    "amd-quark": (quark, "quark.torch"),
    "torch-kirigami": (kirigami, "torch_kirigami.pruning"),
    "nvidia-modelopt": (modelopt, "modelopt.torch.prune"),
}


class Samples:
    """The tokens that every row gets: calibration samples by domain, texts by name, and a probe."""

    def __init__(self, path: str):
        # The numbers in the names keep the order.
        parts = {tuple(name.split("/", 2)): tensor for name, tensor in sorted(load_file(path).items())}
        self.calibration, self.texts = (
            {name[2]: tensor for name, tensor in parts.items() if name[0] == kind} for kind in ("calibration", "texts")
        )
        self.probe = parts[("probe",)]

    def perplexities(self, model: Any) -> dict[str, float]:
        """The perplexity on each text."""
        return {name: perplexity(model, samples) for name, samples in self.texts.items()}


def prune(job: dict[str, Any]) -> dict[str, Any]:
    """Prune, measure time and memory, and save.

    Time is that of the tool, calibration included, by the clock and of all threads together. Memory is the highest
    resident set meanwhile, less what was resident before the model was loaded.
    """
    tool, module = TOOLS[job["tool"]]
    __import__(module)
    texts = Samples(job["texts"])
    torch.manual_seed(job["seed"])
    before = resident("VmRSS")
    model = dense(job["model"])
    Path("/proc/self/clear_refs").write_text("5")  # starts a new high-water mark
    start, busy = perf_counter(), process_time()
    model = tool(model, texts.calibration, job)
    seconds, cpu, peak = perf_counter() - start, process_time() - busy, resident("VmHWM") - before
    model.eval().zero_grad()
    answer = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak": peak,
        "parameters": parameters(model),
        "widths": widths(model),
        "probe": perplexity(model, texts.probe),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", job["tool"])},
    }
    if job["measure"]:
        return {**answer, "perplexity": texts.perplexities(model)}
    model.save_pretrained(job["out"])
    return answer


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Load what was saved and measure perplexity on every text, and on the probe, which shows if it is the same."""
    model = AutoModelForCausalLM.from_pretrained(job["out"], dtype=torch.float32).eval()
    texts = Samples(job["texts"])
    answer = {"parameters": parameters(model), "probe": perplexity(model, texts.probe)}
    if abs(answer["probe"] / job.get("probe", answer["probe"]) - 1) > 1e-3:
        raise ValueError(f"another model comes back: perplexity {answer['probe']:.2f} instead of {job['probe']:.2f}")
    return {**answer, "perplexity": texts.perplexities(model)}


def main(argv: list[str] | None = None) -> None:
    """Do the step that the arguments name."""
    step, path = sys.argv[1:] if argv is None else argv
    job = json.loads(Path(path).read_text())
    try:
        answer = {"prune": prune, "evaluate": evaluate}[step](job)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        Path(job["answer"]).write_text(json.dumps({"error": f"{type(error).__name__}: {lines[0]}"}))
        raise
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
