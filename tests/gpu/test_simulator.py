"""Simulated GPUs compute as the CPU does, raise the errors of CUDA, and count waits, copies and memory."""

import pytest
import torch
from gpu.simulator import simulated_gpus


def test_devices_exist_inside_the_context_only():
    assert not torch.cuda.is_available()
    with simulated_gpus(2) as gpus:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert torch.ones(2, device="cuda:1").device == torch.device("cuda", 1)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(2, device="cuda:2")
        assert gpus.count == 2

    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def test_operators_compute_and_differentiate_on_the_device():
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = linear(x)
    expected.square().sum().backward()
    gradient = linear.weight.grad.clone()
    linear.zero_grad()

    with simulated_gpus():
        linear.to("cuda")
        assert linear.weight.device == torch.device("cuda", 0)

        output = linear(x.cuda())
        output.square().sum().backward()
        assert torch.equal(output.cpu(), expected)
        assert torch.equal(linear.weight.grad.cpu(), gradient)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.equal(a, b),
        lambda a, b: a.mul_(b),
        lambda a, b: a[b[0].long() * 0],
    ],
)
def test_tensors_of_two_devices_do_not_mix(mix):
    with simulated_gpus(2):
        first = torch.ones(2, 2, device="cuda:0")
        second = torch.ones(2, 2, device="cuda:1")
        with pytest.raises(RuntimeError, match="same device"):
            mix(first, second)


def test_numbers_and_indices_may_be_on_the_cpu():
    with simulated_gpus():
        x = torch.arange(4.0, device="cuda")
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
        assert x[torch.tensor([3, 1])].tolist() == [3, 1]


def test_calls_that_cuda_does_not_support_are_refused():
    with simulated_gpus():
        x = torch.arange(4.0, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()

        integers = torch.ones(2, 2, dtype=torch.int64, device="cuda")
        with pytest.raises(RuntimeError, match="not implemented"):
            integers @ integers


def test_memory_is_counted():
    with simulated_gpus(2) as gpus:
        x = torch.ones(256, device="cuda:1")
        assert gpus.allocated(1) == 1024
        assert gpus.allocated(0) == 0

        y = x + 1
        assert gpus.allocated(1) == 2048
        del y
        assert gpus.allocated(1) == 1024
        assert gpus.peak(1) == 2048

        gpus.reset_peak(1)
        assert gpus.peak(1) == 1024


def test_waits_and_copies_are_counted():
    with simulated_gpus(2) as gpus:
        x = torch.ones(256, device="cuda:1")
        assert not gpus.waits

        x.sum().item()
        x.to("cuda:0")
        x.cpu()
        # The host waits for the item and for the copy to the CPU.
        assert sum(gpus.waits.values()) == 2
        assert [direction for direction, _ in gpus.copies] == ["cuda to cuda", "cuda to cpu"]
        assert all("test_simulator.py" in line for _, line in gpus.waits)


def test_devices_without_float64_refuse_it():
    with simulated_gpus(float64=False):
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="cuda").double()
