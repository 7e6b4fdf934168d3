"""The only file that registers hooks. They live inside `with` and are removed on every way out, also by exceptions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class StopForward(Exception):
    """Ends a forward pass early, once the hooks have seen all that they need."""


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer is called with, shape `(batch, seq_length, channels)`."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def first_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def observe(model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` whenever a module runs."""
    names = list(names)
    with intercept(map(model.get_submodule, names), lambda index, args, _: see(names[index], args[0])):
        yield


@contextmanager
def observe_products(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Call `see(name, input, product)` whenever a module has run."""
    with ExitStack() as stack:
        for name in names:

            def hook(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                linear = isinstance(module, (nn.Linear, Conv1D))
                bias = getattr(module, "bias", None)
                see(name, args[0], None if not linear else output if bias is None else output - bias)

            stack.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


@contextmanager
def adding(module: nn.Module, noise: Tensor, replace: bool = False) -> Iterator[None]:
    """Make a module add `noise` to every output that has the same number of elements, whatever its shape; or
    `replace` it by the noise.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if output.numel() != noise.numel():
            return None
        return noise.reshape(output.shape).to(output) + (0 if replace else output)

    with module.register_forward_hook(hook):
        yield


@contextmanager
def replaying(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Make layers return the given outputs, one each, without running."""
    # A hook cannot keep a layer from running, so `forward` is replaced. Accelerate may have put its own there.
    before = [vars(layer).get("forward") for layer in layers]
    for layer, output in zip(layers, outputs, strict=True):
        vars(layer)["forward"] = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            vars(layer).update({} if forward is None else {"forward": forward})


@contextmanager
def cached_outputs(
    layer: nn.Module, names: Sequence[str], changed: Collection[str], keep: Callable[[str, Any], None], device: Any
) -> Iterator[None]:
    """Call `keep(name, output)` with a copy, on a device, of what each part of a layer gives that runs once and in
    front of all `changed` parts: in the smaller layer it is the same.
    """
    order: list[str] = []

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order[:] = [*order, names[number - 1]] if number else []

    def after(number: int, output: Any) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        plain = isinstance(first, Tensor) and all(other is None for other in others)
        if number and plain and not {*changed} & {*order} and order.count(order[-1]) == 1:
            # A copy, since the layer may go on to change its output.
            copied = first.detach().to(device or first.device, copy=True)
            keep(names[number - 1], (copied, *others) if isinstance(output, tuple) else copied)

    with intercept([layer, *map(layer.get_submodule, names)], before, after):
        yield


@contextmanager
def before_load(model: nn.Module, adapt: Callable[[Any, Mapping[str, Tensor]], None]) -> Iterator[None]:
    """Call `adapt(module, state_dict)` before `load_state_dict` of the model, or of a copy of it, copies anything."""

    def hook(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        adapt(module, {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()})

    with model.register_load_state_dict_pre_hook(hook):
        yield


@contextmanager
def intercept(
    modules: Iterable[nn.Module],
    before: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[int, Any], None] | None = None,
) -> Iterator[None]:
    """Call `before(index, args, kwargs)` and `after(index, output)` around each of `modules`."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):

            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                before(index, args, kwargs)

            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            if after is not None:

                def leave(module: nn.Module, args: tuple[Any, ...], output: Any, index: int = index) -> None:
                    after(index, output)

                stack.enter_context(module.register_forward_hook(leave))
        yield


def before_next_call(module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> RemovableHandle:
    """Call `see(args, kwargs)` before a module runs the next time, and then never again.

    The hook removes itself when it is called, so an error in the call or after it leaves none behind. The handle that
    is returned removes it where the module does not run.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        see(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    return handle
