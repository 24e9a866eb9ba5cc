"""Stable Diffusion 1 and 2: prompts to embeddings, noise to latents with a graph on the final step, and to images."""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils.checkpoint import checkpoint

from models.placeholder import PromptEncoder
from models.sampling import (
    SamplingSettings,
    check_trajectory,
    describe_mismatches,
    initial_noise,
    move_timesteps,
    new_scheduler,
    seeded_generators,
    step_arguments,
)


class StableDiffusion:
    """The parts of a latent diffusion model that take part in drawing; all weights frozen."""

    def __init__(self, prompt_encoders: tuple[PromptEncoder, ...], unet, vae, scheduler, device: str):
        self.prompt_encoders, self.unet, self.vae, self.scheduler = prompt_encoders, unet, vae, scheduler
        self.networks, self.denoiser = (*(encoder.text_encoder for encoder in prompt_encoders), unet, vae), unet
        for network in self.networks:
            network.requires_grad_(False).eval().to(device)
            if device.startswith("cuda"):
                network.to(memory_format=torch.channels_last)  # fastest for its convolutions; no gain on a CPU
        self.token_widths = tuple(encoder.token_width for encoder in prompt_encoders)
        self.device, self.dtype = unet.device, unet.dtype
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizers the word that stands for the token; see `add_placeholder`."""
        for encoder in self.prompt_encoders:
            encoder.set_placeholder(placeholder)

    def initial_vectors(self, initializer: str, num_vectors: int | None = None) -> torch.Tensor:
        """The vectors [K, D], float32, that training starts from: the embeddings of the phrase `initializer`."""
        parts = [encoder.initial_vectors(initializer, num_vectors) for encoder in self.prompt_encoders]
        return torch.cat(parts, dim=1).to(self.device)

    def vocabulary_norms(self) -> tuple[float, ...]:
        """The mean norm of the vocabulary's vectors, of every text encoder."""
        return tuple(encoder.mean_norm() for encoder in self.prompt_encoders)

    def nearest_words(self, vectors: torch.Tensor) -> list[str]:
        """The words of every text encoder's vocabulary that the vectors [K, D] point to."""
        parts = zip(self.prompt_encoders, vectors.split(self.token_widths, 1), strict=True)
        return [words for encoder, part in parts for words in encoder.nearest_words(part)]

    def check_prompts(self, prompts: list[str], num_vectors: int):
        """Raise UserError for a prompt that is too long with a token of so many vectors."""
        for encoder in self.prompt_encoders:
            encoder.check_prompts(prompts, num_vectors)

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts and the token's vectors [P, K, D] in each -> prompt_embeds [P, L, D], differentiable in `vectors`."""
        encoder, = self.prompt_encoders
        return encoder.encode(prompts, vectors, getattr(encoder.text_encoder.config, "use_attention_mask", False))[0]

    def encode_negative(self) -> torch.Tensor:
        """What guidance leads away from, as `encode` gives it."""
        return self.encode([""])

    def sample(self, cond: torch.Tensor, seeds, settings: SamplingSettings, grad_steps: int = 1,
               batch_size: int | None = None, start: torch.Tensor | None = None) -> torch.Tensor:
        """cond [B, ...] and their seeds -> latents z_0 [B, 4, h, w].

        Gradient skipping (Sec. 3.2): autograd records the last `grad_steps` steps alone. With `batch_size` their graph
        is made again on the way back, for so many images at a time. With latents `start` the trajectory begins at
        these, noised to the first timestep, instead of pure noise.
        """
        scheduler, generators = new_scheduler(self.scheduler, settings, seeds), seeded_generators(seeds)
        step_kwargs, negative = step_arguments(scheduler, generators), None
        if settings.guidance_scale > 1 and not self.unet.config.time_cond_proj_dim:
            with torch.no_grad():
                negative = self.encode_negative().expand_as(cond)
        noise = self.initial_noise(generators, settings)
        latents = noise * scheduler.init_noise_sigma if start is None else \
            scheduler.add_noise(start, noise, scheduler.timesteps[:1])
        timesteps = move_timesteps(scheduler.timesteps, self.device)  # for the UNet; the scheduler's stay on the CPU
        first_recorded = len(timesteps) - grad_steps if torch.is_grad_enabled() else len(timesteps)
        for i, t in enumerate(scheduler.timesteps):
            is_recorded = i >= first_recorded
            with torch.set_grad_enabled(is_recorded):
                noise = self.guided_noise(scheduler.scale_model_input(latents, t), timesteps[i],
                                          cond if is_recorded else cond.detach(), negative, settings, batch_size)
            latents = scheduler.step(noise, t, latents, **step_kwargs).prev_sample
        return latents

    def guided_noise(self, latents, t, cond, negative, settings: SamplingSettings, batch_size: int | None = None):
        """Classifier-free guidance (Ho & Salimans 2022), rescaled (Lin et al. 2023); none where `negative` is None.

        A UNet distilled from guided ones reads the scale as an embedding instead (Luo et al. 2023, Sec. 4.3).
        """
        width, scale = self.unet.config.time_cond_proj_dim, settings.guidance_scale
        if negative is None:
            embedded = get_timestep_embedding(torch.tensor([1000 * (scale - 1)]), width) if width else None
            return self.predict_noise(latents, t, cond, batch_size, embedded)
        if torch.is_grad_enabled():  # two calls, so that the conditional half alone has a graph
            unconditional = self.predict_noise(latents, t, negative)
            conditional = self.predict_noise(latents, t, cond, batch_size)
        else:
            both = self.predict_noise(torch.cat([latents] * 2), t, torch.cat([negative, cond]))
            unconditional, conditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if not settings.guidance_rescale:
            return guided
        ratio = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return guided * (1 + settings.guidance_rescale * (ratio - 1))

    def predict_noise(self, latents, t, cond, batch_size: int | None = None, scale=None) -> torch.Tensor:
        """The UNet's prediction [B, 4, h, w]; `batch_size` as in `sample`, `scale` [1, E] as in `guided_noise`."""
        if batch_size is None or not torch.is_grad_enabled():
            timestep_cond = None if scale is None else scale.expand(len(latents), -1).to(latents)
            return self.unet(latents, t, timestep_cond=timestep_cond, **self.unet_arguments(latents, cond)).sample
        parts = zip(latents.split(batch_size), cond.split(batch_size), strict=True)
        return torch.cat([checkpoint(self.predict_noise, z, t, part, scale=scale, use_reentrant=False,
                                     preserve_rng_state=False) for z, part in parts])

    def unet_arguments(self, latents: torch.Tensor, cond: torch.Tensor) -> dict:
        """What the UNet reads besides latents [B, 4, h, w] and timestep."""
        return {"encoder_hidden_states": cond}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """z_0 [B, 4, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def initial_noise(self, generators: list[torch.Generator], settings: SamplingSettings) -> torch.Tensor:
        """Unit noise z_T [B, 4, h, w]."""
        return initial_noise(generators, self.unet.config.in_channels, self.scale_factor, settings, self.device,
                             self.dtype)

    def check_sampling(self, settings: SamplingSettings, is_training: bool = False):
        """Raise UserError for steps or sides that the checkpoint does not have, or cannot learn with."""
        check_trajectory(self.scheduler, settings, is_training)
        self.initial_noise(seeded_generators([0]), settings)

    def describe_mismatches(self, settings: SamplingSettings) -> list[str]:
        """What the checkpoint was made for, where `settings` ask for something else."""
        return describe_mismatches(self.unet.config, self.scheduler, self.scale_factor, settings)

    def compile_networks(self):
        """Compile what runs in every step or with a graph: the UNet and the VAE's decoder."""
        self.unet.compile()
        self.vae.decoder.compile()
