"""A request that cannot be met is refused before any text is read, and options without effect are named."""

import warnings
from copy import deepcopy

import numpy as np
import pandas
import pytest
import torch
from helpers import recovery_config, same_weights, unread
from models import PATCHES, PLAIN, build, config, random_model, token_ids, tokenizer
from transformers import AutoModel, BertForMaskedLM, GenerationConfig, LlamaForCausalLM, Wav2Vec2FeatureExtractor

from optimum_structprune import RecoveryConfig, RunOptions, StructPruneCallback, StructPruneConfig, prune, prune_model
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.config.domains import DomainConfig
from optimum_structprune.criteria import CRITERIA, register_criterion
from optimum_structprune.domains.sources import documents as read
from optimum_structprune.measure.losses import perplexity
from optimum_structprune.pruning.dryrun import dry_run
from optimum_structprune.pruning.request import DRY_RUN, resolve_request, without_effect
from optimum_structprune.saving.gguf_file import export_gguf
from optimum_structprune.system.errors import InPlaceError, StructPruneError


def unread_config(**fields) -> StructPruneConfig:
    """Return a config whose text must not be read."""
    unread_text = [DomainConfig(name=name, source=unread()) for name in "ab"]
    return config(domains=unread_text, **fields)


def unread_recovery(**fields) -> RecoveryConfig:
    """Return a config of a recovery whose text must not be read."""
    return recovery_config(domains=[DomainConfig(name="x", source=unread())], **fields)


MEASURED = {"allocation": "sensitivity", "round_to": 4}
ONLY_LAYERS = "scores whole layers only"
# Each rule for a pruning: the model, fields of the config, and the message.
REFUSED = [
    # the model
    ("llama-tied", {"seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
    ("mpt", {"widths": {"layer": 1}, "seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
    # the amount
    ("llama-tied", {"widths": {"mpl": 3}}, "no space 'mpl' to prune. Did you mean 'mlp'"),
    ("llama-tied", {"widths": {"attention": 3}}, "nearest legal choice is 2 or 4"),
    ("llama-tied", {"widths": {"mlp": 41}}, r"'mlp'\] = 41 is not legal.*has 40. The nearest legal choice is 40"),
    ("llama-tied", {"widths": {"mlp": 40}}, r"has the requested widths already \(mlp 40\)"),
    ("llama-tied", {"widths": {"vocab": 96, "mlp": 40}}, r"has the requested widths already"),
    ("llama-tied", {"sparsity": 0.001}, r"has the requested widths already \(mlp 40\)"),
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
    # widths of single layers
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
    # the recovery; `recovery/test_checks.py` has its other rules
    (
        "t5",
        {"recovery": unread_recovery()},
        "Recovery trains models that read text alone, and T5ForConditionalGeneration needs other inputs too",
    ),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED)
def test_a_bad_request_is_refused_before_text_is_read(case, fields, message):
    model = build(case)
    original = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as error:
        prune_model(model, unread_config(**fields), tokenizer(), inplace=True)
    assert not isinstance(error.value, InPlaceError)
    assert same_weights(model, original)

    if not {"recovery", "seq_length"} & set(fields):
        model.config.architectures = [type(model).__name__]
        with pytest.raises(StructPruneError, match=message):
            dry_run(model.config, unread_config(**fields))


def test_a_good_request_reads_the_text():
    """Without this property, the test of bad requests would prove nothing."""
    good_requests = [
        {},
        {"recovery": unread_recovery()},
        {"widths": {"layer": 1, "hidden": 24, "mlp": 24}},
        {"sparsity": 0.2, "allocation": "sensitivity"},
    ]
    for fields in good_requests:
        with pytest.raises(pytest.fail.Exception, match="text was read"):
            prune_model(build("phi3"), unread_config(**fields), tokenizer())

    with pytest.raises(StructPruneError, match="reading them takes a tokenizer"):
        prune_model(build("llama-tied"), unread_config(), None)


@pytest.mark.parametrize(("fields", "message"), [
    ({"allocation": "sensitivity"}, "measures losses of the original model"),
    ({"widths": {"layer": 1}}, "'layer' belongs to the whole model"),
    ({"widths": {"hidden": 24}}, "'hidden' belongs to the whole model"),
    ({"widths": {"vocab": 64}}, "'vocab' belongs to the whole model"),
    ({"seq_length": 65}, "longer than the model's 64 positions"),
    ({"criterion": "wnada"}, "Did you mean 'wanda'"),
])  # fmt: skip
def test_a_trainer_callback_refuses_a_bad_request(fields, message):
    settings = unread_config(**fields)
    with pytest.raises(StructPruneError, match=message):
        StructPruneCallback(settings).begin(build("llama-tied"))

    # The callback checks the other fields before it has a model.
    if {"widths", "seq_length", "criterion"} & set(fields):
        StructPruneCallback(settings)
    else:
        with pytest.raises(StructPruneError, match=message):
            StructPruneCallback(settings)


def test_a_trainer_callback_refuses_a_checkpoint_folder():
    with pytest.raises(StructPruneError, match="checkpoint_dir spans the layers"):
        StructPruneCallback(unread_config(), options=RunOptions(checkpoint_dir="x"))


def test_a_trainer_callback_refuses_a_quantized_model():
    model = build("llama-tied")
    model.is_quantized = True
    with pytest.raises(StructPruneError, match=r"quantized. Prune `model.dequantize\(\)`"):
        StructPruneCallback(unread_config()).begin(model)


def test_a_checkpoint_folder_must_not_hold_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("llama-tied").save_pretrained("model")
    files = sorted(tmp_path.rglob("*"))

    with pytest.raises(StructPruneError, match="model holds a model. Pass another folder"):
        prune_model(build("llama-tied"), unread_config(), tokenizer(), options=RunOptions(checkpoint_dir="model"))
    assert sorted(tmp_path.rglob("*")) == files


def test_a_checkpoint_folder_needs_a_single_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = RunOptions(checkpoint_dir="run")
    with pytest.raises(StructPruneError, match="checkpoint_dir='run' .*rounds=2"):
        prune_model(build("llama-tied"), unread_config(rounds=2), tokenizer(), options=options)


def test_losses_are_measured_only_if_a_model_predicts_tokens():
    with pytest.raises(StructPruneError, match="makes none. Use allocation='uniform'"):
        prune_model(build("llama-tied").model, unread_config(**MEASURED), tokenizer())


# --- warnings
def test_layers_that_transformers_does_not_load_are_removed_from_the_config():
    model = build("glm4_moe")
    with pytest.warns(UserWarning, match="num_nextn_predict_layers.*its config says 0"):
        pruned = prune_model(model, config(widths={"expert": 3}, num_samples=2), tokenizer())

    assert model.config.num_nextn_predict_layers == 1
    assert pruned.config.num_nextn_predict_layers == 0
    assert pruned.config.to_dict()["num_nextn_predict_layers"] == 0


def test_a_single_warning_names_all_options_without_effect():
    original = ModelInfo.of(build("llama-tied"))
    message = "have no effect here: round_to=8, because .*; keep_tokens='a', because"
    with pytest.warns(UserWarning, match=message) as recorded_warnings:
        resolve_request(unread_config(round_to=8, keep_tokens="a"), original, use=DRY_RUN)
    assert len(recorded_warnings) == 1


def test_options_with_an_effect_raise_no_warning():
    original = ModelInfo.of(build("llama-tied"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_request(unread_config(error_feedback=0.2), original, use=DRY_RUN)
        resolve_request(unread_config(sparsity=0.2, round_to=8, rounds=2), original, use=DRY_RUN)


# An option, its value, other fields of the config, and whether the option changes the pruned model.
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
def test_an_option_is_named_if_it_has_no_effect(name, value, fields, matters):
    model = build("llama-tied")
    model.model.layers[1].mlp.down_proj.weight.data *= 0.1  # widths may then differ between layers
    settings = config(**fields)
    changed = StructPruneConfig.from_dict(settings.to_dict() | {"domains": settings.domains, name: value})

    pruned = prune_model(model, settings, tokenizer())
    pruned_with_option = prune_model(model, changed, tokenizer())
    assert same_weights(pruned, pruned_with_option) != matters

    targets = list(changed.widths or changed.targets_or_default)
    is_named = any(entry.startswith(f"{name}=") for entry in without_effect(changed, targets))
    assert is_named != matters


# --- models that read no text
SPEECH = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1]}
SPEC = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8}
OF_OTHER_INPUTS = [
    ("vit", PLAIN | PATCHES, "ViTModel reads pixel_values, and domains are text"),
    ("clip_vision_model", PLAIN | PATCHES, "'clip_vision_model' is not described"),
    ("resnet", CONVOLUTIONS, "'resnet' is not described"),
    ("audio-spectrogram-transformer", PLAIN | SPEC, "'audio-spectrogram-transformer' is not described"),
    ("wav2vec2", PLAIN | SPEECH, "conv of a Wav2Vec2Model computes its weight from other tensors, as by weight norm"),
    ("hubert", PLAIN | SPEECH, "conv of a HubertModel computes its weight from other tensors"),
]


@pytest.mark.parametrize(("model_type", "fields", "message"), OF_OTHER_INPUTS)
def test_a_model_that_reads_no_text_is_refused_with_any_tokenizer(model_type, fields, message):
    fields = {name: value for name, value in fields.items() if "vocab" not in name}
    model = random_model(AutoModel, model_type, fields)
    for reader in (None, tokenizer()):
        with pytest.raises(StructPruneError, match=message):
            prune_model(model, config(), reader)


# --- arguments of a wrong type
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
    ({"inputs": {1: IDS}}, "got 1. Pass '1'"),
]


def test_an_argument_of_a_wrong_type_is_refused_by_name():
    model = build("llama-tied")
    for fields, message in WRONG:
        arguments = {"model": model, "config": config(), "tokenizer": tokenizer()} | fields
        with pytest.raises(StructPruneError, match=message):
            prune_model(**arguments, inplace=True)

    assert same_weights(model, build("llama-tied"))


def test_the_seq_length_of_a_config_does_not_limit_inputs():
    result = prune(build("llama-tied"), config(seq_length=65), inputs={"a": IDS[:, :8], "b": IDS})
    assert result.model.config.intermediate_size == 24
    assert result.manifest.seq_length == 16


def test_a_model_that_needs_more_than_tokens_is_refused_before_text_is_read():
    class Picky(BertForMaskedLM):
        def forward(self, input_ids, extra, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(StructPruneError, match="Picky cannot run on a few tokens .*'extra'.*prune the base model"):
        prune_model(Picky(build("bert").config), unread_config(), tokenizer())


# --- unusual models, criteria and texts
def test_a_model_that_cannot_be_saved_is_refused():
    model = build("llama-tied")
    model.generation_config = GenerationConfig()
    model.generation_config.temperature = 0.7
    with pytest.raises(StructPruneError, match="temperature"):
        prune_model(model, config(), inputs={"a": IDS})


def test_a_compiled_model_is_refused():
    model = torch.compile(build("llama-tied"), backend="eager")
    with pytest.raises(StructPruneError, match="_orig_mod"):
        prune_model(model, config(), inputs={"a": IDS})


def test_a_model_that_is_compiled_in_place_is_refused():
    whole_model = build("llama-tied")
    whole_model.compile(backend="eager")
    one_layer = build("llama-tied")
    one_layer.model.layers[1].compile(backend="eager")

    for model in (whole_model, one_layer):
        with pytest.raises(StructPruneError, match="`model` is compiled. Pass `copy.deepcopy"):
            prune_model(model, config(), inputs={"a": IDS})
        prune_model(deepcopy(model), config(), inputs={"a": IDS})


def test_a_model_from_inference_mode_is_not_pruned_in_place():
    with torch.inference_mode():
        model = LlamaForCausalLM(build("llama-tied").config)

    with pytest.raises(StructPruneError, match="inside torch.inference_mode.*pass `copy.deepcopy"):
        prune_model(model, config(), tokenizer(), inplace=True)
    prune_model(model, config(), tokenizer())


def test_an_export_to_gguf_needs_a_tokenizer(tmp_path):
    with pytest.raises(StructPruneError, match="Pass the model's own"):
        export_gguf(build("llama-tied"), tmp_path / "m.gguf", None)


def test_a_perplexity_needs_samples_and_a_causal_model():
    with pytest.raises(StructPruneError, match="at least one sample of two tokens"):
        perplexity(build("llama-tied"), torch.zeros(0, 8, dtype=torch.long))

    for case in ("bert", "t5"):
        with pytest.raises(StructPruneError, match="(Bert|T5)For.* does not predict the next token"):
            perplexity(build(case), IDS)


def test_a_dry_run_needs_a_config():
    compiled = torch.compile(build("llama-tied"), backend="eager")
    for model, kind in ((compiled, "OptimizedModule"), ("a/folder", "str")):
        with pytest.raises(StructPruneError, match=f"config is needed, got {kind}. Pass `AutoConfig.from_pretrained"):
            dry_run(model, config())


@pytest.fixture
def registry(monkeypatch):
    """Remove the criteria that a test registers."""
    monkeypatch.setattr(CRITERIA, "_entries", dict(CRITERIA._entries))


ONE_LAYER = {"widths": {"layer": 1}}


@pytest.mark.parametrize(("scores", "fields"), [
    (None, {}),
    (np.ones(40), {}),
    (np.float64(3), {}),
    (np.ones(40), {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
    (None, ONE_LAYER),
    (torch.ones(3), ONE_LAYER),
    (torch.tensor([1.0, torch.nan]), ONE_LAYER),
])  # fmt: skip
def test_a_criterion_must_return_finite_scores(scores, fields, registry):
    judges = "unit"
    if "widths" in fields:
        judges = "layer"
    register_criterion("odd", judges=judges)(lambda *_: scores)

    with pytest.raises(StructPruneError, match=r"'odd' must return \d+ finite scores, one per unit, at model.layers"):
        prune_model(build("llama-tied"), config(criterion="odd", **fields), inputs={"a": IDS})


@pytest.mark.parametrize("name", ["", None, 3])
def test_the_name_of_a_criterion_must_be_a_string(name, registry):
    with pytest.raises(StructPruneError, match=f"The name of a criterion must be a string, got {name!r}"):
        register_criterion(name)(lambda weight, *_: weight.sum(0))


def test_a_lone_surrogate_is_replaced():
    assert list(read(DomainConfig("a", ["text\ud800"]), 0)) == ["text?"]


def test_an_empty_file_of_a_folder_is_skipped(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "full.csv").write_text("text\nmine\n")
    assert list(read(DomainConfig("a", str(tmp_path)), 0)) == ["mine"]


def test_a_series_is_a_source():
    assert list(read(DomainConfig("a", pandas.Series(["x", "y"])), None)) == ["x", "y"]


def test_a_table_is_refused_as_a_source():
    table = pandas.DataFrame({"text": ["x", "y"]})
    with pytest.raises(StructPruneError, match=r"`source` must not be a table. Pass one of its columns"):
        DomainConfig("a", table)
