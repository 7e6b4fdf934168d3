"""What transformers 4 reads of a result, and that transformers 5 reads no more than before.

`tests/test_transformers_4.py` runs a real transformers 4.
"""

import json
from copy import deepcopy

import pytest
from models import CASES, OTHERS, described, tokenizer
from transformers import AutoConfig, AutoTokenizer

from optimum_structprune.saving.save import settle


def saved(case, folder, **changes):
    """The config of a family with these changes in its text part, and what its `config.json` says."""
    _, model_type, fields = described(case)
    config = AutoConfig.for_model(model_type, **deepcopy(fields))
    text = config.get_text_config()
    for name, value in changes.items():
        setattr(text, name, value)
    config.save_pretrained(folder)
    settle(folder / "config.json", type(config))
    return config, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_transformers_5_reads_the_same_config(case, tmp_path):
    config, fields = saved(case, tmp_path)
    again, known = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    of_this_folder = {"_name_or_path": "", "dtype": again["dtype"]}
    assert again | known | of_this_folder == again | of_this_folder
    if "rope_parameters" in fields and case not in NEWER:
        assert {"rope_theta", "rotary_emb_base", "global_rope_theta"} & fields.keys()


# Configs that transformers 4 does not know, and whose class in transformers 5 would keep keys of it.
NEWER = ("gemma4_text", "gemma4_text-experts")
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 |= {"rope_type": "llama3"}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
SLIDING = {"rope_type": "default", "rope_theta": 5e3}


@pytest.mark.parametrize(("case", "rope", "expected"), [
    ("llama-tied", {**LLAMA_3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
    ("gpt_neox", {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
     {"rotary_emb_base": 1e5, "rotary_pct": 0.5}),
    ("gemma3_text",
     {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}, "sliding_attention": SLIDING},
     {"rope_theta": 2e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("modernbert", {"full_attention": {"rope_type": "default", "rope_theta": 2e5}, "sliding_attention": SLIDING},
     {"global_rope_theta": 2e5, "local_rope_theta": 5e3}),
    ("phi3", {"type": "longrope", "rope_type": "longrope", **LONG, "rope_theta": 2e4, "partial_rotary_factor": 1.0,
              "original_max_position_embeddings": 4096},
     {"rope_theta": 2e4, "rope_scaling": {"type": "longrope", **LONG}}),
    ("qwen2_vl", {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e5},
     {"rope_theta": 1e5, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}),
    ("gemma4_text", {"full_attention": {"rope_type": "proportional", "rope_theta": 2e6, "partial_rotary_factor": 0.25},
                     "sliding_attention": SLIDING}, {}),
])  # fmt: skip
def test_transformers_4_finds_its_own_names(case, rope, expected, tmp_path):
    config, fields = saved(case, tmp_path, **({"rope_parameters": rope} if rope else {}))
    fields = fields.get("text_config", fields)
    names = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rope_scaling", "rotary_emb_base"}
    names |= {"rotary_pct", "global_rope_theta", "local_rope_theta"}
    found = {name: fields[name] for name in names & fields.keys() if fields[name] is not None}
    assert found == expected or found == {**expected, "partial_rotary_factor": 1.0}
    again = AutoConfig.from_pretrained(tmp_path).get_text_config().to_dict()
    assert again.get("rope_parameters") == config.get_text_config().to_dict().get("rope_parameters")


def test_transformers_4_knows_the_tokenizer_and_no_machine_is_named(tmp_path):
    reader = tokenizer()
    reader.add_special_tokens({"extra_special_tokens": ["w7", "w8"]})
    reader.init_kwargs |= {"is_local": True, "local_files_only": True}
    reader.save_pretrained(tmp_path)
    settle(tmp_path / "tokenizer_config.json", type(AutoConfig.for_model("llama")))
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & fields.keys()
    # transformers 4 takes none but names for `extra_special_tokens`, and ends with an error where they are a list
    assert fields["additional_special_tokens"] == ["w7", "w8"] and "extra_special_tokens" not in fields
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(reader) and again.extra_special_tokens == ["w7", "w8"]
    assert again.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()
    assert again.special_tokens_map == reader.special_tokens_map
