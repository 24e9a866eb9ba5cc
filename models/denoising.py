"""The training loss of latent diffusion models, for baselines that learn from pictures."""

import torch
import torch.nn.functional as F

from models.stable_diffusion import StableDiffusion
from utils import require


@torch.no_grad()
def encode_images(
    generator: StableDiffusion, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode images in [0, 1]: mean and deviation [B, 4, h, w] of their latents, float32."""
    vae = generator.vae
    encoded = vae.encode((images * 2 - 1).to(vae.device, vae.dtype))
    if "latent_dist" in encoded:
        moments = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        moments = encoded.latents, torch.zeros_like(encoded.latents)
    return tuple((vae.config.scaling_factor * part).float() for part in moments)


def compute_denoising_loss(
    generator: StableDiffusion,
    latents: torch.Tensor,
    cond: torch.Tensor,
    noise_source: torch.Generator,
) -> torch.Tensor:
    """Compute the UNet's training loss on latents [B, 4, h, w].

    Noise and timesteps come from `noise_source`.
    """
    scheduler = generator.scheduler
    require(
        scheduler.config.prediction_type == "epsilon"
        and not generator.unet.config.time_cond_proj_dim,
        "this generator does not predict the noise from a prompt alone",
    )
    noise = torch.randn(latents.shape, generator=noise_source)
    timesteps = torch.randint(
        scheduler.config.num_train_timesteps, (len(latents),), generator=noise_source
    )
    noisy = scheduler.add_noise(latents.cpu(), noise, timesteps).to(
        generator.device, generator.dtype
    )
    predicted = generator.predict_noise(noisy, timesteps.to(generator.device), cond)
    return F.mse_loss(predicted.float(), noise.to(generator.device))
