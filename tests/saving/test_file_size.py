"""The size of the served file is known before it is written, to the byte, and is within its limit."""

import random
from pathlib import Path

import pytest
from models import GROUPED, LLAMA3_ROPE, build, config, fewer_tokens, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError, StructPruner, dry_run, export_gguf, prune
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton, skeleton
from optimum_structprune.domains.manifest import remember_text
from optimum_structprune.saving.file_size import folder_bytes, safetensors_bytes, tokenizer_bytes
from optimum_structprune.saving.gguf_file import gguf_bytes
from optimum_structprune.saving.gguf_metadata import vocabulary_bytes
from optimum_structprune.vocabulary.tokens import Vocabulary
from optimum_structprune.widths.budget import budget_of


MODEL, READER = real_text_model()
LAYERS = {"per_layer_config": {1: {"intermediate_size": 24}}}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-by-layer": ("llama", {**LAYERS, "rope_parameters": LLAMA3_ROPE}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {}),
}


def family(case):
    """Return a small random model of a family, with rows of whole blocks and of other lengths."""
    model_type, fields = FAMILIES[case]
    sizes = {"vocab_size": len(READER), "max_position_embeddings": 512}
    return random_model(AutoModelForCausalLM, model_type, GROUPED | sizes | fields, seed=1)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_size_of_a_gguf_file_is_computed_to_the_byte(case, tmp_path):
    model = family(case)
    vocabulary = vocabulary_bytes(READER, model.config.vocab_size)
    for kind in ("f32", "f16", "q8_0", "q5_0", "q4_0"):
        # The shape determines the size, so a model without weights is enough.
        predicted = gguf_bytes(skeleton(model, model.config), vocabulary, kind)
        export_gguf(model, tmp_path / "a-name-of-the-file.gguf", READER, overwrite=True, dtype=kind)
        assert (tmp_path / "a-name-of-the-file.gguf").stat().st_size == predicted, kind


def test_a_model_card_does_not_change_the_size_of_a_gguf_file(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    sizes = set()
    for tags in ([], ["pruned"], [f"tag-{number}" for number in range(2000)]):
        card.write_text(f"---\nlicense: mit\nlanguage: [en, de]\ntags: {tags}\n---\n")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        sizes.add(export_gguf(model, tmp_path / "out.gguf", READER, overwrite=True).bytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("case", [*FAMILIES, "bert", "gpt2-tied", "gpt_oss"])
def test_the_size_of_a_folder_is_computed_to_the_byte(case, tmp_path):
    model = family(case) if case in FAMILIES else build(case)
    model.save_pretrained(tmp_path)
    READER.save_pretrained(tmp_path)
    predicted = safetensors_bytes(skeleton(model, model.config), model.dtype) + tokenizer_bytes(READER)
    assert folder_bytes(tmp_path) == predicted


@pytest.mark.parametrize("kind", ["q4_0", None])
def test_the_size_of_fewer_tokens_is_a_close_bound_once_they_are_ranked(kind):
    vocabulary = Vocabulary.of(READER)
    rows = len(READER)
    parts = set(vocabulary.fixed).union(vocabulary.letters)
    merged = [token for token in range(rows) if token not in parts]
    # A later token may be formed from earlier ones, as in a ranking.
    order = [*sorted(parts), *merged]

    remember_text(MODEL, READER)
    arch = describe(MODEL)
    settings = config(sparsity=None, budget={"file": 0.9}, gguf=kind, targets=["vocab"])
    budget = budget_of(settings, arch, MODEL, ["vocab"], order)
    for number in [len(parts), rows - 1, *random.Random(0).sample(range(len(parts), rows), 3)]:
        smaller = shrunk_skeleton(MODEL, arch, {"vocab": number})
        remember_text(smaller, vocabulary.smaller(sorted(order[:number])))
        exact = budget_of(settings, describe(smaller), smaller, ["vocab"]).figures({})["file"]
        assert exact <= budget.figures({"vocab": number})["file"] <= 1.01 * exact


@pytest.mark.parametrize("gguf", [None, "q8_0", "q4_0"])
@pytest.mark.parametrize("targets", [["mlp"], ["vocab"], ["vocab", "mlp"]], ids="-".join)
def test_the_written_file_has_the_predicted_size_within_the_limit(gguf, targets, tmp_path):
    # The tokens are a small part of this model.
    limit = 0.98 if targets == ["vocab"] else 0.85
    settings = fewer_tokens(widths=None, sparsity=None, budget={"file": limit}, gguf=gguf, targets=targets, round_to=1)
    result = prune(MODEL, settings, READER)
    file = result.report.file

    result.save(tmp_path / "small")
    if gguf is None:
        size = folder_bytes(tmp_path / "small")
        assert file.measured == size
    else:
        # The file is written from the saved folder, as the command does.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        reader = type(READER).from_pretrained(tmp_path / "small")
        size = export_gguf(model, tmp_path / "small.gguf", reader, dtype=gguf).bytes
    assert file.predicted == size
    assert 0.97 * file.asked <= size <= file.asked


def test_a_dry_run_predicts_the_size_too():
    settings = config(sparsity=None, budget={"file": "180kB"}, gguf="q4_0", targets=["mlp"])
    outcome = dry_run(MODEL.config, settings, tokenizer=READER)
    assert any(note.startswith("meets the budget: file 0.") and "of 0.18 MB" in note for note in outcome.notes)


@pytest.mark.parametrize(("fields", "message"), [
    ({"budget": {"file": "9GB"}}, r"file=9,000.00 MB is met by the original model, with 1.\d\d MB. Set a smaller"),
    ({"budget": {"file": "9GB"}, "gguf": "q4_0"}, r"met by the original model, with 0.\d\d MB"),
    ({"budget": {"file": "100kB"}}, r"file=0.10 MB cannot be met: .* widths of mlp .* has 0.\d\d MB of 1.\d\d"),
    ({"budget": {"file": "300kB"}, "gguf": "q4_k_m"}, "q4_k_m"),
    ({"budget": {"file": "300kB"}, "gguf": "q4"}, "GGUF has no data type 'q4'"),
])  # fmt: skip
def test_a_limit_that_cannot_be_met_is_refused(fields, message):
    settings = config(**({"sparsity": None, "targets": ["mlp"]} | fields))
    with pytest.raises(StructPruneError, match=message):
        StructPruner(settings).prune(MODEL, READER)


def test_the_size_of_k_quants_is_not_known_before(monkeypatch, tmp_path):
    program = tmp_path / "llama-quantize"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = config(sparsity=None, targets=["mlp"], budget={"file": "300kB"}, gguf="q4_k_m")
    with pytest.raises(StructPruneError, match="before it is written.*Set gguf to one of q8_0"):
        StructPruner(settings).prune(MODEL, READER)
    assert Path(program).is_file()
