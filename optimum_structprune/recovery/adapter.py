"""Puts on a model what is trained: an adapter that fits it, or all of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..arch.meta import skeleton
from ..config.fields import build
from ..config.recovery import LORA, RecoveryConfig
from ..errors import StructPruneError


# What peft, a training and its files raise where a setting or a file is wrong.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, AttributeError, KeyError, RuntimeError)
LIBRARY_ERRORS += (ImportError, ArithmeticError, AssertionError, re.error, OSError, SafetensorError)


def lora_config(config: RecoveryConfig, model: PreTrainedModel, fewer_tokens: bool = False) -> LoraConfig:
    """Makes the adapter that a recovery trains: `config.lora` laid over the defaults.

    "All linear layers" takes in what a mixture stacks in one parameter, and leaves out what is not called as a linear
    layer. Where tokens have gone, the rows of the others are trained too, as they mean more than before.
    """
    kind: LoraConfig = build(LoraConfig, {**LORA, **config.lora})
    if fewer_tokens and kind.trainable_token_indices is None and not kind.modules_to_save:
        table: Any = model.get_input_embeddings()
        head = model.get_output_embeddings()
        # A tied head peft trains with the embedding, and of one with a bias it would lose that.
        apart = isinstance(head, nn.Linear) and head.weight is not table.weight and head.bias is None
        names = [name for name, each in model.named_modules() if each is table or (apart and each is head)]
        kind.trainable_token_indices = {name: [*range(len(table.weight))] for name in names}
    if kind.target_modules == LORA["target_modules"]:
        experts, routers = _of_experts(model)
        # peft knows the experts of some types of model by itself; its stacked adapters take neither of these options.
        if kind.target_parameters is None and not (kind.lora_dropout or kind.use_dora):
            kind.target_parameters = sorted(experts | routers) or None
        if kind.exclude_modules is None:
            kind.exclude_modules = _not_called(model, routers) or None
    return kind


def _of_experts(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    # Both by their names inside a layer. Shapes tell them: models that no family describes are trained as well.
    experts, routers = set[str](), set[str]()
    for name, module in model.named_modules():
        stacked = [leaf for leaf, each in module.named_parameters(recurse=False) if each.ndim == 3]
        if isinstance(module, nn.Conv1d) or not stacked:
            continue
        inside = re.sub(r"^.*?\.\d+\.", "", name)
        experts |= {f"{inside}.{leaf}" for leaf in stacked}
        for leaf, beside in model.get_submodule(name.rpartition(".")[0]).named_children():
            weight = getattr(beside, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and type(beside).forward is not nn.Linear.forward:
                routers.add(f"{inside.rpartition('.')[0]}.{leaf}.weight")
    return experts, routers


def _not_called(model: PreTrainedModel, routers: Collection[str]) -> list[str]:
    # An adapter would break routers, and the linear layers that Mamba's kernels do not call.
    names, ends = list[str](), tuple(f".{router}" for router in routers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight".endswith(ends):
            names.append(name)
        if hasattr(module, "A_log") and hasattr(module, "D"):
            names += [f"{name}.{part}" for part in ("dt_proj", "out_proj") if hasattr(module, part)]
    return names


@contextmanager
def trainable(model: PreTrainedModel, kind: PeftConfig | None) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Put a new adapter on a model, or without one make all its weights trainable, inside `with`.

    It yields what is trained, and a function that gives it the values of the start, with which a new adapter changes
    nothing. An error inside `with` does that, and takes the adapter off.
    """
    training, flags = model.training, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained: Any = model if kind is None else adapted(model, kind)
    if kind is None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    learnt = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    start = [parameter.detach().to("cpu", copy=True) for parameter in learnt]

    @torch.no_grad()
    def take_back() -> None:
        for parameter, value in zip(learnt, start, strict=True):
            parameter.copy_(value)

    try:
        yield trained, take_back
    except BaseException:  # Ctrl-C too
        take_back()
        if trained is not model:
            trained.unload()
        raise
    finally:
        model.zero_grad()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        trained.train(training)


def check_fits(model: PreTrainedModel, kind: LoraConfig) -> None:
    """Refuse an adapter that cannot be put on a model of the same kind without weights."""
    kind = deepcopy(kind)
    kind.init_lora_weights = True  # others look at the weights
    try:
        empty = skeleton(model, deepcopy(model.config))
    except Exception:
        return  # a model class of an unusual constructor says nothing about the adapter
    with torch.device("meta"):
        adapted(empty, kind)


def adapted(model: PreTrainedModel, kind: PeftConfig) -> PeftModel:
    """Put a new adapter on a model; one that could not be merged afterwards is refused."""
    with warnings.catch_warnings():
        # peft warns of tied weights; where that matters, `_check_tied` refuses.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # It looks up by itself how a module stores its weight, and says so.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # It has patterns of its own for the experts that it knows, some of which it then does not use.
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match.*")
        try:
            with_adapter: PeftModel = get_peft_model(model, kind)
        except LIBRARY_ERRORS as error:
            raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
    _check_tied(with_adapter)
    return with_adapter


def _check_tied(model: PeftModel) -> None:
    # What peft merges into a tied weight changes it in all of its places, and was trained in one of them. Its
    # `ensure_weight_tying` trains in both and merges both, one on top of the other. Rows of tokens it does tie.
    names: dict[int, list[str]] = {}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        plain = [re.sub(r"\.(base_layer|original_module)\.", ".", name) for name in shared]
        pairs = zip(plain, shared, strict=True)
        wrapped = [name for name, full in pairs if name != full and ".token_adapter." not in full]
        if len(shared) > 1 and wrapped:
            others = ", ".join(name for name in plain if name != wrapped[0])
            raise StructPruneError(
                f"The adapter would train {wrapped[0]}, which is one tensor with {others}, so that the merged model "
                "would not be the one that was trained; leave it out of lora['target_modules'] and "
                "lora['modules_to_save']."
            )
