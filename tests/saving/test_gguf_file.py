"""A GGUF file has the weights, sizes and tokens of the model; `tests/test_llama_cpp.py` runs llama.cpp on one."""

import json
import re
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from helpers import save_with_tokenizer
from models import GROUPED, LLAMA3_ROPE, build, config, full_disk, tokenizer
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
TEXTS = [text[:2000] for text in islice(builtin_documents("math"), 20)]


def grouped_config(model_type, **fields):
    """Return a small config with grouped heads and some other fields."""
    return AutoConfig.for_model(model_type, **(GROUPED | fields))


def train_tokenizer(backend) -> PreTrainedTokenizerFast:
    """Train a backend to 90 tokens and return its tokenizer."""
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(TEXTS, BpeTrainer(vocab_size=90, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template="{{ messages[0]['content'] }}",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 90 tokens that merges bytes."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = steps.Sequence([steps.Digits(True), steps.ByteLevel(add_prefix_space=False)])
    return train_tokenizer(backend)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 90 tokens that merges pieces like SentencePiece."""
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = Normalizers([Prepend("▁"), Replaced(" ", "▁")])
    backend.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    return train_tokenizer(backend)


@pytest.fixture(scope="module")
def uneven_model():
    """Return a model whose layers differ in the widths of FFN and attention, without a record of its tokenizer."""
    pruned = prune_model(build("llama-tied"), config(widths={"mlp": [24, 40], "attention": [4, 2]}), tokenizer())
    model = type(pruned)(pruned.config)
    model.load_state_dict(pruned.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def uniform_model():
    """Return a uniform model with biases and an untied output head."""
    model_config = grouped_config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(model_config).eval()


def export_fields(model, folder, reader) -> dict:
    """Export a model and return the fields of the file."""
    export_gguf(model, folder / "out.gguf", reader, overwrite=True)
    fields = gguf.GGUFReader(folder / "out.gguf").fields
    return {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize(
    ("fixture", "dtype"),
    [("uneven_model", torch.float32), ("uneven_model", torch.bfloat16), ("uniform_model", torch.float16)],
    ids=str,
)
def test_the_file_has_the_weights_of_the_model(fixture, dtype, request, tmp_path):
    model = request.getfixturevalue(fixture)
    if dtype != torch.float32:
        model = type(model)(model.config).to(dtype)

    exported = export_gguf(model, tmp_path / "out.gguf", byte_tokenizer())

    file = gguf.GGUFReader(tmp_path / "out.gguf")
    values_by_name = {}
    for tensor in file.tensors:
        values_by_name[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    # The converter of llama.cpp uses the same map of names.
    kind = gguf.MODEL_ARCH[exported.architecture.upper()]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = values_by_name.pop(names.get_name(name, (".weight", ".bias")))
        if "q_proj" in name or "k_proj" in name:  # back into the order of transformers
            values = values.reshape(-1, 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(values, parameter.detach().float().numpy()), name
    assert not values_by_name

    matrix_types = {tensor.tensor_type.name for tensor in file.tensors if tensor.data.ndim > 1}
    vector_types = {tensor.tensor_type.name for tensor in file.tensors if tensor.data.ndim == 1}
    assert matrix_types == {exported.dtype}
    assert vector_types == {"F32"}
    assert exported.parameters == model.num_parameters()
    assert exported.bytes == (tmp_path / "out.gguf").stat().st_size

    # Only weights that do not fit into blocks of fewer bits are listed as weights in 16 bits.
    assert exported.in_16_bits == 0
    assert "in 16 bits" not in str(exported)


@pytest.mark.parametrize(("dtype", "steps_in_block"), [("q8_0", 254), ("q4_0", 14)])
def test_weights_in_fewer_bits_are_within_a_step_of_their_block(dtype, steps_in_block, tmp_path):
    """The output head has eight bits, and rows that do not fit into blocks have 16 bits."""
    model_config = grouped_config("llama", hidden_size=64, intermediate_size=40, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(model_config)

    exported = export_gguf(model, tmp_path / "out.gguf", byte_tokenizer(), dtype=dtype)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["output.weight"] == "Q8_0"
    assert types["token_embd.weight"] == dtype.upper()
    assert types["blk.0.ffn_up.weight"] == dtype.upper()
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.ffn_down.weight"] == "F16", "rows of 40 values do not fit into blocks of 32"

    in_16_bits = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    assert exported.in_16_bits == in_16_bits
    assert f"({in_16_bits / exported.parameters:.1%} of its para" in str(exported)

    quantization_type = gguf.GGMLQuantizationType[dtype.upper()]
    values = gguf.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, quantization_type)
    weights = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    step = 2 * np.abs(weights).reshape(-1, 32).max(1, keepdims=True) / steps_in_block
    errors = np.abs(values - weights).reshape(-1, 32)
    # The scale has 16 bits, and the last of an even number of steps is cut off.
    assert (errors <= 1.01 * step).all()
    assert (values != weights).any()


def test_an_unknown_data_type_is_refused_with_a_suggestion(uniform_model, tmp_path):
    with pytest.raises(StructPruneError, match="no data type 'q4'. Did you mean 'q4_"):
        export_gguf(uniform_model, tmp_path / "out.gguf", byte_tokenizer(), dtype="q4")


def test_the_program_of_llama_cpp_quantizes_other_types(uniform_model, tmp_path, monkeypatch):
    """A script replaces `llama-quantize`. It gets the file in 16 bits, the name of the output and the type."""
    out = tmp_path / "out.gguf"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StructPruneError, match="llama-quantize, which is not on the PATH.*or use q4_0"):
        export_gguf(uniform_model, out, byte_tokenizer(), dtype="q4_k_m")

    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n/bin/cp "$1" "$2"; echo "$3" >> "$2"\n')
    program.chmod(0o755)
    exported = export_gguf(uniform_model, out, byte_tokenizer(), dtype="q4_k_m")
    assert exported.dtype == "Q4_K_M"
    assert out.read_bytes().endswith(b"Q4_K_M\n")
    assert gguf.GGUFReader(out).get_field("general.file_type").contents() == 1

    program.write_text("#!/bin/sh\necho no room >&2; exit 1\n")
    with pytest.raises(StructPruneError, match="Q6_K: no room"):
        export_gguf(uniform_model, tmp_path / "more.gguf", byte_tokenizer(), dtype="q6_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "out.gguf"]


def test_an_uneven_model_has_the_sizes_of_each_layer(uneven_model, tmp_path):
    fields = export_fields(uneven_model, tmp_path, byte_tokenizer())
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [24, 40]
    assert fields["deci.attention.head_count"] == [8, 4]
    assert fields["deci.attention.head_count_kv"] == [4, 2]
    assert fields["deci.attention.key_length"] == 4
    assert fields["deci.rope.dimension_count"] == 4
    assert fields["deci.vocab_size"] == 96
    assert fields["deci.block_count"] == 2


def test_a_uniform_model_has_the_sizes_of_all_layers(uniform_model, tmp_path):
    fields = export_fields(uniform_model, tmp_path, byte_tokenizer())
    assert fields["general.architecture"] == "llama"
    assert fields["llama.feed_forward_length"] == 40
    assert fields["llama.attention.head_count"] == 8
    assert fields["llama.attention.head_count_kv"] == 4


def test_the_context_is_no_longer_than_a_sliding_window(tmp_path):
    model = AutoModelForCausalLM.from_config(grouped_config("mistral", sliding_window=16))
    assert export_fields(model, tmp_path, byte_tokenizer())["llama.context_length"] == 16


def test_scaled_frequencies_agree_with_transformers(tmp_path):
    model = AutoModelForCausalLM.from_config(grouped_config("llama", rope_parameters=LLAMA3_ROPE))
    export_gguf(model, tmp_path / "out.gguf", byte_tokenizer())

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    frequencies = 1e4 ** -(np.arange(0, 4, 2) / 4) / factors
    np.testing.assert_allclose(frequencies, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert factors.max() > 1


def test_the_file_has_the_vocabulary_of_a_byte_tokenizer(uniform_model, tmp_path):
    reader = byte_tokenizer()
    reader.add_tokens(["<|tool|>", "word"])

    fields = export_fields(uniform_model, tmp_path, reader)

    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"

    names = fields["tokenizer.ggml.tokens"]
    assert reader.convert_tokens_to_ids(names[:92]) == list(range(92))
    # The embedding has more rows than the tokenizer has tokens.
    assert names[92:] == [f"[PAD{number}]" for number in range(92, 96)]

    token_types = fields["tokenizer.ggml.token_type"]
    assert token_types[:3] == [gguf.TokenType.CONTROL] * 3
    assert set(token_types[3:90]) == {gguf.TokenType.NORMAL}
    assert token_types[90:92] == [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    assert token_types[92:] == [gguf.TokenType.UNUSED] * 4

    merges = json.loads(reader.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == reader.chat_template


def merge_by_score(text, scores):
    """Merge characters like llama.cpp: always the neighbours with the highest score, the first pair among equals."""
    words = list(text)
    while True:
        best_place = None
        best_score = -np.inf
        for place, pair in enumerate(pairwise(words)):
            score = scores.get("".join(pair), -np.inf)
            if score > best_score:
                best_place = place
                best_score = score

        if best_place is None:
            return words
        words[best_place : best_place + 2] = [words[best_place] + words[best_place + 1]]


def test_the_added_tokens_are_read_once(uniform_model, tmp_path, monkeypatch):
    """A tokenizer makes them anew at each read. With one read for each token, Gemma's file would take half an hour."""
    original = PreTrainedTokenizerFast.added_tokens_decoder
    reads = []

    def added_tokens_decoder(self):
        reads.append(self)
        return original.fget(self)

    monkeypatch.setattr(PreTrainedTokenizerFast, "added_tokens_decoder", property(added_tokens_decoder))
    export_gguf(uniform_model, tmp_path / "out.gguf", byte_tokenizer())
    assert 0 < len(reads) < 5


def test_the_scores_of_pieces_lead_to_the_merges_of_the_tokenizer(uniform_model, tmp_path):
    reader = piece_tokenizer()
    fields = export_fields(uniform_model, tmp_path, reader)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "default"
    assert fields["tokenizer.ggml.add_space_prefix"]

    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    for text in TEXTS:
        beginning = text[:200]
        words = merge_by_score("▁" + beginning.replace(" ", "▁"), scores)
        assert words == reader.tokenize(beginning)


@pytest.mark.parametrize("key", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_a_pre_tokenizer_is_recognised_by_its_steps(key):
    make = {
        "bytes": lambda regex: steps.ByteLevel(add_prefix_space=False, use_regex=regex),
        "digits": lambda single: steps.Digits(individual_digits=single),
        "split": lambda pattern: steps.Split(Regex(pattern), "isolated"),
    }
    *parts, ignore_merges = key
    known_steps = [make[name](value) for name, value in parts]
    backend = Tokenizer(BPE(ignore_merges=ignore_merges))
    if len(known_steps) > 1:
        backend.pre_tokenizer = steps.Sequence(known_steps)
    else:
        backend.pre_tokenizer = known_steps[0]
    assert pre_tokenizer(json.loads(backend.to_str())) == PRE_TOKENIZERS[key]

    backend.pre_tokenizer = steps.Sequence([steps.Punctuation()] + known_steps)
    with pytest.raises(StructPruneError, match="differently from this tokenizer.*Punctuation.*pre-tokenizers: gpt-2"):
        pre_tokenizer(json.loads(backend.to_str()))


def test_unknown_tokenizers_and_values_that_do_not_fit_are_refused(uniform_model, tmp_path):
    large_tokenizer = byte_tokenizer()
    large_tokenizer.add_tokens([f"t{number}" for number in range(9)])
    unigram_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0)], 0)))
    infinite_model = build("llama-tied").to(torch.float16)
    infinite_model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")

    for model, reader, reason in (
        (uniform_model, tokenizer(), "is WordLevel"),
        (uniform_model, unigram_tokenizer, "is Unigram"),
        (uniform_model, large_tokenizer, "99 tokens, and the model has 96 rows"),
        (build("llama-tied").double(), byte_tokenizer(), "`model` is in torch.float64"),
        (infinite_model, byte_tokenizer(), "ffn_down.*beyond the range of float16"),
    ):
        with pytest.raises(StructPruneError, match=reason):
            export_gguf(model, tmp_path / "out.gguf", reader)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_on_request_and_only_by_a_complete_file(uniform_model, tmp_path):
    file = tmp_path / "out.gguf"
    reader = byte_tokenizer()
    export_gguf(uniform_model, file, reader)
    original = file.read_bytes()

    with pytest.raises(StructPruneError, match="out.gguf exists"):
        export_gguf(uniform_model, file, reader)
    with full_disk(9_000), pytest.raises(StructPruneError, match="out.gguf could not be written"):
        export_gguf(uniform_model, file, reader, overwrite=True)
    assert file.read_bytes() == original
    assert list(tmp_path.iterdir()) == [file]

    export_gguf(uniform_model, file, reader, overwrite=True)
    assert file.read_bytes() == original
    with pytest.raises(StructPruneError, match="is a folder. Choose a file in it"):
        export_gguf(uniform_model, tmp_path, reader, overwrite=True)


def test_the_command_prune_writes_a_file_next_to_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(build("llama-tied"), "model", byte_tokenizer())
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = (
        "--width mlp=32 --device cpu --text text.jsonl --general-share 0 --num-samples 4 --seq-length 16 --quiet"
    ).split()

    assert main(["prune", "model", "small/"] + options + ["--gguf", "Q8_0", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)["gguf"]
    assert output["output"] == "small-Q8_0.gguf"
    assert output["bytes"] == Path("small-Q8_0.gguf").stat().st_size
    assert gguf.GGUFReader("small-Q8_0.gguf").get_field("llama.feed_forward_length").contents() == 32

    # Invalid requests are refused before the weights are read, so empty files of weights raise no other error.
    for path in Path("model").glob("*.safetensors"):
        path.write_bytes(b"")
    Path("other-F16.gguf").touch()
    command = ["prune", "model", "other"] + options
    for arguments, reason in (
        (["--gguf", "q4k"], "Did you mean 'q4_k_m'"),
        (["--gguf", "q4_k_m"], "use q4_0"),
        (["--gguf", "f16"], "other-F16.gguf exists"),
        (["--gguf", "q8_0", "--offload", "disk"], "Leave out either"),
    ):
        assert main(command + arguments) == 2
        assert reason in capsys.readouterr().err

    build("cohere2").config.save_pretrained("model")
    assert main(command + ["--gguf", "q8_0"]) == 2
    assert "this is a cohere2 model" in capsys.readouterr().err
    assert not Path("other").exists()


def test_the_space_for_the_folder_and_the_file_is_checked_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(build("llama-tied"), "model", byte_tokenizer())
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = "--width mlp=32 --device cpu --text text.jsonl --general-share 0 --num-samples 4 --seq-length 16 --quiet"
    arguments = [*options.split(), "--gguf", "f32"]

    # Another process fills the disk during the run.
    no_space = StructPruneError("There is no space left.")
    monkeypatch.setattr("optimum_structprune.commands.export.export_gguf", Mock(side_effect=no_space))
    assert main(["prune", "model", "small", *arguments]) == 2
    assert "There is no space left. The model is saved in small." in capsys.readouterr().err
    model_bytes = Path("small/model.safetensors").stat().st_size

    # There is space for the folder alone. Weights that cannot be read show that the check comes first.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1.5 * model_bytes))
    Path("model/model.safetensors").write_bytes(b"")
    assert main(["prune", "model", "other", *arguments]) == 2
    assert "other takes about" in capsys.readouterr().err


def case_id(value):
    """Name a test by the model type of its config and by its reason."""
    if isinstance(value, str):
        return value
    return value.model_type


@pytest.mark.parametrize(("config", "reason"), [
    (grouped_config("granitemoe"), "this is a granitemoe model.*convert_hf_to_gguf.py may support it"),
    (grouped_config("olmo2", per_layer_config=UNEVEN), "only in llama.*--pad-uniform"),
    (grouped_config("olmo2", num_attention_heads=4, num_key_value_heads=2),
     "olmo2 requires heads that are together"),
    (grouped_config("gemma3_text", query_pre_attn_scalar=8), "query_pre_attn_scalar=4 only, got 8"),
    (grouped_config("qwen3", per_layer_config=UNEVEN, tie_word_embeddings=False),
     "tie_word_embeddings=True only, got"),
    (grouped_config("llama", hidden_act="gelu"), "hidden_act=silu only, got gelu"),
    (grouped_config("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
     "only, got yarn"),
], ids=case_id)  # fmt: skip
def test_models_without_an_architecture_in_llama_cpp_are_refused_with_a_reason(config, reason):
    assert gguf_architecture(config) is None
    assert re.search(reason, gguf_refusal(config))
