"""How the frozen text-to-image model is loaded, whatever its family."""

import logging
import random

import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.utils import enable_progress_bars

from models.base import Generator
from models.checkpoints import opening_checkpoint
from models.hub import locate_source
from models.loading import load_stable_diffusion
from models.stable_diffusion_xl import load_stable_diffusion_xl
from system.paths import find_path
from utils import UserError, join_lines, require

transformers.utils.logging.disable_progress_bar()  # hide loading bars ...
enable_progress_bars()  # ... but keep download bars
# 'expected types' of the safety checker
logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)

FAMILIES = {  # by the pipeline that model_index.json names
    "StableDiffusionPipeline": load_stable_diffusion,
    "LatentConsistencyModelPipeline": load_stable_diffusion,
    "StableDiffusionXLPipeline": load_stable_diffusion_xl,
}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_compiler(device: str):
    """Compile a function of one line.

    Never the same twice, since compiled code is cached and would need no compiler.

    Raises:
        UserError: this machine lacks what torch.compile needs.
    """
    factor = random.random()  # nosec B311
    try:
        torch.compile(lambda x: factor * x.sin())(torch.ones(8, device=device))
    except Exception as error:  # torch raises the backend's own kinds
        reason = join_lines(str(error).strip().split("\n")[0])[:200]
        raise UserError(
            f"torch_compile: this machine cannot compile ({reason}): install a C++ compiler such as"
            " g++, and Triton for a GPU, or leave --torch_compile out"
        ) from error


def load_generator(
    model: str,
    device: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    compile_networks: bool = False,
) -> Generator:
    """The generator in a folder or hub repository of a diffusers pipeline, frozen.

    On "meta" its shapes alone, from configs.

    Raises:
        UserError: one line that says what is missing (the download, the login, the network, a file
            or a compiler), or
            that the pipeline is of no family in FAMILIES.
    """
    if compile_networks:
        check_compiler(device)
    source = str(find_path(model) or model)
    with opening_checkpoint(model, source):
        index = DiffusionPipeline.load_config(**locate_source(source))
        name = index.get("_class_name")
        require(
            name in FAMILIES,
            f"'{model}' is for {name}; the generators that can be used are for "
            + ", ".join(FAMILIES),
        )
        generator = FAMILIES[name](model, source, index, device, dtype)
    for network in generator.networks:
        if gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
    if compile_networks:
        generator.compile_networks()
    return generator
