"""A GGUF file holds what the model holds, as llama.cpp reads it; `tests/test_llama_cpp.py` runs one."""

import json
import re
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import save_with_tokenizer
from models import GROUPED, build, config, full_disk, tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers import pre_tokenizers as steps
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as Replaced
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_structprune import StructPruneError, export_gguf, prune_model
from optimum_structprune.arch.llama_cpp import PRE_TOKENIZERS, gguf_architecture, gguf_refusal
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.saving.gguf_metadata import pre_tokenizer


UNEVEN = {1: {"intermediate_size": 24}}
TEXTS = [text[:2000] for _, text in zip(range(20), builtin_documents("math"), strict=False)]


def reader(pieces: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of 90 tokens: on SentencePiece's pieces, or on bytes."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True) if pieces else BPE())
    if pieces:
        backend.normalizer = Normalizers([Prepend("▁"), Replaced(" ", "▁")])
        backend.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    else:
        backend.pre_tokenizer = steps.Sequence([steps.Digits(True), steps.ByteLevel(add_prefix_space=False)])
    backend.train_from_iterator(TEXTS, BpeTrainer(vocab_size=90, special_tokens=special))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages[0]['content'] }}", **named)


@pytest.fixture(scope="module")
def differing():
    """A model whose layers differ in the widths of FFN and attention; no tokenizer is known of it."""
    pruned = prune_model(build("llama-tied"), config(widths={"mlp": [24, 40], "attention": [4, 2]}), tokenizer())
    model = type(pruned)(pruned.config)
    model.load_state_dict(pruned.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def alike():
    """A uniform model with biases and an output head of its own."""
    fields = {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()


def fields_of(model, folder, tokens=None) -> dict:
    """The fields of the file that a model is written to."""
    export_gguf(model, folder / "out.gguf", tokens or reader(pieces=False), overwrite=True)
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "out.gguf").fields.items()}


@pytest.mark.parametrize(
    ("case", "dtype"), [("differing", torch.float32), ("differing", torch.bfloat16), ("alike", torch.float16)], ids=str
)
def test_the_file_holds_the_weights(case, dtype, request, tmp_path):
    model = request.getfixturevalue(case)
    model = type(model)(model.config).to(dtype) if dtype != torch.float32 else model
    written = export_gguf(model, tmp_path / "out.gguf", reader(pieces=False))
    file = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    # The map is the one that llama.cpp's converter goes by.
    kind = gguf.MODEL_ARCH[written.architecture.upper()]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = found.pop(names.get_name(name, (".weight", ".bias")))
        if "q_proj" in name or "k_proj" in name:  # back into transformers' order
            values = values.reshape(-1, 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(values, parameter.detach().float().numpy()), name
    assert not found
    matrices = {tensor.tensor_type.name for tensor in file.tensors if tensor.data.ndim > 1}
    vectors = {tensor.tensor_type.name for tensor in file.tensors if tensor.data.ndim == 1}
    assert (matrices, vectors) == ({written.dtype}, {"F32"})
    assert written.parameters == model.num_parameters() and written.bytes == (tmp_path / "out.gguf").stat().st_size
    assert written.in_16_bits == 0 and "in 16 bits" not in str(written), "which was asked for"


def test_fewer_bits(tmp_path):
    """Values are as near as a block's steps, the head stays in eight bits, and rows that are no whole blocks in 16."""
    fields = {**GROUPED, "hidden_size": 64, "intermediate_size": 40, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    for kind, steps_in_block in (("q8_0", 254), ("q4_0", 14)):
        written = export_gguf(model, tmp_path / f"{kind}.gguf", reader(pieces=False), dtype=kind)
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        types = {name: tensor.tensor_type.name for name, tensor in found.items()}
        expected = {"output": "Q8_0", "token_embd": kind.upper(), "blk.0.ffn_up": kind.upper(), "output_norm": "F32"}
        assert expected == {name: types[f"{name}.weight"] for name in expected}
        assert types["blk.0.ffn_down.weight"] == "F16", "40 values are no whole blocks of 32"
        uneven = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
        assert written.in_16_bits == uneven and f"({uneven / written.parameters:.1%} of its para" in str(written)
        values = gguf.quants.dequantize(found["blk.1.ffn_up.weight"].data, gguf.GGMLQuantizationType[kind.upper()])
        wanted = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
        step = 2 * np.abs(wanted).reshape(-1, 32).max(1, keepdims=True) / steps_in_block
        # The scale has 16 bits, and the last of an even number of steps is cut off.
        assert (np.abs(values - wanted).reshape(-1, 32) <= 1.01 * step).all() and (values != wanted).any()
    with pytest.raises(StructPruneError, match="no data type 'q4'. Did you mean 'q4_"):
        export_gguf(model, tmp_path / "out.gguf", reader(pieces=False), dtype="q4")


def test_what_llama_cpp_quantises_itself(alike, tmp_path, monkeypatch):
    """A program in the place of `llama-quantize` gets the file in 16 bits, the name of the output and the type."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StructPruneError, match="llama-quantize, which is not on the PATH.*or use q4_0"):
        export_gguf(alike, tmp_path / "out.gguf", reader(pieces=False), dtype="q4_k_m")
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n/bin/cp "$1" "$2"; echo "$3" >> "$2"\n')
    program.chmod(0o755)
    assert export_gguf(alike, tmp_path / "out.gguf", reader(pieces=False), dtype="q4_k_m").dtype == "Q4_K_M"
    assert (tmp_path / "out.gguf").read_bytes().endswith(b"Q4_K_M\n")
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.file_type").contents() == 1
    program.write_text("#!/bin/sh\necho no room >&2; exit 1\n")
    with pytest.raises(StructPruneError, match="Q6_K: no room"):
        export_gguf(alike, tmp_path / "more.gguf", reader(pieces=False), dtype="q6_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "out.gguf"]


def test_sizes_are_those_of_each_layer_or_of_all(differing, alike, tmp_path):
    found = fields_of(differing, tmp_path)
    assert found["general.architecture"] == "deci" and found["deci.feed_forward_length"] == [24, 40]
    assert found["deci.attention.head_count"] == [8, 4] and found["deci.attention.head_count_kv"] == [4, 2]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 4
    assert found["deci.vocab_size"] == 96 and found["deci.block_count"] == 2
    found = fields_of(alike, tmp_path)
    assert found["general.architecture"] == "llama" and found["llama.feed_forward_length"] == 40
    assert found["llama.attention.head_count"] == 8 and found["llama.attention.head_count_kv"] == 4
    windowed = AutoModelForCausalLM.from_config(settings("mistral", sliding_window=16))
    assert fields_of(windowed, tmp_path)["llama.context_length"] == 16, "a text is no longer than a sliding window"


def test_scaled_frequencies_are_what_transformers_computes(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**GROUPED, "rope_parameters": rope}))
    export_gguf(model, tmp_path / "out.gguf", reader(pieces=False))
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight")
    np.testing.assert_allclose(1e4 ** -(np.arange(0, 4, 2) / 4) / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert factors.max() > 1


def test_a_vocabulary_of_bytes(alike, tmp_path):
    tokens = reader(pieces=False)
    tokens.add_tokens(["<|tool|>", "word"])
    found = fields_of(alike, tmp_path, tokens)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    names, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens.convert_tokens_to_ids(names[:92]) == [*range(92)]
    assert names[92:] == [f"[PAD{number}]" for number in range(92, 96)]  # the embedding has more rows
    kind = gguf.TokenType
    assert kinds[:3] == [kind.CONTROL] * 3 and set(kinds[3:90]) == {kind.NORMAL}
    assert kinds[90:] == [kind.CONTROL, kind.USER_DEFINED] + [kind.UNUSED] * 4
    merges = json.loads(tokens.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert not found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.chat_template"] == tokens.chat_template


def test_the_scores_of_pieces_give_the_merges_of_the_tokenizer(alike, tmp_path):
    """llama.cpp joins the two neighbours whose whole scores highest, the left ones among equals."""
    tokens = reader(pieces=True)
    found = fields_of(alike, tmp_path, tokens)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_space_prefix"]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    for text in TEXTS:
        words = [*("▁" + text[:200].replace(" ", "▁"))]
        while any("".join(pair) in scores for pair in pairwise(words)):
            best = max(range(len(words) - 1), key=lambda at: (scores.get(words[at] + words[at + 1], -np.inf), -at))
            words[best : best + 2] = [words[best] + words[best + 1]]
        assert words == tokens.tokenize(text[:200])


@pytest.mark.parametrize("key", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_what_comes_before_the_merges_is_known_by_its_steps(key):
    make = {
        "bytes": lambda regex: steps.ByteLevel(add_prefix_space=False, use_regex=regex),
        "digits": lambda single: steps.Digits(individual_digits=single),
        "split": lambda pattern: steps.Split(Regex(pattern), "isolated"),
    }
    *parts, ignore_merges = key
    made = [make[name](value) for name, value in parts]
    backend = Tokenizer(BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = steps.Sequence(made) if len(made) > 1 else made[0]
    assert pre_tokenizer(json.loads(backend.to_str())) == PRE_TOKENIZERS[key]
    backend.pre_tokenizer = steps.Sequence([steps.Punctuation(), *made])
    with pytest.raises(StructPruneError, match="differently from this tokenizer.*Punctuation.*pre-tokenizers: gpt-2"):
        pre_tokenizer(json.loads(backend.to_str()))


def test_a_tokenizer_that_llama_cpp_does_not_have_and_values_that_do_not_fit_are_refused(alike, tmp_path):
    (more := reader(pieces=False)).add_tokens([f"t{n}" for n in range(9)])
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0)], 0)))
    infinite = build("llama-tied").to(torch.float16)
    infinite.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    for model, tokens, reason in (
        (alike, tokenizer(), "is WordLevel"),
        (alike, unigram, "is Unigram"),
        (alike, more, "99 tokens, and the model has 96 rows"),
        (build("llama-tied").double(), reader(pieces=False), "`model` is in torch.float64"),
        (infinite, reader(pieces=False), "ffn_down.*beyond the range of float16"),
    ):
        with pytest.raises(StructPruneError, match=reason):
            export_gguf(model, tmp_path / "out.gguf", tokens)
    assert not [*tmp_path.iterdir()]


def test_what_may_be_replaced(alike, tmp_path):
    file, tokens = tmp_path / "out.gguf", reader(pieces=False)
    export_gguf(alike, file, tokens)
    before = file.read_bytes()
    with pytest.raises(StructPruneError, match="out.gguf exists"):
        export_gguf(alike, file, tokens)
    with full_disk(9_000), pytest.raises(StructPruneError, match="out.gguf could not be written"):
        export_gguf(alike, file, tokens, overwrite=True)
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]
    export_gguf(alike, file, tokens, overwrite=True)
    assert file.read_bytes() == before
    with pytest.raises(StructPruneError, match="is a folder. Choose a file in it"):
        export_gguf(alike, tmp_path, tokens, overwrite=True)


def test_prune_writes_it_beside_the_folder(tmp_path, monkeypatch, capsys):
    """Whatever cannot be written is refused before the weights, which are none here, are read."""
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(build("llama-tied"), "model", reader(pieces=False))
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    few = "--text text.jsonl --general-share 0 --num-samples 4 --seq-length 16"
    line = ["prune", "model", "small/", "--width", "mlp=32", "--device", "cpu", *few.split(), "--quiet"]
    assert main([*line, "--gguf", "Q8_0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["gguf"]
    assert shown["output"] == "small-Q8_0.gguf" and shown["bytes"] == Path("small-Q8_0.gguf").stat().st_size
    assert gguf.GGUFReader("small-Q8_0.gguf").get_field("llama.feed_forward_length").contents() == 32
    for path in Path("model").glob("*.safetensors"):
        path.write_bytes(b"")
    line[2] = "other"
    Path("other-F16.gguf").touch()
    for more, reason in (
        (["--gguf", "q4k"], "Did you mean 'q4_k_m'"),
        (["--gguf", "q4_k_m"], "use q4_0"),
        (["--gguf", "f16"], "other-F16.gguf exists"),
        (["--gguf", "q8_0", "--offload", "disk"], "leave out either"),
    ):
        assert main([*line, *more]) == 2
        assert reason in capsys.readouterr().err
    build("cohere2").config.save_pretrained("model")
    assert main([*line, "--gguf", "q8_0"]) == 2 and "this is a cohere2 model" in capsys.readouterr().err
    assert not Path("other").exists()


def settings(model_type, **fields):
    return AutoConfig.for_model(model_type, **{**GROUPED, **fields})


@pytest.mark.parametrize(("config", "reason"), [
    (settings("granitemoe"), "this is a granitemoe model.*convert_hf_to_gguf.py may support it"),
    (settings("olmo2", per_layer_config=UNEVEN), "only in llama.*--pad-uniform"),
    (settings("olmo2", num_attention_heads=4, num_key_value_heads=2), "olmo2 requires heads that are together"),
    (settings("gemma3_text", query_pre_attn_scalar=8), "query_pre_attn_scalar=4 only, got 8"),
    (settings("qwen3", per_layer_config=UNEVEN, tie_word_embeddings=False), "tie_word_embeddings=True only, got"),
    (settings("llama", hidden_act="gelu"), "hidden_act=silu only, got gelu"),
    (settings("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "only, got yarn"),
], ids=lambda value: value if isinstance(value, str) else value.model_type)  # fmt: skip
def test_what_has_none_gets_the_reason(config, reason):
    assert gguf_architecture(config) is None and re.search(reason, gguf_refusal(config))
