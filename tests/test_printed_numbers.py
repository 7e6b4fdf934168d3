"""The numbers that commands print, computed again by plain formulas from the saved files.

Nothing here calls the functions that compute these numbers in the package.
"""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import save_with_tokenizer, write_texts
from models import GROUPED, build, byte_level, config, documents, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import StructPruner
from optimum_structprune.commands.cli import main


LENGTH = 24
NEIGHBOURS = 10


def stored(folder) -> dict[str, torch.Tensor]:
    """All tensors of a saved model. A tied tensor is stored once."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    return tensors


def number_of_values(folder) -> int:
    return sum(tensor.numel() for tensor in stored(folder).values())


def number_of_bytes(folder) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in stored(folder).values())


def layer_parameters(folder) -> int:
    return sum(tensor.numel() for name, tensor in stored(folder).items() if ".layers." in name)


def cache_bytes(folder) -> int:
    """One key and one value per KV head and layer, from the rows of the projections of keys and values."""
    total = 0
    for name, tensor in stored(folder).items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            total += tensor.shape[0] * tensor.element_size()
    return total


def printed(capsys, *words) -> dict:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def saved_pair(case, folder, widths, dtype=torch.float32):
    """Save a dense model and a pruned one."""
    dense = build(case).to(dtype)
    save_with_tokenizer(dense, folder / "dense")
    pruner = StructPruner(config(widths=widths))
    small = pruner.prune_model(dense, tokenizer())
    pruner.save(small, folder / "small", tokenizer())
    write_texts(folder / "a.jsonl", documents(40))
    return folder


@pytest.mark.parametrize(("case", "widths", "dtype"), [
    ("llama-tied", {"mlp": 24, "attention": 2}, torch.float32),
    ("llama-tied", {"mlp": 17}, torch.bfloat16),
    ("mixtral", {"mlp": 24}, torch.float32),
])  # fmt: skip
def test_sizes_are_those_of_the_saved_files(case, widths, dtype, tmp_path, capsys):
    saved_pair(case, tmp_path, widths, dtype)
    named = [f"{name}={width}" for name, width in widths.items()]
    flags = [word for pair in named for word in ("--width", pair)]
    plan = printed(capsys, "plan", tmp_path / "dense", *flags)
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    measured = printed(capsys, "evaluate", tmp_path / "dense", tmp_path / "small", "--device", "cpu", "--quiet")

    for when, which, name in (("before", "dense", "dense"), ("after", "pruned", "small")):
        folder = tmp_path / name
        assert plan["parameters"][when] == report[which]["parameters"] == number_of_values(folder)
        assert plan["memory"][when] == number_of_bytes(folder)
        assert plan["cache_per_token"][when] == cache_bytes(folder)
        size = measured["models"][name]["size"]
        assert size["parameters"] == number_of_values(folder)
        assert size["bytes"] == number_of_bytes(folder)
        assert size["cache_per_token"] == cache_bytes(folder)

    dense, small = layer_parameters(tmp_path / "dense"), layer_parameters(tmp_path / "small")
    assert plan["sparsity"] == pytest.approx(1 - small / dense)


def samples_of(folder) -> torch.Tensor:
    """The text in samples: documents between EOS tokens, each sample behind the BOS token."""
    reader = AutoTokenizer.from_pretrained(folder / "dense")
    ids = []
    for line in (folder / "a.jsonl").read_text().splitlines():
        ids += [*reader(json.loads(line)["text"], add_special_tokens=False)["input_ids"], reader.eos_token_id]
    rows = len(ids) // (LENGTH - 1)
    text = torch.tensor(ids[: rows * (LENGTH - 1)]).view(rows, LENGTH - 1)
    return torch.cat([torch.full((rows, 1), reader.bos_token_id), text], 1)


def documents_in(samples, folder) -> list[str]:
    """The documents of samples, without the first token of each sample, which is context only."""
    reader = AutoTokenizer.from_pretrained(folder)
    texts = []
    for row in samples[:, 1:].tolist():
        ids = []
        for token in [*row, reader.eos_token_id]:
            if token != reader.eos_token_id:
                ids.append(token)
            elif ids:
                texts.append(reader.decode(ids))
                ids = []
    return texts


@torch.no_grad()
def log_probabilities(folder, samples):
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    return model(samples).logits[:, :-1].log_softmax(-1)


def test_perplexity_kl_and_agreement_are_those_of_the_saved_models(tmp_path, capsys):
    saved_pair("llama-tied", tmp_path, {"mlp": 16})
    words = ["evaluate", tmp_path / "small", "--against", tmp_path / "dense", "--domain", f"a={tmp_path / 'a.jsonl'}"]
    values = printed(capsys, *words, "--seq-length", LENGTH, "--device", "cpu", "--quiet")
    figures = values["models"]["pruned"]["evaluation"]["domains"]["a"]

    samples = samples_of(tmp_path)[: figures["tokens"] // (LENGTH - 1)]
    assert figures["tokens"] == samples[:, 1:].numel()
    ours, theirs = log_probabilities(tmp_path / "small", samples), log_probabilities(tmp_path / "dense", samples)

    targets = samples[:, 1:, None]
    num_bytes = sum(len(text.encode()) for text in documents_in(samples, tmp_path / "dense"))
    for label, values in (("pruned", ours), ("dense", theirs)):
        losses = -values.gather(-1, targets)
        assert figures["perplexity"][label] == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
        bits = float(losses.sum()) / math.log(2)
        assert figures["bits_per_byte"][label] == pytest.approx(bits / num_bytes, rel=1e-5)

    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert figures["divergence"]["pruned"] == pytest.approx(float(kl), rel=1e-3)
    assert figures["agreement"]["pruned"] == pytest.approx(float(agreement))


@torch.no_grad()
def vectors(folder, texts) -> np.ndarray:
    """The mean last hidden state of each text."""
    model = AutoModel.from_pretrained(folder).eval()
    reader = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = torch.tensor([reader(text)["input_ids"]])
        rows.append(model(ids).last_hidden_state[0].double().mean(0).numpy())
    return np.stack(rows)


def test_cosines_and_neighbours_are_those_of_the_saved_encoders(tmp_path, capsys):
    for name, seed in (("dense", 0), ("small", 1)):
        save_with_tokenizer(build("bert-no-head", seed), tmp_path / name)
    first = [text[:40] for text in documents(30)]
    second = [text[5:50] for text in documents(30)]
    lines = [json.dumps(pair) for pair in zip(first, second, strict=True)]
    (tmp_path / "xx.jsonl").write_text("\n".join(lines))
    words = ["evaluate", tmp_path / "small", "--against", tmp_path / "dense", "--pairs", tmp_path / "xx.jsonl"]
    values = printed(capsys, *words, "--device", "cpu", "--quiet")
    figures = values["models"]["pruned"]["evaluation"]["domains"]["pairs xx"]["vectors"]

    texts = [text.strip() for text in first + second]
    ours, theirs = vectors(tmp_path / "small", texts), vectors(tmp_path / "dense", texts)
    ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    cosines = (ours * theirs).sum(1)
    assert figures["texts"] == len(texts)
    assert figures["cosine"]["pruned"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert figures["cosine_worst"] == pytest.approx(cosines.min(), abs=1e-5)
    assert figures["cosine_p5"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-5)

    shares = []
    for number in range(len(texts)):
        nearest = []
        for values in (ours, theirs):
            near = values @ values[number]
            near[number] = -2
            nearest.append(set(np.argsort(-near)[:NEIGHBOURS]))
        shares.append(len(nearest[0] & nearest[1]) / NEIGHBOURS)
    assert figures["neighbours"]["pruned"] == pytest.approx(np.mean(shares), abs=1e-6)

    # A text finds its translation if no other translation is nearer.
    half = len(first)
    for name, values in (("pruned", ours), ("dense", theirs)):
        near = values[:half] @ values[half:].T
        right = np.arange(half)
        found = [(near.argmax(1) == right).mean(), (near.argmax(0) == right).mean()]
        assert figures["retrieval"][name] == pytest.approx(np.mean(found))


# The bytes of a block of 32 values: a scale in 16 bits, and the values.
BLOCK_BYTES = {"q8_0": 2 + 32, "q4_0": 2 + 16}
ALIGNMENT = 32


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_the_size_of_a_gguf_file_is_that_of_its_tensors(kind, tmp_path, capsys):
    fields = {**GROUPED, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()
    reader = byte_level(["one two three " * 20], fields["vocab_size"])
    model.resize_token_embeddings(len(reader))
    save_with_tokenizer(model, tmp_path / "model", reader)
    printed_size = printed(capsys, "export", tmp_path / "model", tmp_path / "out.gguf", "--dtype", kind)

    size = gguf.GGUFReader(tmp_path / "out.gguf").data_offset
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        if tensor.ndim == 1 or kind == "f32":
            own = 4 * tensor.numel()
        elif kind == "f16":
            own = 2 * tensor.numel()
        else:
            is_head = name == "lm_head.weight"
            own = tensor.numel() // 32 * BLOCK_BYTES["q8_0" if is_head else kind]
        size += -(-own // ALIGNMENT) * ALIGNMENT
    assert (tmp_path / "out.gguf").stat().st_size == size == printed_size["bytes"]
    assert printed_size["parameters"] == number_of_values(tmp_path / "model")
