"""What every family's sampler shares: settings, noise, and a scheduler for one trajectory."""

import inspect
from typing import NamedTuple

import diffusers
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from utils import UserError, join_lines, require

SCHEDULERS = (  # equal to StableDiffusionPipeline in tests/models/test_schedulers.py
    "PNDMScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "IPNDMScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
FEW_STEPS = 8  # of distilled models


class SamplingSettings(NamedTuple):
    """How images are drawn; no classifier-free guidance at a scale of 1 or less."""

    height: int  # pixels
    width: int
    guidance_scale: float
    num_inference_steps: int  # of the checkpoint's own scheduler
    timesteps: tuple[int, ...] | None = (
        None  # instead of these steps, from noise to image, then a jump to z_0
    )
    guidance_rescale: float = 0.0  # phi of Lin et al. 2023, Sec. 3.4
    grad_steps: int = 1  # the last steps, which alone have a graph: gradient skipping (Sec. 3.2)
    stop_gradient: bool = False  # at the denoiser's input, where several steps have one


def seeded_generators(seeds) -> list[torch.Generator]:
    """Make one generator per image, seeded by that image's seed.

    So neither batches nor other classes change a picture.
    """
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(
    generators: list[torch.Generator],
    channels: int,
    scale_factor: int,
    settings: SamplingSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Draw unit noise z_T [B, C, H/8, W/8] in float32 on the CPU.

    Whatever the device and precision.

    Raises:
        UserError: sides that the VAE's `scale_factor` does not divide.
    """
    height, width = settings.height, settings.width
    require(
        height % scale_factor == 0 and width % scale_factor == 0,
        f"height and width must be divisible by {scale_factor}, for the VAE: {height} x {width} "
        "is not",
    )
    shape = (len(generators), channels, height // scale_factor, width // scale_factor)
    return randn_tensor(shape, generator=generators).to(device, dtype)


def move_timesteps(timesteps: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move the timesteps to another device; those in float64 as float32.

    Apple's GPUs lack float64, and the UNet reads timesteps in float32 anyway.
    """
    if timesteps.dtype == torch.float64:
        timesteps = timesteps.float()
    return timesteps.to(device)


def scheduler_class(name: str, model: str) -> type[diffusers.SchedulerMixin]:
    """Find the diffusers scheduler that model_index.json names.

    Raises:
        UserError: one that does not draw with a Stable Diffusion UNet, or that diffusers does not
            have.
    """
    require(
        name in SCHEDULERS and hasattr(diffusers, name),
        f"model_index.json of '{model}' names the scheduler '{name}', but the supported ones are "
        f"{', '.join(SCHEDULERS)}",
    )
    return getattr(diffusers, name)


def new_scheduler(scheduler, settings: SamplingSettings, seeds=()):
    """Copy `scheduler` and set it for one trajectory.

    The checkpoint's own timesteps, or explicit ones and a prediction of z_0 from the last. A
    scheduler keeps state, so each trajectory needs a new one. `seeds` are for schedulers that draw
    noise themselves.

    Raises:
        UserError: timesteps that the scheduler does not have, or noise that would depend on the
            batch.
    """
    config = scheduler.config
    if settings.timesteps is None:
        changes = {}
        if "noise_sampler_seed" in config:
            require(
                config.noise_sampler_seed is None,
                "scheduler_config.json fixes noise_sampler_seed, so a picture's "
                "noise would depend on its batch: set it to null",
            )
            changes["noise_sampler_seed"] = [int(seed) for seed in seeds]
        copy = type(scheduler).from_config(config, **changes)
        # on the CPU, or every step would wait for the GPU
        copy.set_timesteps(settings.num_inference_steps)
        return copy
    last = config.num_train_timesteps - 1
    require(
        settings.timesteps[0] <= last,
        f"train_timesteps start at {settings.timesteps[0]}, but the model's range from {last} to 0",
    )
    # unit noise at any first timestep
    copy = EulerDiscreteScheduler(
        config.num_train_timesteps,
        trained_betas=scheduler.betas.tolist(),
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        timestep_spacing="leading",
    )
    copy.set_timesteps(timesteps=list(settings.timesteps))
    return copy


def step_arguments(scheduler, generators: list[torch.Generator]) -> dict:
    """Return what a pipeline passes to `scheduler.step` besides noise, timestep and latents."""
    accepted = inspect.signature(scheduler.step).parameters
    return {
        name: value for name, value in (("generator", generators), ("eta", 0.0)) if name in accepted
    }


def check_trajectory(scheduler, settings: SamplingSettings, is_training: bool):
    """Sample once without a network.

    Raises:
        UserError: the scheduler does not have these steps, or its last one leaves nothing to learn
            from in training.
    """
    config, name, generators = scheduler.config, type(scheduler).__name__, seeded_generators([0])
    require(
        name != "PNDMScheduler"
        or config.skip_prk_steps
        or settings.timesteps
        or settings.num_inference_steps > 3,
        f"num_inference_steps {settings.num_inference_steps}: PNDM without skip_prk_steps needs 4 "
        "or more",
    )
    require(
        "learned" not in str(config.get("variance_type")),
        f"{name} with variance_type '{config.get('variance_type')}' is for a UNet that also "
        "predicts a variance",
    )
    try:
        trial = new_scheduler(scheduler, settings, [0])
        latents, noise = torch.ones(1, 4, 2, 2) * trial.init_noise_sigma, torch.ones(1, 4, 2, 2)
        with torch.enable_grad():
            for t in trial.timesteps:
                trial.scale_model_input(latents, t)
                noise = noise.detach().requires_grad_()
                latents = trial.step(
                    noise, t, latents.detach(), **step_arguments(trial, generators)
                ).prev_sample
            gradient = None
            if latents.requires_grad:
                (gradient,) = torch.autograd.grad(latents.sum(), noise, allow_unused=True)
        if not latents.isfinite().all():
            raise ValueError("it gives non-finite latents")
    except UserError:
        raise
    except Exception as error:  # schedulers raise what their arithmetic raises
        steps = settings.timesteps or f"{settings.num_inference_steps} steps"
        raise UserError(
            f"{name} fails at {steps}: {type(error).__name__} {join_lines(error)}; try "
            "another --num_inference_steps, or another scheduler in scheduler_config.json"
        ) from error
    require(
        not is_training or gradient is not None and gradient.any(),
        f"the last step of {name} changes nothing, so no gradient passes through it, as with "
        "final_sigmas_type 'sigma_min' in scheduler_config.json: give "
        "--train_timesteps, such as 999 800 600",
    )


def describe_mismatches(
    unet, scheduler, scale_factor: int, settings: SamplingSettings
) -> list[str]:
    """Describe what a checkpoint was made for, by its configs, where `settings` differ."""
    found, size = [], unet.sample_size
    sides = tuple(
        scale_factor * side for side in ((size, size) if isinstance(size, int) else size or ())
    )
    if sides and sides != (settings.height, settings.width):
        found.append(
            f"it was made for {sides[0]} x {sides[1]} pixels, and height and width are "
            f"{settings.height} and {settings.width}"
        )
    config, embeds_guidance = scheduler.config, unet.time_cond_proj_dim is not None
    is_consistency = embeds_guidance or type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler")
    is_turbo = (
        type(scheduler).__name__.startswith("Euler")
        and config.timestep_spacing == "trailing"
        and not config.rescale_betas_zero_snr
        and config.prediction_type == "epsilon"
    )
    if (
        (is_consistency or is_turbo)
        and settings.timesteps is None
        and settings.num_inference_steps > FEW_STEPS
    ):
        found.append(
            f"its scheduler is set as for models distilled to {FEW_STEPS} steps or fewer, and "
            f"num_inference_steps is {settings.num_inference_steps}"
        )
    if (is_consistency or is_turbo) and not embeds_guidance and settings.guidance_scale > 2:
        found.append(
            "its scheduler is set as for models distilled to draw without guidance, and "
            f"guidance_scale is {settings.guidance_scale}: 0 switches it off"
        )
    if settings.guidance_rescale and (embeds_guidance or settings.guidance_scale <= 1):
        found.append("guidance_rescale has no effect where no guidance is computed")
    return found
