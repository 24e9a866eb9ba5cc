"""A sweep over classes by many processes: `accelerate launch run.py ...` gives the next class to whoever is free."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partialmethod

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

from stopping import handled_by
from utils import require

PATIENCE = timedelta(days=30)  # the first process to finish waits for the last


def join(device: str) -> PartialState:
    """Take part in the sweep, if a launcher started one; its first process alone shows progress.

    Raises:
        UserError: more processes than GPUs on this machine, or all on one of them.
    """
    gloo = {"backend": "gloo"} if "LOCAL_RANK" in os.environ else {}  # the processes exchange numbers, never tensors
    state = PartialState(cpu=True, timeout=PATIENCE, **gloo)
    if not state.is_main_process:
        hide_progress()
    require(state.num_processes == 1 or not device.startswith("cuda:"),
            f"--device {device} would put all processes on one GPU: give --device cuda, for one each")
    if state.num_processes > 1 and device == "cuda" and torch.cuda.is_available():
        require(state.local_process_index < torch.cuda.device_count(),
                f"no GPU for process {state.local_process_index + 1} of this machine, which has "
                f"{torch.cuda.device_count()}: give as many --num_processes a machine as it has GPUs")
        torch.cuda.set_device(state.local_process_index)  # what 'cuda' means here
    return state


def hide_progress():
    """No progress bars from here on in this process."""
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def close_bars():
    """Leave the bars as they stand, so that what is said next has its own line."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def agreed(topic: str, decide: Callable):
    """What the first process decides (of JSON's kinds), for all: what one sees on disk later may have changed already.

    `topic` is a name that is agreed on once.
    """
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    if state.is_main_process:
        _get_default_store().set(f"agreed {topic}", json.dumps(decide()))
    with handled_by(signal.SIG_DFL):  # the store would not let a handler run
        return json.loads(_get_default_store().get(f"agreed {topic}"))


def shared(items: list, queue: str) -> Iterator:
    """Every item once over all processes, the next to whoever asks; `queue` is a name that is used once."""
    if PartialState().num_processes == 1:
        yield from items
        return
    while (i := _get_default_store().add(queue, 1) - 1) < len(items):
        yield items[i]


def count_class(bar: tqdm):
    """One more is done; `bar` shows what all processes have done."""
    alone = PartialState().num_processes == 1
    bar.n = bar.n + 1 if alone else _get_default_store().add("done", 1)
    bar.refresh()


def wait_for_all(bar: tqdm):
    """Return when all processes are here; the first one shows the others' progress meanwhile."""
    state = PartialState()
    while state.num_processes > 1 and state.is_main_process and bar.n < bar.total:
        time.sleep(1)
        bar.n = _get_default_store().add("done", 0)
        bar.refresh()
    bar.close()
    meet()


def meet():
    """Return when all processes are here."""
    with handled_by(signal.SIG_DFL):
        PartialState().wait_for_everyone()


def from_all(items: list) -> list:
    """The items of all processes; each of them must ask."""
    if PartialState().num_processes == 1:
        return items
    with handled_by(signal.SIG_DFL):
        return gather_object(items)
