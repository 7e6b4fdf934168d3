"""CUDA devices that a build of PyTorch for CPUs simulates.

    with simulated_gpus(2) as gpus:
        model.to("cuda:1")
        gpus.waits, gpus.copies, gpus.peak(1)

A tensor on `cuda:N` is a `CudaTensor`: its device and dispatch keys are CUDA's, and it holds a CPU tensor. Each
operator runs on the held tensors, after the checks of devices and dtypes that CUDA makes. transformers, accelerate,
PEFT and autograd run unchanged. A process has to call `runtime.load()` before `import torch`.

Not simulated: time, the rounding of CUDA kernels, fused attention, streams, limits of memory, and `nn.DataParallel`.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # reads functions of torch.cuda, so it is imported before they are replaced
import torch.utils._mode_utils
from gpu import runtime


CPU = torch.device("cpu")
TOTAL_MEMORY = 80 * 2**30
PACKAGE = "/optimum_structprune/"

# Operators whose tensors must all be on one device. Others accept CPU tensors of 0 dimensions as numbers.
ONE_DEVICE = {
    "addmm", "addmv", "addr", "baddbmm", "bmm", "cat", "convolution", "dot", "embedding", "equal", "gather",
    "index_add", "index_add_", "index_select", "linalg_cholesky_ex", "linalg_solve_triangular", "linear", "mm", "mv",
    "native_layer_norm", "nll_loss_forward", "scatter", "scatter_", "scatter_add", "scatter_add_", "stack",
}  # fmt: skip
# Operators that take indices, which may be on the CPU.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}
# Matrix products, which CUDA has for floating point alone.
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "addr"}
# Operators whose result or shape the host needs, so that it waits for the device.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "repeat_interleave",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class Gpus:
    """The simulated devices, and counts of what they did.

    Attributes:
        waits: The number of times that the host waited for a device, by `(operator, line)`.
        copies: The number of copies between devices, by `(direction, line)`.
        products: The number of matrix products by the device that ran them.

    A line is `file:number` of the package, or of the caller of torch.
    """

    def __init__(self, count: int, float64: bool):
        self.count = count
        self.float64 = float64
        self.current = 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.products: Counter[str] = Counter()
        self._users: Counter[tuple[int, int]] = Counter()  # tensors by device and storage
        self._allocated: Counter[int] = Counter()
        self._peak: Counter[int] = Counter()

    def device(self, device: int | str | torch.device | None = None) -> torch.device:
        """Return a device with its index. Raise an error like CUDA's if it does not exist."""
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        if index is None or index < 0:
            index = self.current
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def allocated(self, device: int | str | torch.device | None = None) -> int:
        """Return the bytes of all tensors on a device."""
        return self._allocated[self.device(device).index]

    def peak(self, device: int | str | torch.device | None = None) -> int:
        """Return the most bytes that were allocated on a device at one time."""
        return self._peak[self.device(device).index]

    def reset_peak(self, device: int | str | torch.device | None = None) -> None:
        """Let `peak` start again from the bytes that are allocated now."""
        self._peak[self.device(device).index] = self.allocated(device)

    def waits_in(self, file: str) -> int:
        """Count the waits that lines of a file of the package caused, such as `vocabulary/parts.py`."""
        return self._in(file, self.waits)

    def copies_in(self, file: str) -> int:
        """Count the copies between devices that lines of a file of the package caused."""
        return self._in(file, self.copies)

    def _in(self, file: str, counts: Counter[tuple[str, str]]) -> int:
        assert (Path(__file__).parents[2] / f"{PACKAGE}{file}".strip("/")).is_file(), f"There is no {file}."
        return sum(number for (_, line), number in counts.items() if line.startswith(f"{file}:"))

    def hold(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Count a tensor's storage as allocated, until the last tensor that uses it is gone."""
        storage = tensor.untyped_storage()
        key, size = (device.index, storage._cdata), storage.nbytes()
        if not self._users[key]:
            self._allocated[device.index] += size
            self._peak[device.index] = max(self._peak[device.index], self._allocated[device.index])
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size).atexit = False

    def _release(self, key: tuple[int, int], size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._allocated[key[0]] -= size


_gpus: Gpus | None = None


def active() -> Gpus:
    """Return the devices of the enclosing `simulated_gpus`."""
    if _gpus is None:
        raise RuntimeError("A simulated GPU is used outside `with simulated_gpus(…)`.")
    return _gpus


def calling_line() -> str:
    """Return the innermost line of the package that is running, else of the code that called torch."""
    frame, caller = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        if caller is None and "/torch/" not in name and name != __file__:
            caller = f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return caller or "torch"


class CudaTensor(torch.Tensor):
    """A tensor on a simulated device. `held` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, **options):
        if device is None:  # accelerate makes a parameter by `type(parameter)(values, requires_grad=…)`
            return torch.nn.Parameter(held, **options)
        if held.dtype in (torch.float64, torch.complex128) and not active().float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        tensor._hold(held)
        return tensor

    def _hold(self, held: torch.Tensor) -> None:
        self.held = held.detach()
        active().hold(self.held, self.device)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return Call(operator, args, kwargs or {}).run()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert {args[0].device} device type tensor to numpy.")
        if function is torch.Tensor.tolist:
            active().waits["tolist", calling_line()] += 1
            return args[0].held.tolist()
        if function in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage):
            return function(args[0].held)
        if function is torch.Tensor.is_shared:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function == torch.Tensor.data.__set__:
            if not isinstance(args[1], CudaTensor):
                raise NotImplementedError("The data of a tensor on a simulated GPU was replaced by a CPU tensor.")
            args[0]._hold(args[1].held)
        return result

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            storage = copy.deepcopy(self.held.untyped_storage(), memo)  # tensors that share memory go on to share it
            held = torch.empty(0, dtype=self.held.dtype)
            held.set_(storage, self.held.storage_offset(), self.held.size(), self.held.stride())
        copied = _restored(held, self.device, self.requires_grad, isinstance(self, torch.nn.Parameter))
        memo[id(self)] = copied
        if self.grad is not None:
            copied.grad = copy.deepcopy(self.grad, memo)
        return copied

    def __reduce_ex__(self, protocol):
        return _restored, (self.held, self.device, self.requires_grad, isinstance(self, torch.nn.Parameter))

    def __repr__(self, **_):
        return f"{self.held!r:.200} on {self.device}"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)


def _restored(held: torch.Tensor, device: torch.device, requires_grad: bool, is_parameter: bool) -> torch.Tensor:
    tensor = CudaTensor(held, device)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def _leaves(value):
    if isinstance(value, (list, tuple)):
        for element in value:
            yield from _leaves(element)
    else:
        yield value


def _mapped(function, value):
    """Apply a function to all leaves of lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, element) for element in value)
    return function(value)


def _held(value):
    return value.held if isinstance(value, CudaTensor) else value


class Call:
    """A call of an operator on the CUDA key: its checks, its counts, and its run on the held tensors."""

    def __init__(self, operator, args, kwargs):
        self.operator, self.args, self.kwargs = operator, args, kwargs
        self.name = operator._schema.name.removeprefix("aten::")
        self.tensors = [leaf for leaf in _leaves((args, *kwargs.values())) if isinstance(leaf, torch.Tensor)]
        self.simulated = [tensor for tensor in self.tensors if isinstance(tensor, CudaTensor)]
        asked = kwargs.get("device")
        self.asked = None if asked is None else torch.device(asked)

    def run(self):
        """Check the call, run it on the CPU, and return its results on their device."""
        target = self._target()
        self._check_dtype()
        self._check_generator(target)
        self._count(target)
        if self.name == "_fused_sdp_choice":
            return 0  # the formula in plain operators
        if self.name == "_pin_memory":
            return self.args[0]
        if self.name == "record_stream":
            return None

        result = self._result()
        self._repeat_on_wrapper()
        if self.is_list:  # such as _foreach_add: each result is where its first input is
            if isinstance(result, (list, tuple)):
                pairs = zip(result, self.args[0], strict=True)
                return [self._wrapped(output, tensor.device) for output, tensor in pairs]
            return result
        if target.type != "cuda":
            return result
        return _mapped(lambda output: self._wrapped(output, target), result)

    @property
    def is_list(self) -> bool:
        return self.name.startswith(("_foreach", "_fused", "_amp_foreach")) and self.name != "_fused_sdp_choice"

    def _target(self) -> torch.device:
        """Return the device of the results. Raise an error like CUDA's if the arguments are on several devices."""
        if self.asked is not None and self.asked.type == "cuda":
            self.asked = active().device(self.asked)
        if self.is_list:
            return self.simulated[0].device
        if self.name in COPIES:
            return self.args[0].device if self.name == "copy_" else self.asked or self.args[0].device

        if self.name in INDEXED:
            devices = self._indexed_devices()
        else:
            devices = {tensor.device for tensor in self.tensors if not self._is_number(tensor)}
        if self.name.endswith("_") and isinstance(self.args[0], torch.Tensor):
            devices.add(self.args[0].device)
        if len(devices) > 1:
            first, second = sorted(map(str, devices), reverse=True)[:2]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{first} and {second}! (when checking arguments of {self.operator})"
            )
        if self.asked is not None:
            return self.asked
        if devices:
            return devices.pop()
        return self.simulated[0].device if self.simulated else CPU

    def _is_number(self, tensor: torch.Tensor) -> bool:
        return tensor.device == CPU and tensor.dim() == 0 and self.name not in ONE_DEVICE

    def _indexed_devices(self) -> set[torch.device]:
        indexed, indices = self.args[0], [index for index in self.args[1] if index is not None]
        for index in indices:
            if index.device not in (CPU, indexed.device):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({indexed.device}), got {index.device}"
                )
        values = [value for value in self.args[2:3] if not self._is_number(value)]
        return {indexed.device, *(value.device for value in values)}

    def _check_dtype(self) -> None:
        if self.name not in PRODUCTS or not self.simulated:
            return
        dtype = self.simulated[0].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise RuntimeError(f'"{self.name}_cuda" not implemented for {str(dtype)!r}')

    def _check_generator(self, target: torch.device) -> None:
        generator = self.kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"Expected a {target.type!r} device type for generator, got {generator.device.type!r}")

    def _count(self, target: torch.device) -> None:
        gpus = active()
        if self.name in COPIES:
            source = self.args[1] if self.name == "copy_" else self.args[0]
            if source.device == target:
                return
            direction = f"{source.device.type} to {target.type}"
            gpus.copies[direction, calling_line()] += 1
            if target.type == "cpu":
                gpus.waits["copy to the CPU", calling_line()] += 1
        elif self.name in WAITING and self.simulated:
            gpus.waits[self.name, calling_line()] += 1
        elif self.name in INDEXED and any(index is not None and index.dtype == torch.bool for index in self.args[1]):
            gpus.waits["index by a mask", calling_line()] += 1
        elif self.name in PRODUCTS:
            gpus.products[str(target)] += 1

    def _result(self):
        """Run the operator on the CPU."""
        args = _mapped(_held, self.args)
        kwargs = {name: _mapped(_held, value) for name, value in self.kwargs.items()}
        for name in ("pin_memory", "non_blocking"):
            kwargs.pop(name, None)
        if self.asked is not None:
            kwargs["device"] = CPU if self.asked.type == "cuda" else self.asked

        if self.operator._overloadname == "dtype" and self.name in PRODUCTS:  # `out_dtype`, which CUDA alone has
            if args[0].dtype not in (torch.bfloat16, torch.float16) or args[-1] != torch.float32:
                raise RuntimeError("out_dtype must be float32, and the inputs float16 or bfloat16")
            product = getattr(torch.ops.aten, self.name).default
            return product(*(tensor.float() for tensor in args[:-1]))
        if self.name == "histc" and not args[0].dtype.is_floating_point:  # which CUDA has for integers too
            return self.operator(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return self.operator(*args, **kwargs)

    def _repeat_on_wrapper(self) -> None:
        """Change the shape of the wrapper as that of the held tensor has changed, by `squeeze_` and the like."""
        if torch.Tag.inplace_view not in self.operator.tags or not isinstance(self.args[0], CudaTensor):
            return
        before = torch._C._meta_in_tls_dispatch_include()
        with torch.utils._mode_utils.no_dispatch():
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                self.operator(*self.args, **self.kwargs)
            finally:
                torch._C._set_meta_in_tls_dispatch_include(before)

    def _wrapped(self, output, device: torch.device):
        if not isinstance(output, torch.Tensor):
            return output
        for tensor in self.simulated:
            if tensor.held is output:  # an operator that works in place returns its argument
                return tensor
        return CudaTensor(output, device)


@cache
def _factories():
    """Return the operators that make a tensor out of no tensor, with their names."""
    factories = []
    for full_name in torch._C._dispatch_get_all_op_names():
        if not full_name.startswith("aten::"):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
            continue
        name = full_name.removeprefix("aten::")
        base, _, overload = name.partition(".")
        with suppress(AttributeError, RuntimeError):
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            arguments = operator._schema.arguments
            takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
            if not takes_tensors and any(argument.name == "device" for argument in arguments):
                factories.append((operator, name))
    return factories


def _kernel(operator):
    def kernel(*args, **kwargs):
        return Call(operator, args, {"device": "cuda", **kwargs}).run()

    return kernel


class ChosenDevice(AbstractContextManager):
    """`torch.cuda.device`: the current device inside `with`."""

    def __init__(self, device):
        self.index = active().device(device).index

    def __enter__(self):
        self.before, active().current = active().current, self.index

    def __exit__(self, *error):
        active().current = self.before


def _set_device(device) -> None:
    active().current = active().device(device).index


def _nothing(*args, **kwargs) -> None:
    return None


def _patches(gpus: Gpus):
    """Yield patches of the functions that ask the runtime of CUDA."""
    properties = SimpleNamespace(
        name="Simulated GPU", total_memory=TOTAL_MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32
    )
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: gpus.count,
        "current_device": lambda: gpus.current,
        "set_device": _set_device,
        "device": ChosenDevice,
        "synchronize": _nothing,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *args: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (TOTAL_MEMORY - gpus.allocated(device), TOTAL_MEMORY),
        "memory_allocated": gpus.allocated,
        "memory_reserved": gpus.allocated,
        "memory_stats": lambda device=None: {},
        "max_memory_allocated": gpus.peak,
        "max_memory_reserved": gpus.peak,
        "reset_peak_memory_stats": gpus.reset_peak,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
    }
    # The generator of the CPU draws for all devices.
    generators = {
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * gpus.count,
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }
    accelerator = {
        "is_available": lambda: True,
        "device_count": lambda: gpus.count,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: gpus.current,
        "synchronize": _nothing,
        "empty_cache": _nothing,
    }
    cuda |= generators
    for module, functions in (
        (torch.cuda, cuda),
        (torch.cuda.random, generators),
        (torch.accelerator, accelerator),
    ):
        for name, function in functions.items():
            yield mock.patch.object(module, name, function, create=True)
    yield mock.patch.object(torch._C, "_cuda_getDevice", lambda: gpus.current, create=True)
    yield mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args: self)
    yield mock.patch.object(torch.Tensor, "is_pinned", lambda self, *args: False)
    # transformers loads weights in threads on CUDA, whose order would differ from run to run.
    yield mock.patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1")


@contextmanager
def simulated_gpus(count: int = 1, float64: bool = True):
    """Simulate CUDA devices inside `with`.

    Args:
        count: The number of devices, at most 4.
        float64: Whether the devices compute in fp64. Without it, an fp64 tensor raises the error of MPS.
    """
    global _gpus
    if _gpus is not None:
        raise RuntimeError("Simulated GPUs cannot be nested.")
    swaps, lifts = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    loaded = runtime.load()
    _gpus = Gpus(count, float64)
    loaded.enable(1)
    library = torch.library.Library("aten", "IMPL")
    try:
        for operator, name in _factories():
            with suppress(RuntimeError):  # an operator that is made of others has no kernel of its own
                library.impl(name, _kernel(operator), "CUDA")
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        with ExitStack() as stack:
            for patch in _patches(_gpus):
                stack.enter_context(patch)
            yield _gpus
    finally:
        library._destroy()
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch._C._set_only_lift_cpu_tensors(lifts)
        loaded.enable(0)
        _gpus = None
