"""CUDA devices that a build of PyTorch for CPUs simulates.

    with simulated_gpus(2) as gpus:
        model.to("cuda:1")
        gpus.waits, gpus.copies, gpus.peak(1)

A tensor on `cuda:N` is a `CudaTensor`. It has the device and the dispatch keys of CUDA, and it holds a CPU tensor.
Each operator checks devices and dtypes as CUDA does, and then runs on the held tensors. transformers, accelerate,
PEFT and autograd run unchanged. A process has to call `runtime.load()` before `import torch`.

Not simulated: time, the rounding of CUDA kernels, fused attention, streams, limits of memory, and `nn.DataParallel`.
"""

from __future__ import annotations

import copy
import os
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
# Matrix products. CUDA has them for floating point only.
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "addr"}
# Operators that make the host wait for the device, because it needs the result or its shape.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "repeat_interleave",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class Gpus:
    """Hold simulated devices, and count their waits, copies and matrix products.

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
        # The number of tensors by device and storage.
        self._users: Counter[tuple[int, int]] = Counter()
        self._allocated: Counter[int] = Counter()
        self._peak: Counter[int] = Counter()

    def device(self, device: int | str | torch.device | None = None) -> torch.device:
        """Return a device with its index. Raise an error like CUDA's if it does not exist."""
        index = device
        if isinstance(device, (str, torch.device)):
            index = torch.device(device).index
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
        """Set `peak` to the bytes that are allocated now."""
        self._peak[self.device(device).index] = self.allocated(device)

    def waits_in(self, file: str) -> int:
        """Count the waits that lines of a file of the package caused, such as `vocabulary/parts.py`."""
        return self._in(file, self.waits)

    def copies_in(self, file: str) -> int:
        """Count the copies between devices that lines of a file of the package caused."""
        return self._in(file, self.copies)

    def _in(self, file: str, counts: Counter[tuple[str, str]]) -> int:
        path = Path(__file__).parents[2] / PACKAGE.strip("/") / file
        assert path.is_file(), f"There is no {file}."
        return sum(number for (_, line), number in counts.items() if line.startswith(f"{file}:"))

    def hold(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Count the storage of a tensor as allocated until the last tensor that uses it is deleted."""
        storage = tensor.untyped_storage()
        key = (device.index, storage._cdata)
        size = storage.nbytes()
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
    """Return the innermost running line of the package, or else the line of the code that called torch."""
    frame = sys._getframe(1)
    caller = "torch"
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        if caller == "torch" and "/torch/" not in name and name != __file__:
            caller = f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return caller


class CudaTensor(torch.Tensor):
    """Hold the values of a tensor on a simulated device in a CPU tensor, `held`."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, **options):
        # accelerate makes a parameter by `type(parameter)(values, requires_grad=…)`.
        if device is None:
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
            # Copies of tensors that share memory share memory too.
            storage = copy.deepcopy(self.held.untyped_storage(), memo)
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
        if self.dim() == 0:
            return format(self.item(), spec)
        return repr(self)


def _restored(held: torch.Tensor, device: torch.device, requires_grad: bool, is_parameter: bool) -> torch.Tensor:
    tensor = CudaTensor(held, device)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def _leaves(value):
    """Yield all leaves of lists and tuples."""
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
    """Check and count a call of an operator for CUDA, and run it on the held tensors."""

    def __init__(self, operator, args, kwargs):
        self.operator = operator
        self.args = args
        self.kwargs = kwargs
        self.name = operator._schema.name.removeprefix("aten::")
        leaves = _leaves([args, list(kwargs.values())])
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.simulated = [tensor for tensor in self.tensors if isinstance(tensor, CudaTensor)]
        self.requested_device = None
        if kwargs.get("device") is not None:
            self.requested_device = torch.device(kwargs["device"])

    def run(self):
        """Check the call, run it on the CPU, and return its results on their device."""
        target = self._target()
        self._check_dtype()
        self._check_generator(target)
        self._count(target)
        # The choice 0 is attention in plain operators.
        if self.name == "_fused_sdp_choice":
            return 0
        if self.name == "_pin_memory":
            return self.args[0]
        if self.name == "record_stream":
            return None

        result = self._result()
        self._repeat_on_wrapper()
        if self.is_list:
            return self._wrapped_list(result)
        if target.type != "cuda":
            return result
        return _mapped(lambda output: self._wrapped(output, target), result)

    @property
    def is_list(self) -> bool:
        """Whether the operator works on lists of tensors, as `_foreach_add` does."""
        return self.name.startswith(("_foreach", "_fused", "_amp_foreach")) and self.name != "_fused_sdp_choice"

    def _target(self) -> torch.device:
        """Return the device of the results. Raise an error like CUDA's if the arguments are on several devices."""
        if self.requested_device is not None and self.requested_device.type == "cuda":
            self.requested_device = active().device(self.requested_device)
        if self.is_list:
            return self.simulated[0].device
        if self.name == "copy_":
            return self.args[0].device
        if self.name in COPIES:
            return self.requested_device or self.args[0].device

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
        if self.requested_device is not None:
            return self.requested_device
        if devices:
            return devices.pop()
        if self.simulated:
            return self.simulated[0].device
        return CPU

    def _is_number(self, tensor: torch.Tensor) -> bool:
        return tensor.device == CPU and tensor.dim() == 0 and self.name not in ONE_DEVICE

    def _indexed_devices(self) -> set[torch.device]:
        indexed = self.args[0]
        for index in self.args[1]:
            if index is not None and index.device not in (CPU, indexed.device):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({indexed.device}), got {index.device}"
                )

        devices = {indexed.device}
        for value in self.args[2:3]:
            if not self._is_number(value):
                devices.add(value.device)
        return devices

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
            self._count_copy(target)
        elif self.name in WAITING and self.simulated:
            gpus.waits[self.name, calling_line()] += 1
        elif self.name in INDEXED and any(index is not None and index.dtype == torch.bool for index in self.args[1]):
            gpus.waits["index by a mask", calling_line()] += 1
        elif self.name in PRODUCTS:
            gpus.products[str(target)] += 1

    def _count_copy(self, target: torch.device) -> None:
        source = self.args[1] if self.name == "copy_" else self.args[0]
        if source.device == target:
            return

        direction = f"{source.device.type} to {target.type}"
        active().copies[direction, calling_line()] += 1
        if target.type == "cpu":
            active().waits["copy to the CPU", calling_line()] += 1

    def _result(self):
        """Run the operator on the CPU."""
        args = _mapped(_held, self.args)
        kwargs = {name: _mapped(_held, value) for name, value in self.kwargs.items()}
        for name in ("pin_memory", "non_blocking"):
            kwargs.pop(name, None)
        if self.requested_device is not None:
            kwargs["device"] = CPU if self.requested_device.type == "cuda" else self.requested_device

        # Only CUDA has `out_dtype`.
        if self.operator._overloadname == "dtype" and self.name in PRODUCTS:
            if args[0].dtype not in (torch.bfloat16, torch.float16) or args[-1] != torch.float32:
                raise RuntimeError("out_dtype must be float32, and the inputs float16 or bfloat16")
            product = getattr(torch.ops.aten, self.name).default
            inputs = [tensor.float() for tensor in args[:-1]]
            return product(*inputs)

        # CUDA has `histc` for integers too.
        if self.name == "histc" and not args[0].dtype.is_floating_point:
            return self.operator(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return self.operator(*args, **kwargs)

    def _repeat_on_wrapper(self) -> None:
        """Repeat an operator that changes a shape in place, such as `squeeze_`, on the wrapper of the held tensor."""
        if torch.Tag.inplace_view not in self.operator.tags or not isinstance(self.args[0], CudaTensor):
            return

        included = torch._C._meta_in_tls_dispatch_include()
        with torch.utils._mode_utils.no_dispatch():
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                self.operator(*self.args, **self.kwargs)
            finally:
                torch._C._set_meta_in_tls_dispatch_include(included)

    def _wrapped(self, output, device: torch.device):
        if not isinstance(output, torch.Tensor):
            return output

        # An operator that works in place returns its argument.
        for tensor in self.simulated:
            if tensor.held is output:
                return tensor
        return CudaTensor(output, device)

    def _wrapped_list(self, result):
        """Put each result of an operator on lists on the device of its first input."""
        if not isinstance(result, (list, tuple)):
            return result
        pairs = zip(result, self.args[0], strict=True)
        return [self._wrapped(output, tensor.device) for output, tensor in pairs]


@cache
def _factories():
    """Return the operators that make a tensor from other arguments than tensors, with their names."""
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
        kwargs.setdefault("device", "cuda")
        return Call(operator, args, kwargs).run()

    return kernel


class ChosenDevice(AbstractContextManager):
    """Replace `torch.cuda.device`, which sets the current device inside `with`."""

    def __init__(self, device):
        self.index = active().device(device).index

    def __enter__(self):
        self.previous_index = active().current
        active().current = self.index

    def __exit__(self, *error):
        active().current = self.previous_index


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
    cuda.update(generators)

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
    # On CUDA transformers loads weights in threads, and their order would differ in each run.
    # A test that asks for the kernels of the Hub gets an error, because they cannot be downloaded.
    kernels = os.environ.get("USE_HUB_KERNELS", "NO")
    yield mock.patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1", USE_HUB_KERNELS=kernels)


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

    swaps_params = torch.__future__.get_swap_module_params_on_conversion()
    lifts_only_cpu = torch._C._only_lift_cpu_tensors()
    loaded = runtime.load()
    _gpus = Gpus(count, float64)
    loaded.enable(1)
    library = torch.library.Library("aten", "IMPL")
    try:
        for operator, name in _factories():
            # A composite operator does not accept a kernel.
            with suppress(RuntimeError):
                library.impl(name, _kernel(operator), "CUDA")
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        with ExitStack() as stack:
            for patch in _patches(_gpus):
                stack.enter_context(patch)
            yield _gpus
    finally:
        library._destroy()
        torch.__future__.set_swap_module_params_on_conversion(swaps_params)
        torch._C._set_only_lift_cpu_tensors(lifts_only_cpu)
        loaded.enable(0)
        _gpus = None
