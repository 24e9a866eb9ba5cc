"""What runs of the networks cost: FLOPs by network, and peak memory by stage.

On the meta device too.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.generator import Generator

PARTS = ("UNet", "VAE", "classifier", "text encoder")
# 'denoiser': its step with a graph
STAGES = (
    "sampling",
    "denoiser",
    "decoder and classifier",
    "text encoder",
)


def count_inputs(inputs: tuple, named: dict) -> int:
    """Count the images or prompts with which a network is called."""
    return len(next(iter((*inputs, *named.values()))))


@contextmanager
def watched_networks(
    generator: Generator,
    classifier: torch.nn.Module,
    start_part: Callable[[str, bool, int], None],
    end_graph: Callable[[str, int], None],
):
    """Within this context every start of a network is reported.

    `start_part` gets its part of PARTS, whether it runs with a graph or on the way back, and how
    many images or prompts go in, none on the way back; `end_graph` gets those that came out with a
    graph.
    """
    hooks = []
    *text_encoders, unet, vae = generator.networks

    def watch_network(network: torch.nn.Module, part: str):
        def start_call(network, inputs, named):
            start_part(part, torch.is_grad_enabled(), count_inputs(inputs, named))

        def end_call(network, inputs, named, output):
            tensors = [
                value
                for value in (output.values() if isinstance(output, dict) else [output])
                if torch.is_tensor(value) and value.requires_grad
            ]
            for value in tensors:
                value.register_hook(lambda gradient: start_part(part, True, 0))
            if tensors:
                end_graph(part, count_inputs(inputs, named))

        hooks.extend(
            [
                network.register_forward_pre_hook(start_call, with_kwargs=True),
                network.register_forward_hook(end_call, with_kwargs=True),
            ]
        )

    decoder = [
        (child, "VAE")
        for name, child in vae.named_children()
        if name in ("post_quant_conv", "decoder")
    ]
    for network, part in [
        *((encoder, "text encoder") for encoder in text_encoders),
        (unet, "UNet"),
        *decoder,
        (classifier, "classifier"),
    ]:
        watch_network(network, part)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def counted_flops(generator: Generator, classifier: torch.nn.Module):
    """Within this context FLOPs are those of the network that started last, forwards or backwards.

    Yields {part: FLOPs}, complete at the end, with how many images the UNet had, and how many with
    a graph.
    """
    counts, running = Counter(), ["", 0]

    def start_part(part: str, has_graph: bool = False, images: int = 0):
        total = counter.get_total_flops()
        counts[running[0]] += total - running[1]
        running[:] = part, total
        counts["images"] += images * (part == "UNet")

    def end_graph(part: str, images: int):
        counts["images with a graph"] += images * (part == "UNet")

    # attention as matrix products: not every fused kernel's FLOPs are known to the counter
    with (
        watched_networks(generator, classifier, start_part, end_graph),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        yield counts
        start_part("")


class AttentionShapes(torch.autograd.Function):
    """Attention on the meta device with the memory of fused kernels.

    Inputs, output and one sum per row, no square matrix.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedAttention(TorchFunctionMode):
    """A mode in which attention is AttentionShapes.

    The meta device has no fused kernels of its own.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return AttentionShapes.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


@contextmanager
def fused_attention():
    """Give the calls of all modules FusedAttention within this context.

    Also recomputed calls, which torch shields from a mode that is entered outside.
    """
    mode, depth = FusedAttention(), [0]

    def start_call(module, inputs):
        if not depth[0]:
            mode.__enter__()
        depth[0] += 1

    def end_call(module, inputs, output):
        depth[0] -= 1
        if not depth[0]:
            mode.__exit__(None, None, None)

    hooks = [
        register_module_forward_pre_hook(start_call),
        register_module_forward_hook(end_call, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class MemoryMeter(TorchDispatchMode):
    """A mode that counts the bytes of all living tensors of the meta device, by stage."""

    def __init__(self, networks: Iterable[torch.nn.Module]):
        super().__init__()
        self.alive, self.bytes, self.stage, self.peaks = set(), 0, "parameters", Counter()
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self.add_tensor(tensor)

    def start_stage(self, stage: str):
        self.stage = stage
        self.peaks[stage] = max(self.peaks[stage], self.bytes)

    def add_tensor(self, tensor: torch.Tensor):
        """Count the tensor's storage until nothing refers to it, unless it is counted already."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and id(storage) not in self.alive:
            self.alive.add(id(storage))
            self.bytes += storage.nbytes()
            self.start_stage(self.stage)
            weakref.finalize(storage, self.drop_storage, id(storage), storage.nbytes())

    def drop_storage(self, name: int, size: int):
        self.alive.remove(name)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if torch.is_tensor(output):
                self.add_tensor(output)
        return outputs


@contextmanager
def metered_memory(generator: Generator, classifier: torch.nn.Module):
    """Within this context what runs on the meta device is followed.

    Yields {stage: bytes at its peak} of STAGES and 'parameters', which every stage includes.
    """
    meter = MemoryMeter([*generator.networks, classifier])

    def start_part(part: str, has_graph: bool, images: int):
        meter.start_stage(
            {"UNet": "denoiser" if has_graph else "sampling", "text encoder": "text encoder"}.get(
                part, "decoder and classifier"
            )
        )

    with (
        watched_networks(generator, classifier, start_part, lambda part, images: None),
        fused_attention(),
        meter,
    ):
        yield meter.peaks
