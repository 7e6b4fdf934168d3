"""Holds `families.yaml` and its page against transformers as installed."""

import warnings
from pathlib import Path
from runpy import run_path

import torch
from models import GROUPED
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from optimum_structprune.arch.families import builtin_families
from optimum_structprune.arch.load import resolve
from optimum_structprune.errors import StructPruneError


# Causal model types of transformers 5.24 that fit the template of llama by name and shape and are not described.
FITTING = {"bitnet", "diffllama", "flint", "granite_swa"}
# How many of the 196 causal model types of transformers 5.24 are described with something to prune inside their
# layers, and how many only with the reasons why there is nothing: the first number may not fall.
DESCRIBED, REFUSED = 90, 4
ROOT = Path(__file__).parents[2]


def test_the_page_is_generated_from_the_data():
    table = run_path(str(ROOT / ".ci" / "architectures.py"))["table"]
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert page.endswith("\n\n" + table()), "run `python .ci/architectures.py`"


def shapes_of(model_type):
    """Config, tensors and prefix of a tiny model on the meta device; None where it takes other fields than most."""
    try:
        config = AutoConfig.for_model(model_type, **GROUPED)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a hundred classes, each with reasons of its own
        return None
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return config, shapes, prefix if any(name.startswith(prefix) for name in shapes) else ""


def test_described_types_still_have_the_parameters_that_are_described():
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(builtin_families())):
        family = builtin_families()[model_type]
        found = shapes_of(model_type)
        if found is not None and family.causal and family.text is None:
            config, shapes, prefix = found
            resolve(family, config, shapes, prefix)


def test_which_other_types_fit_the_plain_template(record_property):
    """Information, not a demand: a type is described once a case in models.py proves it."""
    llama = builtin_families()["llama"]
    fitting = set()
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(builtin_families())):
        found = shapes_of(model_type)
        if found is None:
            continue
        config, shapes, prefix = found
        try:
            arch = resolve(llama, config, shapes, prefix)
        except (StructPruneError, AttributeError, RuntimeError, ZeroDivisionError):
            continue
        inside = {name for name in shapes if name.startswith(f"{arch.layer_path}.") and len(shapes[name]) > 1}
        if inside == {axis.param for space in arch.spaces for axis in space.axes if axis.param.endswith("weight")}:
            fitting.add(model_type)
    record_property("new", sorted(fitting - FITTING))
    record_property("gone", sorted(FITTING - fitting))
    if fitting != FITTING:
        warnings.warn(f"new {sorted(fitting - FITTING)}, gone {sorted(FITTING - fitting)}", stacklevel=1)


def test_how_many_causal_types_are_described(capsys):
    families = builtin_families()
    causal = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(families))
    refused = [name for name in causal if families[name].text is None and not families[name].spaces]
    assert all(families[name].missing for name in refused)
    described = [name for name in causal if name not in refused]
    with capsys.disabled():
        print(
            f"\ncausal types in transformers {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}, described {len(described)}, "
            f"refused with a reason {len(refused)} ({', '.join(refused)})"
        )
    assert len(described) >= DESCRIBED and len(causal) >= DESCRIBED + REFUSED
