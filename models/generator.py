"""The frozen text-to-image model: what every family can do, and how one is loaded."""

import logging
import random
from typing import Protocol

import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.utils import enable_progress_bars

from models.checkpoints import opening_checkpoint
from models.hub import locate_source
from models.loading import load_stable_diffusion
from models.sampling import SamplingSettings
from models.stable_diffusion_xl import load_stable_diffusion_xl
from system.paths import find_path
from utils import UserError, join_lines, require

transformers.utils.logging.disable_progress_bar()  # weights load in a blink ...
enable_progress_bars()  # ... but downloads do not
logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)  # 'expected types' of the safety checker

FAMILIES = {  # by the pipeline that model_index.json names
    "StableDiffusionPipeline": load_stable_diffusion, "LatentConsistencyModelPipeline": load_stable_diffusion,
    "StableDiffusionXLPipeline": load_stable_diffusion_xl}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Generator(Protocol):
    """A family of text-to-image models: one file in this folder, with its diffusers pipeline as the reference.

    `cond` is one tensor that holds whatever the denoiser reads of a prompt; latents and images are batches.
    """

    networks: tuple[torch.nn.Module, ...]  # all frozen weights
    denoiser: torch.nn.Module  # what predicts the noise, one of them
    token_widths: tuple[int, ...]  # of a token's vectors in each text encoder; D is their sum
    device: torch.device
    dtype: torch.dtype

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizer the word that stands for the token."""

    def initial_vectors(self, initializer: str, num_vectors: int | None = None) -> torch.Tensor:
        """The vectors [K, D], float32, that training starts from: the tokens of a phrase, in turn."""

    def vocabulary_norms(self) -> tuple[float, ...]:
        """The mean norm of the vocabulary's vectors, of every text encoder."""

    def nearest_words(self, vectors: torch.Tensor) -> list[str]:
        """Of every text encoder and vector [K, D]: the words of the vocabulary with the largest cosine."""

    def check_prompts(self, prompts: list[str], num_vectors: int):
        """Raise UserError for a prompt that is too long with a token of so many vectors."""

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts [P] and the token's vectors in each [P, K, D] -> cond [P, ...], differentiable in `vectors`."""

    def sample(self, cond: torch.Tensor, seeds, settings: SamplingSettings, grad_steps: int = 1,
               batch_size: int | None = None, start: torch.Tensor | None = None) -> torch.Tensor:
        """cond [B, ...] and seeds [B] -> latents z_0, with a graph through the last `grad_steps` steps."""

    def check_sampling(self, settings: SamplingSettings, is_training: bool = False):
        """Raise UserError for settings that `sample` would not take, or through which no gradient would come."""

    def describe_mismatches(self, settings: SamplingSettings) -> list[str]:
        """What the checkpoint was made for, where `settings` ask for something else, in words."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents z_0 -> images [B, 3, H, W] in [0, 1], float32, differentiable."""

    def compile_networks(self):
        """Compile what runs in every step or with a graph."""


def check_compiler(device: str):
    """Compile a function of one line, never the same twice, since what was compiled before needs no compiler.

    Raises:
        UserError: this machine lacks what torch.compile needs.
    """
    factor = random.random()  # nosec B311
    try:
        torch.compile(lambda x: factor * x.sin())(torch.ones(8, device=device))
    except Exception as error:  # torch raises the backend's own kinds
        reason = join_lines(str(error).strip().split("\n")[0])[:200]
        raise UserError(f"torch_compile: this machine cannot compile ({reason}): install a C++ compiler such as g++, "
                        "and Triton for a GPU, or leave --torch_compile out") from error


def load_generator(model: str, device: str, dtype: torch.dtype, gradient_checkpointing: bool = False,
                   compile_networks: bool = False) -> Generator:
    """The generator in a folder or hub repository of a diffusers pipeline, frozen; on "meta" its shapes, from configs.

    Raises:
        UserError: one line that says what is missing (the download, the login, the network, a file or a compiler), or
            that the pipeline is of no family in FAMILIES.
    """
    if compile_networks:
        check_compiler(device)
    source = str(find_path(model) or model)
    with opening_checkpoint(model, source):
        index = DiffusionPipeline.load_config(**locate_source(source))
        name = index.get("_class_name")
        require(name in FAMILIES, f"'{model}' is for {name}; the generators that can be used are for "
                                  + ", ".join(FAMILIES))
        generator = FAMILIES[name](model, source, index, device, dtype)
    for network in generator.networks:
        if gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
    if compile_networks:
        generator.compile_networks()
    return generator
