"""Token ids in a config refer to the same tokens after vocabulary trimming, whatever the names of the fields."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from models import GROUPED, PLAIN, TOKENS, build, random_model
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_structprune import StructPruneError
from optimum_structprune.arch.meta import check_positions, positions_of
from optimum_structprune.arch.token_space import counted_from, holds_token_ids, named_ids, renumber_, resize_


# Fields whose names end like this may hold token ids.
SUSPECTS = re.compile(r"\w*(id|ids|idx|idxs|index|indexes|indices|token|tokens|map|lang|langs|to_text)")
# Fields with such names that hold something else, grouped by their content.
NO_TOKEN_IDS = {
    "the number of tokens or languages": (
        "_num_audio_tokens default_num_delay_tokens default_num_lookahead_tokens n_cls_tokens n_langs num_cls_tokens "
        "num_detection_tokens num_global_tokens num_group_tokens num_image_tokens num_query_tokens "
        "num_register_tokens num_visual_indicator_tokens pred_num_mask_tokens max_new_tokens max_text_tokens "
        "t2u_max_new_tokens vocoder_num_langs prompt_lookup_num_tokens index_num_local_tokens index_num_sink_tokens"
    ),
    "places of layers and modules": (
        "_out_indices altup_active_idx attn_layer_indices backbone_out_indices decode_index deepstack_visual_indexes "
        "encoder_projection_indices eval_idx full_attn_idxs fullatt_block_indexes global_attn_indexes head_in_index "
        "insert_layer_id intermediate_hidden_state_indices intermediate_hook_ids intermediate_layers_indices "
        "local_layer_ids merge_index moe_layer_end_index moe_layer_start_index mtp_local_layer_ids out_indices "
        "ple_layer_ids residual_block_indices summary_idxs target_layer_ids unmasked_channel_indices "
        "window_block_indices"
    ),
    "labels": "ce_ignore_index loss_ignore_index no_aggregation_label_index semantic_loss_ignore_index "
    "sparse_pred_ignore_index label2id",
    "entries of another vocabulary": (
        "audio_stream_bos_id audio_stream_eos_id codebook_eos_token_id codebook_pad_token_id codec_bos_id "
        "codec_eos_token_id codec_nothink_id codec_pad_id codec_think_bos_id codec_think_eos_id subs_pad_id "
        "t2u_bos_token_id t2u_decoder_start_token_id t2u_eos_token_id t2u_pad_token_id tag_pad_id char_to_id "
        "t2u_lang_code_to_id vocoder_lang_code_to_id"
    ),
    "languages and prompts by number": "default_prompt_id lang_id",
    "other names of fields": "attribute_map",
    "whether a text is continued": "condition_on_prev_tokens",
    "numbers of clusters, and of atoms per token": "num_centroids max_atoms_per_token",
    "seconds of audio, by number": "max_initial_timestamp_index",
}


def config_classes():
    """Return all config classes of the installed transformers."""
    # transformers imports a config class at the first access.
    for model_type in CONFIG_MAPPING:
        CONFIG_MAPPING[model_type]

    parents = [PretrainedConfig]
    classes = set()
    while parents:
        for kind in parents.pop().__subclasses__():
            if kind.__module__.startswith("transformers.models."):
                parents.append(kind)
                classes.add(kind)
    return classes


def number_fields(kind):
    """Return the fields of a config class that hold numbers, or lists or mappings of numbers."""
    names = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers."):
            continue

        for name, annotation in vars(base).get("__annotations__", {}).items():
            if re.search(r"\bint\b|\bdict\b", str(annotation)) and "Config" not in str(annotation):
                names.add(name)
    return names


def suspicious_fields():
    """Return the fields of all configs of transformers that may hold token ids by their names."""
    names = {"max_initial_timestamp_index", "text_decoder_lang_to_code_id"}
    names.update(vars(GenerationConfig()))
    for path in Path(transformers.__file__).parent.glob("models/*/*.py"):
        names.update(re.findall(r"\bgeneration_config\.(\w+)", path.read_text("utf-8")))
    for kind in config_classes():
        names.update(number_fields(kind))
    return {name for name in names if SUSPECTS.fullmatch(name)}


@pytest.mark.slow
def test_every_field_of_transformers_that_may_hold_token_ids_is_renumbered_or_explained():
    explained = set(" ".join(NO_TOKEN_IDS.values()).split())
    assert not {name for name in explained if holds_token_ids(name)}

    suspects = suspicious_fields()
    assert len(suspects) > 100
    for name in sorted(suspects - explained):
        is_count = name.startswith(("max_", "min_", "num_"))
        assert is_count or holds_token_ids(name), name


def trimmed_config(fields, keep=(1, 3, 5), size=10, **options):
    """Return a config with these fields after the trimming of a vocabulary of ten tokens."""
    model_config = AutoConfig.for_model("llama", vocab_size=size)
    special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    vars(model_config).update(special_tokens | fields)
    renumber_(model_config, keep, size, **options)
    return model_config


@pytest.fixture(scope="module")
def trimmed():
    return trimmed_config(
        {
            "pad_index": 3,
            "unk_index": -1,
            "eos_index": 12,
            "boundary_id": 5,
            "image_token": 5,
            "end_token": "</s>",
            "speaker_token_map": {"Anna": 3},
            "device_map": {"": 1},
            "label_map": {"cat": 1},
            "lang_id": 3,
            "eos_token_id": [1, 5],
            "bad_words_ids": [[3, 1]],
            "begin_suppress_tokens": (5,),
            "text_decoder_lang_to_code_id": {"deu": 5},
            "t2u_lang_code_to_id": {"deu": 5},
            "sequence_bias": {(3, 5): 2.0},
            "forced_decoder_ids": [[3, 5]],
            "label2id": {"person_id": 3},
        }
    )


def test_ids_are_renumbered_whatever_the_name_of_the_field(trimmed):
    assert trimmed.pad_index == 1
    assert trimmed.boundary_id == 2
    assert trimmed.image_token == 2


def test_ids_are_renumbered_in_lists(trimmed):
    assert trimmed.eos_token_id == [0, 2]
    assert trimmed.bad_words_ids == [[1, 0]]
    assert trimmed.begin_suppress_tokens == (2,)
    # The first number of a pair is a position.
    assert trimmed.forced_decoder_ids == [[3, 2]]


def test_ids_are_renumbered_in_mappings(trimmed):
    assert trimmed.speaker_token_map == {"Anna": 1}
    assert trimmed.text_decoder_lang_to_code_id == {"deu": 2}
    assert trimmed.sequence_bias == {(1, 2): 2.0}
    assert trimmed_config({"sequence_bias": [[[3], -1.0]]}).sequence_bias == [[[1], -1.0]]


def test_numbers_that_are_not_token_ids_do_not_change(trimmed):
    assert trimmed.unk_index == -1
    assert trimmed.eos_index == 12
    assert trimmed.end_token == "</s>"
    assert trimmed.device_map == {"": 1}
    assert trimmed.label_map == {"cat": 1}
    assert trimmed.lang_id == 3
    assert trimmed.t2u_lang_code_to_id == {"deu": 5}
    assert trimmed.label2id == {"person_id": 3}


def test_a_field_that_refers_to_a_removed_token_is_refused_by_its_name():
    with pytest.raises(StructPruneError, match="`boundary_id` of the LlamaConfig names the token 2"):
        trimmed_config({"boundary_id": 2})
    assert trimmed_config({"boundary_id": 2}, only_shapes=True).boundary_id == 2


def test_the_texts_of_tokens_by_id_are_renumbered():
    # SeamlessM4T v2 spells the tokens of its text, and looks up each letter in a vocabulary of letters.
    trimmed = trimmed_config({"id_to_text": {"0": "a", "1": "bc", "5": "d"}, "char_to_id": {"a": 1, "b": 2}})
    assert trimmed.id_to_text == {"0": "bc", "2": "d"}
    assert trimmed.char_to_id == {"a": 1, "b": 2}


def test_a_map_of_the_vocabulary_loses_the_removed_words():
    words = {"word": 0, "<image>": 1, "IMGIMGAZ": 2, "other": 3}
    trimmed = trimmed_config({"vocabulary_map": words}, keep=(1, 2, 3))
    assert trimmed.vocabulary_map == {"<image>": 0, "IMGIMGAZ": 1, "other": 2}


def test_the_special_tokens_in_a_map_of_the_vocabulary_are_kept():
    model = build("llama-tied")
    ids_without_map = named_ids(model)
    model.config.vocabulary_map = {"word": 80, "<image>": 81, "IMGIMGAZ": 82, "other": 83}
    assert named_ids(model) - ids_without_map == {81, 82}


def test_all_sizes_of_the_trimmed_vocabulary_change():
    model_config = AutoConfig.for_model("llama", vocab_size=10)
    vars(model_config).update(decoder_vocab_size=10, type_vocab_size=2, unpadded_vocab_size=8, image_token_offset=7)
    model_config.inner = {"vocab_size": 10, "other": 10}
    resize_(model_config, (1, 3, 5, 7, 8, 9), 10)

    assert model_config.vocab_size == 6
    assert model_config.decoder_vocab_size == 6
    assert model_config.type_vocab_size == 2
    assert model_config.unpadded_vocab_size == 4
    assert model_config.image_token_offset == 3
    assert model_config.inner == {"vocab_size": 6, "other": 10}


def test_the_tokens_behind_an_offset_are_kept():
    model = build("llama-tied")
    size = model.config.vocab_size
    model.config.image_token_offset = size - 3
    assert {size - 3, size - 2, size - 1} <= named_ids(model)


def test_the_config_of_another_vocabulary_does_not_change():
    model_config = AutoConfig.for_model("llama", vocab_size=10)
    model_config.speech = AutoConfig.for_model("llama", vocab_size=4, boundary_id=3)
    renumber_(model_config, (1, 3, 5), 10, only_shapes=True)
    resize_(model_config, (1, 3, 5), 10)

    assert model_config.vocab_size == 3
    assert model_config.speech.vocab_size == 4
    assert model_config.speech.boundary_id == 3


LUKE = PLAIN | {"entity_vocab_size": 10, "entity_emb_size": 8}


@pytest.mark.parametrize(
    ("name", "model_type", "fields", "padding", "first_position"),
    [
        ("RobertaModel", "roberta", PLAIN, 0, 1),
        ("XLMRobertaModel", "xlm-roberta", PLAIN, 1, 2),
        ("LukeModel", "luke", LUKE, 3, 4),
        ("BertModel", "bert", PLAIN, 3, 0),
        ("LlamaModel", "llama", GROUPED, 3, 0),
    ],
)
def test_a_model_that_counts_positions_from_the_padding_has_fewer(name, model_type, fields, padding, first_position):
    sizes = TOKENS | fields | {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": padding}
    model = random_model(getattr(transformers, name), model_type, sizes)
    longest = 64 - first_position
    assert positions_of(model) == longest
    assert counted_from(model) == max(first_position - 1, 0)

    output = model(torch.full((1, longest), 5))
    assert output.last_hidden_state.shape[1] == longest
    with pytest.raises(StructPruneError, match=f"longer than the model's {longest} positions"):
        check_positions(model, longest + 1, "text")
