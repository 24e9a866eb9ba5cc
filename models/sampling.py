"""What every family's sampler shares: its settings, its noise, and a scheduler for one trajectory."""

from typing import NamedTuple

import diffusers
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from utils import UserError, join_lines, require


class SamplingSettings(NamedTuple):
    """How images are drawn; no classifier-free guidance at a scale of 1 or less."""

    height: int  # pixels
    width: int
    guidance_scale: float
    num_inference_steps: int  # of the checkpoint's own scheduler
    timesteps: tuple[int, ...] | None = None  # instead of these steps, from noise to image, then a jump to z_0


def seeded_generators(seeds) -> list[torch.Generator]:
    """One generator per image, seeded by that image's seed: neither batches nor other classes change a picture."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(generators: list[torch.Generator], channels: int, scale_factor: int, settings: SamplingSettings,
                  device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Unit noise z_T [B, C, H/8, W/8], drawn in float32 on the CPU whatever the device and precision.

    Raises:
        UserError: sides that the VAE's `scale_factor` does not divide.
    """
    height, width = settings.height, settings.width
    require(height % scale_factor == 0 and width % scale_factor == 0,
            f"height and width must be divisible by {scale_factor}, for the VAE: {height} x {width} are not")
    shape = (len(generators), channels, height // scale_factor, width // scale_factor)
    return randn_tensor(shape, generator=generators).to(device, dtype)


def scheduler_class(name: str, model: str) -> type:
    """The scheduler of diffusers that model_index.json names.

    Raises:
        UserError: diffusers has none of this name.
    """
    found = getattr(diffusers, name, None)
    require(isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin),
            f"model_index.json of '{model}' names '{name}' as its scheduler, which diffusers does not have")
    return found


def new_scheduler(scheduler, settings: SamplingSettings):
    """A copy of `scheduler` set for one trajectory: the checkpoint's own, or explicit timesteps and a jump to z_0.

    A scheduler keeps state, so each trajectory needs a new one.

    Raises:
        UserError: steps or timesteps that the scheduler does not have.
    """
    config = scheduler.config
    if settings.timesteps is None:
        # as StableDiffusionPipeline does for old checkpoints; latents have no range to be clipped to
        copy = type(scheduler).from_config(config, clip_sample=False, steps_offset=1)
        try:
            copy.set_timesteps(settings.num_inference_steps)  # on the CPU, or every step would wait for the GPU
        except ValueError as error:
            raise UserError(f"num_inference_steps {settings.num_inference_steps}: {join_lines(error)}") from error
        return copy
    last = config.num_train_timesteps - 1
    require(settings.timesteps[0] <= last,
            f"train_timesteps start at {settings.timesteps[0]}, the model's go from {last} to 0")
    copy = EulerDiscreteScheduler.from_config(config, use_karras_sigmas=False, use_exponential_sigmas=False,
                                              use_beta_sigmas=False, final_sigmas_type="zero")
    copy.set_timesteps(timesteps=list(settings.timesteps))
    return copy
