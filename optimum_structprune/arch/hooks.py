"""Register forward hooks. No other module does.

Hooks live inside `with`, so they are removed when a block ends, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, recursively_apply
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class StopForward(Exception):
    """Stop a forward pass as soon as the hooks have seen their inputs."""


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states from the arguments of a layer, shape `(batch, seq_length, channels)`."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return args[0]


def first_of(output: Any) -> Tensor:
    """Return the hidden states from the output of a layer, a tensor or a tuple that begins with it."""
    if isinstance(output, tuple):
        return output[0]
    return output


@contextmanager
def observe(model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` before each call of a module."""
    names = list(names)
    modules = [model.get_submodule(name) for name in names]

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(names[index], args[0])

    with intercept(modules, on_call):
        yield


@contextmanager
def observe_products(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Call `see(name, input, product)` after each call of a module.

    The product is the output without the bias. It is None if the module is not a plain linear layer.
    """

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        product = None

        # A subclass, such as a router, may return other values than a linear layer.
        if type(module).forward in (nn.Linear.forward, Conv1D.forward):
            product = output
            bias = getattr(module, "bias", None)
            if bias is not None:
                product = output - bias

        see(name, args[0], product)

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(hook, name)))
        yield


@contextmanager
def adding(module: nn.Module, noise: Tensor, replace: bool = False) -> Iterator[None]:
    """Add `noise` to each output of a module that has the same number of elements.

    Args:
        module: The module.
        noise: The values to add.
        replace: Replace the output by `noise` instead.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if output.numel() != noise.numel():
            return None

        values = noise.reshape(output.shape).to(output)
        if replace:
            return values
        return values + output

    with module.register_forward_hook(hook):
        yield


@contextmanager
def replaying(layers: Sequence[nn.Module], outputs: Sequence[Any] | None = None) -> Iterator[None]:
    """Return stored outputs from layers instead of running them.

    Args:
        layers: The layers.
        outputs: The output of each layer. By default a layer returns its input hidden states.
    """
    # A hook cannot skip a layer, so this replaces `forward`. Accelerate may have replaced it before.
    original_forwards = [vars(layer).get("forward") for layer in layers]

    if outputs is None:
        outputs = [None] * len(layers)

    for layer, output in zip(layers, outputs, strict=True):
        vars(layer)["forward"] = partial(_replay, output)

    try:
        yield
    finally:
        for layer, forward in zip(layers, original_forwards, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def _replay(output: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Return a stored output, or the input hidden states if it is None."""
    if output is None:
        return hidden_states_of(args, kwargs)
    return output


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own `forward` inside `with`. Hooks of the module still run.

    Args:
        module: The module.
        forward: It is called with the module's arguments, and its result is the output of the module.
    """
    # Accelerate may have set a `forward` of its own.
    original_forward = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if original_forward is not None:
            vars(module)["forward"] = original_forward


@contextmanager
def cached_outputs(
    layer: nn.Module, names: Sequence[str], changed: Collection[str], device: Any
) -> Iterator[dict[str, Any]]:
    """Collect copies of the outputs of modules that run once, and before all changed modules.

    Pruning does not change these outputs, so they can be replayed in the smaller layer.

    Args:
        layer: The layer.
        names: The names of modules in the layer.
        changed: The names of the modules that pruning changes.
        device: The device of the copies; None keeps them where they are.

    Yields:
        The outputs by the name of the module. They are complete after a forward pass of the layer.
    """
    calls: list[str] = []
    outputs: dict[str, Any] = {}
    modules = [layer]
    modules += [layer.get_submodule(name) for name in names]

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Module 0 is the layer itself, whose call begins a new forward pass.
        if index == 0:
            calls.clear()
        else:
            calls.append(names[index - 1])

    def on_return(index: int, output: Any) -> None:
        if index == 0 or not _is_single_tensor(output):
            return

        changed_has_run = not set(changed).isdisjoint(calls)
        if changed_has_run or calls.count(calls[-1]) > 1:
            return

        # The layer may modify its outputs in place, so this stores a copy.
        hidden = first_of(output)
        copied = hidden.detach().to(device or hidden.device, copy=True)
        if isinstance(output, tuple):
            outputs[names[index - 1]] = (copied,) + output[1:]
        else:
            outputs[names[index - 1]] = copied

    with intercept(modules, on_call, on_return):
        yield outputs


def _is_single_tensor(output: Any) -> bool:
    """Return whether an output is a tensor, or a tuple of one tensor and nothing else than None."""
    if isinstance(output, tuple):
        return isinstance(output[0], Tensor) and all(value is None for value in output[1:])
    return isinstance(output, Tensor)


def is_emulated(weight: Tensor) -> bool:
    """Return whether the CPU emulates matrix products in the dtype of a weight.

    Emulation takes several times as long as fp32.
    """
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    if not is_half or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False

    if weight.dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True

    # oneDNN accepts bf16 on all x86 CPUs with AVX-512, also where it has to emulate it.
    is_x86 = torch.cpu._is_avx2_supported()
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return is_x86 and not has_bf16


@contextmanager
def in_fast_dtype(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Convert weights in an emulated dtype to fp32 while their module runs.

    Only one of `modules` is in memory twice at a time. Its outputs are converted back to its own dtype.
    """
    stored: list[tuple[Tensor, Tensor]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in chain(module.parameters(), module.buffers()):
            if is_emulated(tensor):
                stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

        if not stored:
            return None
        return convert_to_fp32((args, kwargs))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not stored:
            return None

        dtype = stored[0][1].dtype
        restore()

        def converted(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.float32:
                return tensor
            return tensor.to(dtype)

        return recursively_apply(converted, output)

    def restore() -> None:
        for tensor, data in stored:
            tensor.data = data
        stored.clear()

    with ExitStack() as stack:
        for module in modules:
            if not any(map(is_emulated, module.parameters())):
                continue

            stack.callback(restore)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            # The hook comes first, so that other hooks see the output in the dtype of the module.
            stack.enter_context(module.register_forward_hook(leave, prepend=True))

        yield


@contextmanager
def without_new_forward_hooks(module: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that other libraries put on a module inside `with`."""
    original = set(module._forward_hooks)
    try:
        yield
    finally:
        for key in set(module._forward_hooks) - original:
            del module._forward_hooks[key]


@contextmanager
def before_load(model: nn.Module, adapt: Callable[[Any, Mapping[str, Tensor]], None]) -> Iterator[None]:
    """Call `adapt(module, state_dict)` at the start of `load_state_dict` of the model, or of a copy of the model."""

    def hook(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        own_state = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        adapt(module, own_state)

    with model.register_load_state_dict_pre_hook(hook):
        yield


@contextmanager
def intercept(
    modules: Iterable[nn.Module],
    on_call: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
    on_return: Callable[[int, Any], None] | None = None,
) -> Iterator[None]:
    """Call `on_call(index, args, kwargs)` and `on_return(index, output)` around each call of the modules."""

    def enter(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_call(index, args, kwargs)

    def leave(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert on_return is not None
        on_return(index, output)

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(module.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
            if on_return is not None:
                stack.enter_context(module.register_forward_hook(partial(leave, index)))

        yield


def before_next_call(module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> RemovableHandle:
    """Call `see(args, kwargs)` once, before the next call of a module.

    The hook removes itself when it is called.

    Returns:
        A handle that removes the hook if the module is not called.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        see(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    return handle
