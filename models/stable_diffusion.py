"""Stable Diffusion 1 and 2: prompts to embeddings, noise to latents with a graph on the final step, and to images."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils.checkpoint import checkpoint

from models.placeholder import add_placeholder, initial_vectors, inserted_vectors, tokenize_prompts
from models.sampling import (
    SamplingSettings,
    check_trajectory,
    describe_mismatches,
    initial_noise,
    new_scheduler,
    seeded_generators,
    step_arguments,
)
from utils import require


class StableDiffusion:
    """The parts of a latent diffusion model that take part in drawing; all weights frozen."""

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, device: str):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.placeholder_id = scheduler, None
        self.networks, self.denoiser = (text_encoder, unet, vae), unet
        for network in self.networks:
            network.requires_grad_(False).eval().to(device)
            if device.startswith("cuda"):
                network.to(memory_format=torch.channels_last)  # fastest for its convolutions; no gain on a CPU
        self.device, self.dtype, self.token_width = unet.device, unet.dtype, text_encoder.config.hidden_size
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizer the word that stands for the token; see `add_placeholder`."""
        self.placeholder_id = add_placeholder(self.tokenizer, placeholder)

    def initial_vectors(self, initializer: str) -> torch.Tensor:
        """The vectors [1, D], float32, that training starts from: the embedding of the word `initializer`."""
        return initial_vectors(self.tokenizer, self.text_encoder, initializer).to(self.device)

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts and the token's vectors [P, K, D] in each -> prompt_embeds [P, L, D], differentiable in `vectors`."""
        count = 1 if vectors is None else vectors.shape[1]
        input_ids, mask = (tokens.to(self.device) for tokens in
                           tokenize_prompts(self.tokenizer, prompts, self.placeholder_id, count))
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        with inserted_vectors(self.text_encoder, self.placeholder_id, vectors):
            return self.text_encoder(input_ids, attention_mask=mask if masked else None)[0]

    def sample(self, cond: torch.Tensor, seeds, settings: SamplingSettings, grad_steps: int = 1,
               batch_size: int | None = None, start: torch.Tensor | None = None) -> torch.Tensor:
        """prompt_embeds [B, L, D] and their seeds -> latents z_0 [B, 4, h, w].

        Gradient skipping (Sec. 3.2): autograd records the last `grad_steps` steps alone. With `batch_size` their graph
        is made again on the way back, for so many images at a time. With latents `start` the trajectory begins at
        these, noised to the first timestep, instead of pure noise.
        """
        scheduler, generators = new_scheduler(self.scheduler, settings, seeds), seeded_generators(seeds)
        step_kwargs, negative = step_arguments(scheduler, generators), None
        if settings.guidance_scale > 1 and not self.unet.config.time_cond_proj_dim:
            with torch.no_grad():
                negative = self.encode([""]).expand(len(cond), -1, -1)
        noise = self.initial_noise(generators, settings)
        latents = noise * scheduler.init_noise_sigma if start is None else \
            scheduler.add_noise(start, noise, scheduler.timesteps[:1])
        timesteps = scheduler.timesteps.to(self.device)  # one copy for the UNet; the scheduler's stay on the CPU
        first_recorded = len(timesteps) - grad_steps if torch.is_grad_enabled() else len(timesteps)
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= first_recorded):
                noise = self.guided_noise(scheduler.scale_model_input(latents, t), timesteps[i], cond, negative,
                                          settings.guidance_scale, batch_size)
            latents = scheduler.step(noise, t, latents, **step_kwargs).prev_sample
        return latents

    def guided_noise(self, latents, t, cond, negative, guidance_scale: float, batch_size: int | None = None):
        """Classifier-free guidance (Ho & Salimans 2022); none where `negative` is None.

        A UNet distilled from guided ones reads the scale as an embedding instead (Luo et al. 2023, Sec. 4.3).
        """
        width = self.unet.config.time_cond_proj_dim
        if negative is None:
            scale = get_timestep_embedding(torch.tensor([1000 * (guidance_scale - 1)]), width) if width else None
            return self.predict_noise(latents, t, cond, batch_size, scale)
        if torch.is_grad_enabled():  # two calls, so that the conditional half alone has a graph
            unconditional = self.predict_noise(latents, t, negative)
            conditional = self.predict_noise(latents, t, cond, batch_size)
        else:
            both = self.predict_noise(torch.cat([latents] * 2), t, torch.cat([negative, cond]))
            unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def predict_noise(self, latents, t, cond, batch_size: int | None = None, scale=None) -> torch.Tensor:
        """The UNet's prediction [B, 4, h, w]; `batch_size` as in `sample`, `scale` [1, E] as in `guided_noise`."""
        if batch_size is None or not torch.is_grad_enabled():
            timestep_cond = None if scale is None else scale.expand(len(latents), -1).to(latents)
            return self.unet(latents, t, encoder_hidden_states=cond, timestep_cond=timestep_cond).sample
        parts = zip(latents.split(batch_size), cond.split(batch_size), strict=True)
        return torch.cat([checkpoint(self.predict_noise, z, t, part, scale=scale, use_reentrant=False,
                                     preserve_rng_state=False) for z, part in parts])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """z_0 [B, 4, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
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

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [B, 4, h, w], float32, of the latents of images [B, 3, H, W] in [0, 1]."""
        encoded = self.vae.encode((images * 2 - 1).to(self.device, self.dtype))
        moments = (encoded.latent_dist.mean, encoded.latent_dist.std) if "latent_dist" in encoded else \
            (encoded.latents, torch.zeros_like(encoded.latents))
        return tuple((self.vae.config.scaling_factor * part).float() for part in moments)

    def denoising_loss(self, latents: torch.Tensor, cond: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The loss that the UNet was trained with, on latents [B, 4, h, w]; noise and timesteps from `generator`."""
        require(self.scheduler.config.prediction_type == "epsilon" and not self.unet.config.time_cond_proj_dim,
                "this generator does not predict the noise from a prompt alone")
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noisy = self.scheduler.add_noise(latents.cpu(), noise, timesteps).to(self.device, self.dtype)
        return F.mse_loss(self.predict_noise(noisy, timesteps.to(self.device), cond).float(), noise.to(self.device))

    def compile_networks(self):
        """Compile what runs in every step or with a graph: the UNet and the VAE's decoder."""
        self.unet.compile()
        self.vae.decoder.compile()
