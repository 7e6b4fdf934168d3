"""The printed numbers of commands are recomputed by plain formulas from the saved files.

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


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    """Return all tensors of a saved model. A tied tensor is stored once."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    return tensors


def number_of_values(folder) -> int:
    return sum(tensor.numel() for tensor in stored_tensors(folder).values())


def number_of_bytes(folder) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(folder).values())


def layer_parameters(folder) -> int:
    return sum(tensor.numel() for name, tensor in stored_tensors(folder).items() if ".layers." in name)


def cache_bytes(folder) -> int:
    """Return the bytes of the KV cache per token.

    The projections of keys and values have one row for each number that a token adds to the cache.
    """
    total = 0
    for name, tensor in stored_tensors(folder).items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            total += tensor.shape[0] * tensor.element_size()
    return total


def printed_json(capsys, *words) -> dict:
    """Run a command, and return the JSON that it prints."""
    capsys.readouterr()
    arguments = [str(word) for word in words]
    arguments.append("--json")
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def save_pair(case, folder, widths, dtype=torch.float32):
    """Save an original model, a pruned model, and a text."""
    original = build(case).to(dtype)
    save_with_tokenizer(original, folder / "original")

    pruner = StructPruner(config(widths=widths))
    small = pruner.prune_model(original, tokenizer())
    pruner.save(small, folder / "small", tokenizer())
    write_texts(folder / "a.jsonl", documents(40))


@pytest.mark.parametrize(("case", "widths", "dtype"), [
    ("llama-tied", {"mlp": 24, "attention": 2}, torch.float32),
    ("llama-tied", {"mlp": 17}, torch.bfloat16),
    ("mixtral", {"mlp": 24}, torch.float32),
])  # fmt: skip
def test_sizes_match_the_saved_files(case, widths, dtype, tmp_path, capsys):
    save_pair(case, tmp_path, widths, dtype)
    flags = []
    for name, width in widths.items():
        flags += ["--width", f"{name}={width}"]
    plan = printed_json(capsys, "plan", tmp_path / "original", *flags)
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    measured = printed_json(
        capsys, "evaluate", tmp_path / "original", tmp_path / "small", "--device", "cpu", "--quiet"
    )

    for when, label, name in (("before", "original", "original"), ("after", "pruned", "small")):
        folder = tmp_path / name
        assert plan["parameters"][when] == report[label]["parameters"] == number_of_values(folder)
        assert plan["memory"][when] == number_of_bytes(folder)
        assert plan["cache_per_token"][when] == cache_bytes(folder)
        size = measured["models"][name]["size"]
        assert size["parameters"] == number_of_values(folder)
        assert size["bytes"] == number_of_bytes(folder)
        assert size["cache_per_token"] == cache_bytes(folder)

    original_parameters = layer_parameters(tmp_path / "original")
    small_parameters = layer_parameters(tmp_path / "small")
    assert plan["sparsity"] == pytest.approx(1 - small_parameters / original_parameters)


def samples_of(folder) -> torch.Tensor:
    """Return the saved text in samples. EOS tokens separate the documents, and a BOS token starts each sample."""
    reader = AutoTokenizer.from_pretrained(folder / "original")
    ids = []
    for line in (folder / "a.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids += reader(text, add_special_tokens=False)["input_ids"]
        ids.append(reader.eos_token_id)

    rows = len(ids) // (LENGTH - 1)
    samples = torch.tensor(ids[: rows * (LENGTH - 1)]).view(rows, LENGTH - 1)
    starts = torch.full((rows, 1), reader.bos_token_id)
    return torch.cat([starts, samples], 1)


def documents_in(samples, folder) -> list[str]:
    """Return the documents of samples without the first token of each sample, because nothing predicts it."""
    reader = AutoTokenizer.from_pretrained(folder)
    texts = []
    for row in samples[:, 1:].tolist():
        ids = []
        for token in row + [reader.eos_token_id]:
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


def test_perplexity_kl_and_agreement_match_the_saved_models(tmp_path, capsys):
    save_pair("llama-tied", tmp_path, {"mlp": 16})
    words = [
        "evaluate",
        tmp_path / "small",
        "--against",
        tmp_path / "original",
        "--domain",
        f"a={tmp_path / 'a.jsonl'}",
    ]
    values = printed_json(capsys, *words, "--seq-length", LENGTH, "--device", "cpu", "--quiet")
    figures = values["models"]["pruned"]["evaluation"]["domains"]["a"]

    samples = samples_of(tmp_path)[: figures["tokens"] // (LENGTH - 1)]
    assert figures["tokens"] == samples[:, 1:].numel()
    pruned_logprobs = log_probabilities(tmp_path / "small", samples)
    original_logprobs = log_probabilities(tmp_path / "original", samples)

    targets = samples[:, 1:, None]
    num_bytes = sum(len(text.encode()) for text in documents_in(samples, tmp_path / "original"))
    for label, logprobs in (("pruned", pruned_logprobs), ("original", original_logprobs)):
        losses = -logprobs.gather(-1, targets)
        assert figures["perplexity"][label] == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
        bits = float(losses.sum()) / math.log(2)
        assert figures["bits_per_byte"][label] == pytest.approx(bits / num_bytes, rel=1e-5)

    kl = (original_logprobs.exp() * (original_logprobs - pruned_logprobs)).sum(-1).mean()
    assert figures["divergence"]["pruned"] == pytest.approx(float(kl), rel=1e-3)

    agreement = (pruned_logprobs.argmax(-1) == original_logprobs.argmax(-1)).double().mean()
    assert figures["agreement"]["pruned"] == pytest.approx(float(agreement))


@torch.no_grad()
def normalized_vectors(folder, texts) -> np.ndarray:
    """Return the mean last hidden state of each text, scaled to length 1."""
    model = AutoModel.from_pretrained(folder).eval()
    reader = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = torch.tensor([reader(text)["input_ids"]])
        rows.append(model(ids).last_hidden_state[0].double().mean(0).numpy())

    vectors = np.stack(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest_neighbours(vectors, number) -> set:
    """Return the numbers of the vectors that are nearest to one vector."""
    similarities = vectors @ vectors[number]
    similarities[number] = -2
    return set(np.argsort(-similarities)[:NEIGHBOURS])


def test_cosines_and_neighbours_match_the_saved_encoders(tmp_path, capsys):
    save_with_tokenizer(build("bert-no-head", seed=0), tmp_path / "original")
    save_with_tokenizer(build("bert-no-head", seed=1), tmp_path / "small")
    first = [text[:40] for text in documents(30)]
    second = [text[5:50] for text in documents(30)]
    lines = [json.dumps(pair) for pair in zip(first, second, strict=True)]
    (tmp_path / "xx.jsonl").write_text("\n".join(lines))
    words = ["evaluate", tmp_path / "small", "--against", tmp_path / "original", "--pairs", tmp_path / "xx.jsonl"]
    values = printed_json(capsys, *words, "--device", "cpu", "--quiet")
    figures = values["models"]["pruned"]["evaluation"]["domains"]["pairs xx"]

    texts = [text.strip() for text in first + second]
    pruned_vectors = normalized_vectors(tmp_path / "small", texts)
    original_vectors = normalized_vectors(tmp_path / "original", texts)
    cosines = (pruned_vectors * original_vectors).sum(1)
    assert figures["texts"] == len(texts)
    assert figures["cosine"]["pruned"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert figures["cosine_worst"]["pruned"] == pytest.approx(cosines.min(), abs=1e-5)
    assert figures["cosine_p5"]["pruned"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-5)

    shares = []
    for number in range(len(texts)):
        shared = nearest_neighbours(pruned_vectors, number) & nearest_neighbours(original_vectors, number)
        shares.append(len(shared) / NEIGHBOURS)
    assert figures["neighbours"]["pruned"] == pytest.approx(np.mean(shares), abs=1e-6)

    half = len(first)
    for label, vectors in (("pruned", pruned_vectors), ("original", original_vectors)):
        reciprocal_ranks = []
        for number in range(half):
            nearest = np.argsort(-vectors[half:] @ vectors[number])
            reciprocal_ranks.append(1 / (1 + list(nearest).index(number)))
        assert figures["retrieval"][label] == pytest.approx(np.mean(reciprocal_ranks))


# The bytes of a block of 32 values: a scale in 16 bits, and the values.
BLOCK_BYTES = {"q8_0": 2 + 32, "q4_0": 2 + 16}
ALIGNMENT = 32


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_the_size_of_a_gguf_file_is_the_size_of_its_tensors(kind, tmp_path, capsys):
    fields = GROUPED | {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()
    reader = byte_level(["one two three " * 20], fields["vocab_size"])
    model.resize_token_embeddings(len(reader))
    save_with_tokenizer(model, tmp_path / "model", reader)
    printed_size = printed_json(capsys, "export", tmp_path / "model", tmp_path / "out.gguf", "--dtype", kind)

    size = gguf.GGUFReader(tmp_path / "out.gguf").data_offset
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        if tensor.ndim == 1 or kind == "f32":
            tensor_size = 4 * tensor.numel()
        elif kind == "f16":
            tensor_size = 2 * tensor.numel()
        elif name == "lm_head.weight":
            tensor_size = tensor.numel() // 32 * BLOCK_BYTES["q8_0"]
        else:
            tensor_size = tensor.numel() // 32 * BLOCK_BYTES[kind]
        size += math.ceil(tensor_size / ALIGNMENT) * ALIGNMENT
    assert (tmp_path / "out.gguf").stat().st_size == size == printed_size["bytes"]
    assert printed_size["parameters"] == number_of_values(tmp_path / "model")
