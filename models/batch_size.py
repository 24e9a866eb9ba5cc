"""How many images fit into memory at once, and what helps if none does."""

import math
import sys

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from utils import require

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

WITHOUT_GRAPH = 4  # times as many images fit into memory where no graph is kept
NO_MEMORY = (
    "not enough memory for one image at a time: try --gradient_checkpointing True, "
    "--mixed_precision fp16 or bf16, fewer --classes_at_once, or smaller images"
)


def default_batch_size(images: int, device: str, height: int, width: int) -> int:
    """Return how many images to try at once: `images` on a GPU.

    Elsewhere as many pixels as that many of the miniature's 64 x 64 images: where memory is the
    system's own, nothing is raised when it runs out, and the process is killed.
    """
    return images if device.startswith("cuda") else max(1, images * 64 * 64 // (height * width))


def fit_batch_size(function, batch_size: int | None, start: int):
    """`function` with its keyword argument `batch_size` filled in.

    That is `batch_size` where given; else `start`, halved whenever memory runs out, and remembered
    from call to call. (accelerate's find_executable_batch_size collects garbage before every call,
    which takes half as long as an update of the miniature.)

    Raises:
        UserError: not even one image fits, or not the `batch_size` that was given.
    """
    size = batch_size or start

    def call_function(*arguments, **named):
        nonlocal size
        while True:
            try:
                return function(*arguments, batch_size=size, **named)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                require(size > 1, NO_MEMORY)
                require(
                    not batch_size,
                    f"not enough memory for {size} images at a time: give a smaller --batch_size, "
                    "or none for as many as fit",
                )
            size //= 2
            clear_device_cache(garbage_collection=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # the peak is that of what fits

    return call_function


def peak_memory_gb(device: str) -> float:
    """Return the peak memory of this process, of the GPU or the system, in GB.

    Not a number on Windows, which keeps no figure that Python could read.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
