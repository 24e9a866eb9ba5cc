"""What every family of generators can do: the contract between a frozen model and the method."""

from abc import ABC, abstractmethod

import torch

from models.placeholder import PromptEncoder
from models.sampling import SamplingSettings


class Generator(ABC):
    """A frozen text-to-image model; each family is one file in this folder that extends this class.

    Its diffusers pipeline is the reference: with the same latents, prompt and settings it draws the
    same pictures. `cond` is one tensor that holds whatever the denoiser reads of a prompt; latents
    and images are batches.
    """

    def __init__(
        self,
        prompt_encoders: tuple[PromptEncoder, ...],
        denoiser,
        decoder,
        scheduler,
        device: str,
        scale_factor: int,
    ):
        """Freeze the networks and move them to `device`; `scale_factor` is pixels per latent."""
        self.prompt_encoders = prompt_encoders
        self.denoiser = denoiser  # what predicts the noise
        self.scheduler = scheduler
        self.scale_factor = scale_factor
        text_encoders = [encoder.text_encoder for encoder in prompt_encoders]
        self.networks = (*text_encoders, denoiser, decoder)  # all frozen weights
        for network in self.networks:
            network.requires_grad_(False).eval().to(device)
            if device.startswith("cuda"):  # fastest for its convolutions; no gain on a CPU
                network.to(memory_format=torch.channels_last)
        # the widths of a token's vectors in each text encoder; D is their sum
        self.token_widths = tuple(encoder.token_width for encoder in prompt_encoders)
        self.device: torch.device = denoiser.device
        self.dtype: torch.dtype = denoiser.dtype

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizers the placeholder; see `add_placeholder`."""
        for encoder in self.prompt_encoders:
            encoder.set_placeholder(placeholder)

    def initial_vectors(self, initializer: str, num_vectors: int | None = None) -> torch.Tensor:
        """Return the initial vectors [K, D], float32: one per token of a phrase."""
        parts = []
        for encoder in self.prompt_encoders:
            parts.append(encoder.initial_vectors(initializer, num_vectors))
        return torch.cat(parts, dim=1).to(self.device)

    def vocabulary_norms(self) -> tuple[float, ...]:
        """Return the mean norm of the vocabulary's vectors, for every text encoder."""
        return tuple(encoder.mean_norm() for encoder in self.prompt_encoders)

    def nearest_words(self, vectors: torch.Tensor) -> list[str]:
        """Find, for every text encoder and vector [K, D], the words with the largest cosine."""
        parts = vectors.split(self.token_widths, 1)
        words = []
        for encoder, part in zip(self.prompt_encoders, parts, strict=True):
            words += encoder.nearest_words(part)
        return words

    def check_prompts(self, prompts: list[str], num_vectors: int):
        """Raise UserError for a prompt that is too long with a token of so many vectors."""
        for encoder in self.prompt_encoders:
            encoder.check_prompts(prompts, num_vectors)

    @abstractmethod
    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Encode prompts [P] with the token in each [P, K, D] as cond [P, ...], differentiable."""

    @abstractmethod
    def sample(
        self,
        cond: torch.Tensor,
        seeds,
        settings: SamplingSettings,
        batch_size: int | None = None,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """cond [B, ...] and seeds [B] -> latents z_0, with a graph through the last steps.

        With `batch_size` the graph is recomputed on the way back, for so many images at a time.
        With latents `start` the trajectory begins at these, noised to the first timestep.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents z_0 into images [B, 3, H, W] in [0, 1], float32, differentiable."""

    @abstractmethod
    def check_sampling(self, settings: SamplingSettings, is_training: bool = False):
        """Raise UserError for what `sample` cannot do, or what would pass no gradient."""

    @abstractmethod
    def describe_mismatches(self, settings: SamplingSettings) -> list[str]:
        """Describe what the checkpoint was made for, where `settings` ask for something else."""

    @abstractmethod
    def compile_networks(self):
        """Compile what runs in every step or with a graph."""
