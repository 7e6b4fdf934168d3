"""What cannot be met or used is refused before any text is read, and what has no effect is named."""

import warnings
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pandas
import pytest
import torch
from helpers import recovery_config, same_weights, unread
from models import build, config, token_ids, tokenizer
from transformers import BertForMaskedLM, GenerationConfig, LlamaForCausalLM, Wav2Vec2FeatureExtractor

from optimum_structprune import RecoveryConfig, RunOptions, StructPruneCallback, StructPruneConfig, prune, prune_model
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.config.domains import DomainConfig
from optimum_structprune.criteria import CRITERIA, register_criterion
from optimum_structprune.domains.sources import documents as read
from optimum_structprune.dryrun import dry_run
from optimum_structprune.errors import InPlaceError, StructPruneError
from optimum_structprune.forward.metrics import perplexity
from optimum_structprune.pruning.request import DRY_RUN, resolve_request, without_effect
from optimum_structprune.saving.gguf_file import export_gguf


def blind(**fields) -> StructPruneConfig:
    """A config of the tests whose text must not be read."""
    return config(**{"domains": [DomainConfig(name=name, source=unread()) for name in "ab"], **fields})


def training(**fields) -> RecoveryConfig:
    return recovery_config(domains=[DomainConfig(name="x", source=unread())], **fields)


MEASURED = {"allocation": "sensitivity", "round_to": 4}
ONLY_LAYERS = "scores whole layers only"
# Every rule for a pruning: a model, the config, and the message.
REFUSED = [
    # the model
    ("llama-tied", {"seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
    ("mpt", {"widths": {"layer": 1}, "seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
    # how much
    ("llama-tied", {"widths": {"mpl": 3}}, "no space 'mpl' to prune. Did you mean 'mlp'"),
    ("llama-tied", {"widths": {"attention": 3}}, "nearest legal choice is 2 or 4"),
    ("llama-tied", {"widths": {"mlp": 41}}, r"'mlp'\] = 41 is not legal.*has 40. The nearest legal choice is 40"),
    ("llama-tied", {"sparsity": 0.999}, "is too large. At most 0."),
    ("llama-tied", {"sparsity": 0.2, "targets": ("mlp", "layer")}, "Target 'layer' alone, or set `widths`"),
    ("llama-tied", {"skip_layers": (5,)}, "skip_layers names layer 5. The layers are 0 to 1"),
    ("llama-tied", {"skip_layers": (0, 1)}, "leaves no layer whose 'mlp'"),
    ("opt", {"widths": {"attention": 2}}, "no space 'attention' to prune: transformers derives the head dimension"),
    ("llama-tied", {"widths": {"layer": 3}}, "= 3 is not legal.*has 2. The nearest legal choice is 2"),
    ("mixtral", {"widths": {"expert": 1}}, "'expert'.*= 1 is not legal.*has 4. The nearest legal choice is 2"),
    ("mixtral", {"widths": {"mlp": 20}}, "nearest legal choice is 16 or 24"),
    ("mixtral", {"sparsity": 0.2, "targets": ("mlp", "expert")}, "says how much of each"),
    ("deepseek_v3-groups", {"widths": {"expert": 3}}, "n_group = None or 1, and this config has 2"),
    ("olmoe", {"widths": {"attention": 2}}, "q_norm and k_norm divide"),
    ("llama-tied", {"widths": {"hidden": 30}}, "= 30 is not legal.*has 32. The nearest legal choice is 24 or 32"),
    ("gpt2-tied", {"widths": {"hidden": 24}}, "no space 'hidden' to prune: LayerNorm takes the mean"),
    ("llava", {"widths": {"hidden": 24}}, "inputs other than text write to the residual stream too"),
    # of single layers
    ("llama-tied", {"widths": {"mlp": [24, 41]}}, r"\['mlp'\]\[1\] = 41 is not legal.*nearest legal choice is 40"),
    ("llama-tied", {"widths": {"mlp": [24]}}, r"list of length 1, and the model has 2 layers\. .*: \{0: 24\}"),
    ("llama-tied", {"widths": {"mlp": {2: 24}}}, "names layer 2, which has no 'mlp'. The layers that have it are 0"),
    ("bert", {"widths": {"mlp": [24, 32]}}, "layers of different widths, which 'mlp' of a bert model cannot"),
    ("phi3", {"widths": {"attention": [2, 4]}}, "'attention' of a phi3.*number of heads"),
    ("mixtral", {"widths": {"expert": 3}, "skip_layers": (0,)}, r"skip_layers=\[0\].*'expert'.*router"),
    ("llava", {"skip_layers": [0]}, "only a text model by itself"),
    ("llama-tied", {"sparsity": 0.1, **MEASURED, "targets": ["layer"]}, "which 'layer' of a llama model cannot have"),
    (
        "llama-tied",
        {"sparsity": 0.2, "targets": ("hidden",), "allocation": "sensitivity"},
        "belongs to the whole model",
    ),
    ("t5", {"widths": {"layer": 1}}, "no space 'layer' to prune: encoder and decoder count"),
    # the criterion
    ("llama-tied", {"criterion": "wnada"}, "no criterion 'wnada'. Did you mean 'wanda'"),
    ("llama-tied", {"criterion": "block_influence"}, ONLY_LAYERS),
    ("llama-tied", {"widths": {"layer": 1, "mlp": 24}, "criterion": "block_influence"}, ONLY_LAYERS),
    # the spaces
    ("bert", {"allocation": "sensitivity"}, "layers of different widths are offered for decoders only"),
    # the recovery, of which `recovery/test_checks.py` has the other rules
    ("bert", {"recovery": training()}, "Recovery trains causal language models, and BertForMaskedLM is not one"),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED)
def test_it_is_refused_before_text_is_read(case, fields, message):
    model = build(case)
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as refused:
        prune_model(model, blind(**fields), tokenizer(), inplace=True)
    assert not isinstance(refused.value, InPlaceError) and same_weights(model, before)
    if not {"recovery", "seq_length"} & set(fields):
        model.config.architectures = [type(model).__name__]
        with pytest.raises(StructPruneError, match=message):
            dry_run(model.config, blind(**fields))


def test_the_text_is_what_a_run_reads_next():
    """Otherwise the test above would show nothing."""
    by_layer = {"sparsity": 0.2, "allocation": "sensitivity"}  # by default in spaces whose layers may differ
    for fields in ({}, {"recovery": training()}, {"widths": {"layer": 1, "hidden": 24, "mlp": 24}}, by_layer):
        with pytest.raises(pytest.fail.Exception, match="text was read"):
            prune_model(build("phi3"), blind(**fields), tokenizer())
    with pytest.raises(StructPruneError, match="reading them takes a tokenizer"):
        prune_model(build("llama-tied"), blind(), None)


@pytest.mark.parametrize(("fields", "message"), [
    ({"allocation": "sensitivity"}, "measures losses of the dense model"),
    ({"recovery": training()}, "a Trainer trains already"),
    ({"widths": {"layer": 1}}, "'layer' belongs to the whole model"),
    ({"widths": {"hidden": 24}}, "'hidden' belongs to the whole model"),
    ({"widths": {"vocab": 64}}, "'vocab' belongs to the whole model"),
    ({"seq_length": 65}, "longer than the model's 64 positions"),
    ({"criterion": "wnada"}, "Did you mean 'wanda'"),
])  # fmt: skip
def test_what_a_trainer_cannot_do(fields, message):
    model, settings = build("llama-tied"), blind(**fields)
    with pytest.raises(StructPruneError, match=message):
        StructPruneCallback(settings).begin(model)
    takes_the_model = {"widths", "seq_length", "criterion"} & set(fields)
    with nullcontext() if takes_the_model else pytest.raises(StructPruneError, match=message):
        StructPruneCallback(settings)
    with pytest.raises(StructPruneError, match="checkpoint_dir spans the layers"):
        StructPruneCallback(blind(), options=RunOptions(checkpoint_dir="x"))
    model.is_quantized = True
    with pytest.raises(StructPruneError, match=r"quantized. Prune `model.dequantize\(\)`"):
        StructPruneCallback(blind()).begin(model)


def test_what_a_run_remembers_is_not_put_beside_a_model_and_takes_one_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("llama-tied").save_pretrained("model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StructPruneError, match="model holds a model. Pass another folder"):
        prune_model(build("llama-tied"), blind(), tokenizer(), options=RunOptions(checkpoint_dir="model"))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StructPruneError, match="checkpoint_dir='run' .*rounds=2"):
        prune_model(build("llama-tied"), blind(rounds=2), tokenizer(), options=RunOptions(checkpoint_dir="run"))


def test_losses_are_measured_of_models_that_predict_tokens():
    with pytest.raises(StructPruneError, match="makes none. Use allocation='uniform'"):
        prune_model(build("llama-tied").model, blind(**MEASURED), tokenizer())


# --- options without effect
def test_layers_that_transformers_does_not_load_are_said_to_be_gone():
    model = build("glm4_moe")
    with pytest.warns(UserWarning, match="num_nextn_predict_layers.*its config says 0"):
        pruned = prune_model(model, config(widths={"expert": 3}, num_samples=2), tokenizer())
    assert model.config.num_nextn_predict_layers == 1
    assert pruned.config.num_nextn_predict_layers == pruned.config.to_dict()["num_nextn_predict_layers"] == 0


def test_check_warns_once_of_all_of_them():
    dense = ModelInfo.of(build("llama-tied"))
    with pytest.warns(
        UserWarning, match="have no effect here: round_to=8, because .*; keep_tokens='a', because"
    ) as caught:
        resolve_request(blind(round_to=8, keep_tokens="a"), dense, use=DRY_RUN)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_request(blind(error_feedback=0.2), dense, use=DRY_RUN)
        resolve_request(blind(sparsity=0.2, round_to=8, rounds=2), dense, use=DRY_RUN)


# For each option: with what else it is tried, and whether the pruned model is another one then.
@pytest.mark.filterwarnings("ignore:These options have no effect")
@pytest.mark.parametrize(("name", "value", "fields", "matters"), [
    ("targets", ["mlp"], {"widths": {"mlp": 24, "attention": 2}}, False),
    ("targets", ["attention"], {"sparsity": 0.2, "round_to": 4}, True),
    ("round_to", 8, {"widths": {"mlp": 21}}, False),
    ("round_to", 8, {"widths": {"mlp": 21}, "allocation": "sensitivity"}, True),
    ("round_to", 8, {"sparsity": 0.3}, True),
    ("error_feedback", 0.0, {"refit": "none"}, False),
    ("error_feedback", 0.0, {}, True),
])  # fmt: skip
def test_what_is_said_to_have_no_effect_has_none(name, value, fields, matters):
    model, settings = build("llama-tied"), config(**fields)
    model.model.layers[1].mlp.down_proj.weight.data *= 0.1  # so that layers differ where they may
    changed = StructPruneConfig.from_dict({**settings.to_dict(), "domains": settings.domains, name: value})
    left, right = (prune_model(model, one, tokenizer()) for one in (settings, changed))
    assert same_weights(left, right) != matters
    idle = without_effect(changed, list(changed.widths or changed.targets_or_default))
    assert any(entry.startswith(f"{name}=") for entry in idle) != matters


# --- what is of another kind than a parameter takes is refused by name, and nothing has changed then
IDS = token_ids(12, 16)
WRONG = [
    ({"model": "some/model"}, "`model` must be a transformers model, got str"),
    ({"tokenizer": "some/model"}, "`tokenizer` must be a transformers tokenizer, got str"),
    (
        {"tokenizer": Wav2Vec2FeatureExtractor()},
        "`tokenizer` must be a transformers tokenizer, got Wav2Vec2FeatureExtractor",
    ),
    ({"config": {"sparsity": 0.2}}, "`config` must be a StructPruneConfig, got dict"),
    ({"options": {"batch_size": 2}}, "`options` must be a RunOptions, got dict. RunOptions.from_dict"),
    ({"inputs": [IDS]}, "`inputs` must be a mapping .*, got list"),
    ({"inputs": {"a": IDS.numpy()}}, r"inputs\['a'\] must be a tensor, got ndarray"),
    ({"inputs": {"a": IDS[0]}}, r"shape \(16,\) .* of shape \(samples, tokens\)"),
    ({"inputs": {"a": IDS + 1000}}, "the token ids of this model are from 0 to"),
    ({"inputs": {"a": IDS.repeat(1, 5)}}, "80 tokens, is longer than the model.s 64 positions"),
    ({"inputs": {"a": IDS - 1000}}, "has token ids from -"),
    ({"inputs": {"a": IDS.int()}}, "type torch.int32.*int64 token ids"),
    ({"inputs": {"a": IDS.float()}}, "type torch.float32.*int64 token ids"),
    ({"inputs": {"a": IDS[:, :0]}}, r"shape \(12, 0\).*2 tokens or more"),
    ({"inputs": {"a": IDS[:, :1]}}, "2 tokens or more"),
    ({"inputs": {"a": IDS.to_sparse()}}, "the layout torch.sparse_coo. Pass a dense tensor"),
    ({"inputs": {"a": IDS.to("meta")}}, "on the meta device. Pass a tensor with values"),
    ({"inputs": {1: IDS}}, "got 1. Pass '1'"),
]


def test_another_kind_is_refused():
    model = build("llama-tied")
    for fields, message in WRONG:
        arguments = {"model": model, "config": config(), "tokenizer": tokenizer(), **fields}
        with pytest.raises(StructPruneError, match=message):
            prune_model(**arguments, inplace=True)
    assert same_weights(model, build("llama-tied"))


def test_the_length_of_samples_of_a_config_says_nothing_of_inputs():
    result = prune(build("llama-tied"), config(seq_length=65), inputs={"a": IDS[:, :8], "b": IDS})
    assert result.model.config.intermediate_size == 24 and result.manifest.seq_length == 16


def test_a_head_that_takes_more_than_tokens_is_refused_before_text_is_read():
    class Picky(BertForMaskedLM):
        def forward(self, input_ids, extra, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(StructPruneError, match="Picky cannot run on a few tokens .*'extra'.*prune the base model"):
        prune_model(Picky(build("bert").config), blind(), tokenizer())


def test_odd_models(tmp_path):
    odd = build("llama-tied")
    odd.generation_config = GenerationConfig()
    odd.generation_config.temperature = 0.7
    compiled = torch.compile(build("llama-tied"), backend="eager")
    for model, message in ((odd, "temperature"), (compiled, "_orig_mod")):
        with pytest.raises(StructPruneError, match=message):
            prune_model(model, config(), inputs={"a": IDS})
    with torch.inference_mode():
        fixed = LlamaForCausalLM(build("llama-tied").config)
    with pytest.raises(StructPruneError, match="inside torch.inference_mode.*pass `copy.deepcopy"):
        prune_model(fixed, config(), tokenizer(), inplace=True)
    prune_model(fixed, config(), tokenizer())
    with pytest.raises(StructPruneError, match="Pass the model's own"):
        export_gguf(build("llama-tied"), tmp_path / "m.gguf", None)
    with pytest.raises(StructPruneError, match="at least one sample of two tokens"):
        perplexity(build("llama-tied"), torch.zeros(0, 8, dtype=torch.long))
    for case in ("bert", "t5"):
        with pytest.raises(StructPruneError, match="(Bert|T5)For.* does not predict the next token"):
            perplexity(build(case), IDS)
    for model, kind in ((compiled, "OptimizedModule"), ("a/folder", "str")):
        with pytest.raises(StructPruneError, match=f"config is needed, got {kind}; AutoConfig.from_pretrained"):
            dry_run(model, config())


@pytest.mark.parametrize(("scores", "fields"), [
    *((scores, {}) for scores in (None, np.ones(40), np.float64(3))),
    (np.ones(40), {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
    *((scores, {"widths": {"layer": 1}}) for scores in (None, torch.ones(3), torch.tensor([1.0, torch.nan]))),
])  # fmt: skip
def test_odd_criteria_and_names_of_criteria(scores, fields, monkeypatch):
    monkeypatch.setattr(CRITERIA, "_entries", dict(CRITERIA._entries))
    register_criterion("odd", judges="layer" if "widths" in fields else "unit")(lambda *_: scores)
    with pytest.raises(StructPruneError, match=r"'odd' must return \d+ finite scores, one per unit, at model.layers"):
        prune_model(build("llama-tied"), config(criterion="odd", **fields), inputs={"a": IDS})
    for name in ("", None, 3):
        with pytest.raises(StructPruneError, match=f"The name of a criterion must be a string, got {name!r}"):
            register_criterion(name)(lambda weight, *_: weight.sum(0))


def test_odd_texts(tmp_path):
    assert [*read(DomainConfig("a", ["text\ud800"]), 0)] == ["text?"]
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "full.csv").write_text("text\nmine\n")
    assert [*read(DomainConfig("a", str(tmp_path)), 0)] == ["mine"]
    assert [*read(DomainConfig("a", pandas.Series(["x", "y"])), None)] == ["x", "y"]
