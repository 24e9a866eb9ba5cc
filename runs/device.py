"""Which GPU this process computes on."""

import torch

from utils import WITHOUT_GPU_OR_NETWORK, require


def choose_device(device: str, local_rank: int) -> str:
    """Choose the device to compute on, as `device` asks for it.

    `local_rank` is this process's number among a launcher's on this machine, or -1.

    Raises:
        UserError: a device that is not there.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return device
    if kind == "mps":
        is_there = torch.backends.mps.is_available()
        require(is_there, f"no Apple GPU here, {WITHOUT_GPU_OR_NETWORK}")
        return device
    require(
        torch.cuda.is_available(),
        "no CUDA GPU here: use --device cpu --mixed_precision no, which is slow, "
        + WITHOUT_GPU_OR_NETWORK,
    )
    count = torch.cuda.device_count()
    if number:
        require(int(number) < count, f"no GPU {number} here: there are {count}, counted from 0")
    if local_rank < 0:
        return device
    require(
        not number,
        f"--device {device} would put all processes on one GPU: give --device cuda, for one each",
    )
    require(
        local_rank < count,
        f"no GPU for process {local_rank + 1} of this machine, which has {count}: give as many "
        "--num_processes per machine as it has GPUs",
    )
    return f"cuda:{local_rank}"
