"""A stand-in for NCCL: collectives that refuse tensors on the CPU, and carry those of simulated GPUs over gloo."""

from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from gpu.simulator import CudaTensor


@contextmanager
def nccl():
    """Start a group of the processes of `torchrun`, which looks like one of NCCL inside `with`."""
    dist.init_process_group("gloo")
    with (
        mock.patch.object(dist, "get_backend", lambda group=None: "nccl"),
        mock.patch.object(dist, "all_reduce", _carried(dist.all_reduce)),
        mock.patch.object(dist, "broadcast", _carried(dist.broadcast)),
    ):
        yield
    dist.destroy_process_group()


def _carried(collective):
    def carry(tensor, *args, **kwargs):
        if not isinstance(tensor, CudaTensor):
            raise RuntimeError("No backend type associated with device type cpu")
        return collective(tensor.held, *args, **kwargs)

    return carry
