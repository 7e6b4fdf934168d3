"""Replace NCCL by collectives that refuse tensors on the CPU, and send tensors of simulated GPUs by gloo."""

from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from gpu.simulator import CudaTensor


@contextmanager
def nccl():
    """Connect the processes of `torchrun`. Inside `with`, the group looks like a group of NCCL."""
    dist.init_process_group("gloo")
    with (
        mock.patch.object(dist, "get_backend", lambda group=None: "nccl"),
        mock.patch.object(dist, "all_reduce", _send_by_gloo(dist.all_reduce)),
        mock.patch.object(dist, "broadcast", _send_by_gloo(dist.broadcast)),
    ):
        yield
    dist.destroy_process_group()


def _send_by_gloo(collective):
    """Return a collective that runs on the CPU tensors of simulated GPUs."""

    def send(tensor, *args, **kwargs):
        if not isinstance(tensor, CudaTensor):
            raise RuntimeError("No backend type associated with device type cpu")
        return collective(tensor.held, *args, **kwargs)

    return send
