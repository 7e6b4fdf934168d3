"""What transformers 4 reads of a result, and that transformers 5 reads no more than before.

`tests/test_transformers_4.py` runs a real transformers 4.
"""

import json
from copy import deepcopy

import pytest
from models import CASES, OTHERS, described, tokenizer
from transformers import AutoConfig, AutoTokenizer

from optimum_structprune.saving.save import settle


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 4096}
SCALED = {
    "llama-tied": {**LLAMA_3, "rope_type": "llama3", "rope_theta": 5e5},
    "phi3": {**LONG, "rope_type": "longrope", "type": "longrope", "rope_theta": 2e4, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize(("case", "rope"), [*((case, {}) for case in [*CASES, *OTHERS]), *SCALED.items()])
def test_transformers_5_reads_the_same_config(case, rope, tmp_path):
    _, model_type, fields = described(case)
    config = AutoConfig.for_model(model_type, **deepcopy(fields), **({"rope_parameters": rope} if rope else {}))
    config.save_pretrained(tmp_path)
    settle(tmp_path / "config.json", type(config))
    fields = json.loads((tmp_path / "config.json").read_text())
    again, known = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    of_this_folder = {"_name_or_path": "", "dtype": again["dtype"]}
    assert again | known | of_this_folder == again | of_this_folder
    if "rope_parameters" in fields and case not in NEWER:
        assert {"rope_theta", "rotary_emb_base", "global_rope_theta"} & fields.keys()


# Configs that transformers 4 does not know, and whose class in transformers 5 would keep keys of it.
NEWER = ("gemma4_text", "gemma4_text-experts")


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
