"""Stable Diffusion 1 and 2: embeddings, latents with a graph on the final step, images."""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils.checkpoint import checkpoint

from models.base import Generator
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


class StableDiffusion(Generator):
    """The parts of a latent diffusion model that take part in drawing; all weights frozen."""

    def __init__(
        self, prompt_encoders: tuple[PromptEncoder, ...], unet, vae, scheduler, device: str
    ):
        scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(prompt_encoders, unet, vae, scheduler, device, scale_factor)
        self.unet = unet
        self.vae = vae

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Encode prompts [P] with the token in each [P, K, D] as prompt_embeds [P, L, D]."""
        (encoder,) = self.prompt_encoders
        use_mask = getattr(encoder.text_encoder.config, "use_attention_mask", False)
        return encoder.encode(prompts, vectors, use_mask)[0]

    def encode_negative(self) -> torch.Tensor:
        """Encode what guidance leads away from, in the form of `encode`."""
        return self.encode([""])

    def sample(
        self,
        cond: torch.Tensor,
        seeds,
        settings: SamplingSettings,
        batch_size: int | None = None,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """cond [B, ...] and their seeds -> latents z_0 [B, 4, h, w].

        Gradient skipping (Sec. 3.2): autograd records the last `settings.grad_steps` steps alone.
        With `batch_size` their graph is recomputed on the way back, for so many images at a time.
        With latents `start` the trajectory begins at these, noised to the first timestep, instead
        of pure noise.
        """
        scheduler = new_scheduler(self.scheduler, settings, seeds)
        generators = seeded_generators(seeds)
        step_kwargs = step_arguments(scheduler, generators)
        negative = None
        if settings.guidance_scale > 1 and not self.unet.config.time_cond_proj_dim:
            with torch.no_grad():
                negative = self.encode_negative().expand_as(cond)
        noise = self.initial_noise(generators, settings)
        if start is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(start, noise, scheduler.timesteps[:1])
        # for the UNet; the scheduler's stay on the CPU
        timesteps = move_timesteps(scheduler.timesteps, self.device)
        first_recorded = len(timesteps)
        if torch.is_grad_enabled():
            first_recorded -= settings.grad_steps
        for i, t in enumerate(scheduler.timesteps):
            is_recorded = i >= first_recorded
            with torch.set_grad_enabled(is_recorded):
                inputs = scheduler.scale_model_input(latents, t)
                if settings.stop_gradient:
                    inputs = inputs.detach()
                step_cond = cond if is_recorded else cond.detach()
                noise = self.guided_noise(
                    inputs, timesteps[i], step_cond, negative, settings, batch_size
                )
            latents = scheduler.step(noise, t, latents, **step_kwargs).prev_sample
        return latents

    def guided_noise(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        negative: torch.Tensor | None,
        settings: SamplingSettings,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Predict noise with classifier-free guidance (Ho & Salimans 2022).

        Without guidance if `negative` is None. Rescaled as in Lin et al. 2023. A UNet distilled
        from guided ones reads the scale as an embedding instead (Luo et al. 2023, Sec. 4.3).
        """
        scale = settings.guidance_scale
        if negative is None:
            embedded = self.embed_guidance(scale)
            return self.predict_noise(latents, t, cond, batch_size, embedded)
        if torch.is_grad_enabled():  # two calls, so that the conditional half alone has a graph
            unconditional = self.predict_noise(latents, t, negative)
            conditional = self.predict_noise(latents, t, cond, batch_size)
        else:
            both_latents = torch.cat([latents] * 2)
            both = self.predict_noise(both_latents, t, torch.cat([negative, cond]))
            unconditional, conditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if not settings.guidance_rescale:
            return guided
        deviation = conditional.std((1, 2, 3), keepdim=True)
        ratio = deviation / guided.std((1, 2, 3), keepdim=True)
        return guided * (1 + settings.guidance_rescale * (ratio - 1))

    def embed_guidance(self, scale: float) -> torch.Tensor | None:
        """Embed the guidance scale [1, E] for a distilled UNet; None for other UNets."""
        width = self.unet.config.time_cond_proj_dim
        if not width:
            return None
        return get_timestep_embedding(torch.tensor([1000 * (scale - 1)]), width)

    def predict_noise(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        batch_size: int | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the noise [B, 4, h, w] with the UNet.

        `batch_size` is as in `sample`, `scale` [1, E] from `embed_guidance`.
        """
        if batch_size is None or not torch.is_grad_enabled():
            timestep_cond = None
            if scale is not None:
                timestep_cond = scale.expand(len(latents), -1).to(latents)
            arguments = self.unet_arguments(latents, cond)
            return self.unet(latents, t, timestep_cond=timestep_cond, **arguments).sample
        parts = []
        for z, c in zip(latents.split(batch_size), cond.split(batch_size), strict=True):
            part = checkpoint(
                self.predict_noise,
                z,
                t,
                c,
                scale=scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            parts.append(part)
        return torch.cat(parts)

    def unet_arguments(self, latents: torch.Tensor, cond: torch.Tensor) -> dict:
        """Return what the UNet reads besides latents [B, 4, h, w] and timestep."""
        return {"encoder_hidden_states": cond}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode z_0 [B, 4, h, w] into images [B, 3, H, W] in [0, 1], float32."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def initial_noise(
        self, generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        """Draw unit noise z_T [B, 4, h, w]."""
        return initial_noise(
            generators,
            self.unet.config.in_channels,
            self.scale_factor,
            settings,
            self.device,
            self.dtype,
        )

    def check_sampling(self, settings: SamplingSettings, is_training: bool = False):
        """Raise UserError for steps or sizes that the checkpoint lacks or cannot learn with."""
        check_trajectory(self.scheduler, settings, is_training)
        self.initial_noise(seeded_generators([0]), settings)

    def describe_mismatches(self, settings: SamplingSettings) -> list[str]:
        """Describe what the checkpoint was made for, where `settings` ask for something else."""
        return describe_mismatches(self.unet.config, self.scheduler, self.scale_factor, settings)

    def compile_networks(self):
        """Compile what runs in every step or with a graph: the UNet and the VAE's decoder."""
        self.unet.compile()
        self.vae.decoder.compile()
