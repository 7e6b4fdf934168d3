"""The only file that registers hooks. They live inside `with` and are removed on every way out, also by exceptions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, recursively_apply
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class StopForward(Exception):
    """Ends a forward pass early, once the hooks have seen all that they need."""


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer is called with, shape `(batch, seq_length, channels)`."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def first_of(output: Any) -> Tensor:
    """The hidden states in the output of a layer: the output itself, or the first of a tuple."""
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

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A subclass, such as a router, may return something else.
        linear = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        bias = getattr(module, "bias", None)
        see(name, args[0], None if not linear else output if bias is None else output - bias)

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(hook, name)))
        yield


@contextmanager
def adding(module: nn.Module, noise: Tensor, replace: bool = False) -> Iterator[None]:
    """Make a module add `noise` to each output with as many elements, or `replace` that by it."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if output.numel() != noise.numel():
            return None
        return noise.reshape(output.shape).to(output) + (0 if replace else output)

    with module.register_forward_hook(hook):
        yield


@contextmanager
def replaying(layers: Sequence[nn.Module], outputs: Sequence[Any] | None = None) -> Iterator[None]:
    """Make layers return outputs, one each, without running; by default the hidden states they are called with."""
    # A hook cannot keep a layer from running, so `forward` is replaced. Accelerate may have put its own there.
    before = [vars(layer).get("forward") for layer in layers]
    for layer, output in zip(layers, [None] * len(layers) if outputs is None else outputs, strict=True):
        vars(layer)["forward"] = lambda *args, output=output, **kwargs: (
            hidden_states_of(args, kwargs) if output is None else output
        )
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            vars(layer).update({} if former is None else {"forward": former})


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own `forward` inside `with`. Hooks of the module still run.

    Args:
        module: The module.
        forward: It is called with the module's arguments, and its result is the output of the module.
    """
    former = vars(module).get("forward")  # accelerate may have put its own there
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if former is not None:
            vars(module)["forward"] = former


@contextmanager
def cached_outputs(
    layer: nn.Module, names: Sequence[str], changed: Collection[str], device: Any
) -> Iterator[dict[str, Any]]:
    """Collect the outputs, by name, of the parts of a layer that run once and before all `changed` parts.

    The smaller layer gives the same there. They are copies on `device`.
    """
    order: list[str] = []
    outputs: dict[str, Any] = {}

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order[:] = [*order, names[number - 1]] if number else []

    def after(number: int, output: Any) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        plain = isinstance(first, Tensor) and all(other is None for other in others)
        if number and plain and not {*changed} & {*order} and order.count(order[-1]) == 1:
            # A copy, since the layer may go on to change its output.
            copied = first.detach().to(device or first.device, copy=True)
            outputs[names[number - 1]] = (copied, *others) if isinstance(output, tuple) else copied

    with intercept([layer, *map(layer.get_submodule, names)], before, after):
        yield outputs


def is_emulated(weight: Tensor) -> bool:
    """Tells if products of a weight's dtype are emulated by the CPU, which takes several times as long as fp32."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if not half or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # On x86 with AVX-512, oneDNN takes bf16 whether or not it has to emulate it.
    x86, bf16 = torch.cpu._is_avx2_supported(), getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return not (torch.ops.mkldnn._is_mkldnn_bf16_supported() and (bf16 or not x86))


@contextmanager
def in_fast_dtype(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have weights of an emulated dtype in fp32 while their module, one of `modules`, runs.

    One module is in memory twice at a time; its outputs have its own dtype.
    """
    stored: list[tuple[Tensor, Tensor]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in filter(is_emulated, (*module.parameters(), *module.buffers())):
            stored.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
        return convert_to_fp32((args, kwargs)) if stored else None

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not stored:
            return None
        dtype = stored[0][1].dtype
        restore()
        return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor, output)

    def restore() -> None:
        for tensor, data in stored:
            tensor.data = data
        stored.clear()

    with ExitStack() as stack:
        for module in modules:
            if any(map(is_emulated, module.parameters())):
                stack.callback(restore)
                stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                # In front of the other hooks, so that they see what the next module gets.
                stack.enter_context(module.register_forward_hook(leave, prepend=True))
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
            enter = partial(lambda index, _, args, kwargs: before(index, args, kwargs), index)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            if after is not None:
                leave = partial(lambda index, _, args, output: after(index, output), index)
                stack.enter_context(module.register_forward_hook(leave))
        yield


def before_next_call(module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> RemovableHandle:
    """Call `see(args, kwargs)` once, before a module runs the next time.

    The hook removes itself, so that an error leaves none behind. The handle removes it where the module does not run.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        see(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    return handle
