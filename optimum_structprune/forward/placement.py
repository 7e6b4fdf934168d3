"""The weights of one layer at a time, wherever accelerate keeps those of the others.

Pruning calls a layer once for each batch, so an offloaded layer comes in once and stays until it is finished with;
whatever shape it has by then goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.load import describe, layer_list
from ..arch.meta import meta_model
from ..arch.spec import ArchSpec
from ..system.offloading import bring_in, check_reachable, give_back_free_memory, put_back


def layer_device_map(
    config: PretrainedConfig,
    device: str = "cpu",
    layers: str = "disk",
    arch_file: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """A `device_map` for `from_pretrained` that puts the layers of a model elsewhere than everything around them.

    Args:
        config: The config of the model.
        device: The device that computes, and that holds what is no layer: embeddings, the last norm, the head.
        layers: Where the layers are while they do not run: `disk`, or `cpu` for its memory.
        arch_file: A file with descriptions of your own, see `families.yaml`.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        StructPruneError: If the model type is unknown, or transformers cannot build the model.
    """
    model = meta_model(config, arch_file, trust_remote_code=trust_remote_code)
    lists = {path for path, _ in describe(model, arch_file).stacks}

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if name in lists:
            yield name, layers
        elif not any(path.startswith(f"{name}." if name else "") for path in lists):
            yield name, device
        else:
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for leaf, child in [*tensors, *module.named_children()]:
                path = f"{name}.{leaf}" if name else leaf
                yield from walk(path, child) if isinstance(child, nn.Module) else [(path, device)]

    return dict(walk("", model))


class Placement:
    """The weights of a model's layers, one layer at a time; where all of them are in memory, nothing moves."""

    def __init__(self, model: PreTrainedModel, arch: ArchSpec):
        self.model, self.arch = model, arch
        check_reachable(model)

    @contextmanager
    def at(self, layer: int, changes: bool = False) -> Iterator[None]:
        """Have the weights of one layer on the device that computes it, inside `with`."""
        finished, hooks = False, []
        try:
            hooks = bring_in(self._layer(layer))
            yield
            finished = True
        finally:
            put_back(self.model, self._layer(layer), hooks, store=changes and finished)
        give_back_free_memory()

    @contextmanager
    def of(self, module: str, changes: bool = False) -> Iterator[None]:
        """`at` for the layer that holds a module."""
        layers = (layer for layer in range(self.arch.num_layers) if module.startswith(self.arch.layer_prefix(layer)))
        with self.at(next(layers), changes):
            yield

    def _layer(self, layer: int) -> nn.Module:
        return layer_list(self.model, self.arch)[layer]
