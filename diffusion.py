"""The frozen generator: prompts to embeddings, noise to latents with a graph on one UNet call, latents to images."""

import inspect
import logging
from typing import NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.utils import enable_progress_bars
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTokenizer

from opening import opening
from utils import UserError, find_path, require

transformers.utils.logging.disable_progress_bar()  # weights load in a blink ...
enable_progress_bars()  # ... but downloads do not
logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)  # 'expected types' of the safety checker


class Components(NamedTuple):
    """The parts of a latent diffusion model that take part; all weights frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: diffusers.SchedulerMixin

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_components(model: str, device: str, dtype: torch.dtype, gradient_checkpointing: bool = False) -> Components:
    """Load tokenizer, text encoder, UNet, VAE and scheduler one by one; nothing else of the pipeline is read.

    Raises:
        UserError: one line that says what is missing: the download, the login, the network or a file.
    """
    source = str(find_path(model) or model)
    with opening(model, source):
        named = DiffusionPipeline.load_config(source)["scheduler"][1]
        scheduler_class = getattr(diffusers, named, None)
        require(isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin),
                f"model_index.json of '{model}' names '{named}' as its scheduler, which is none of diffusers'")
        components = Components(
            CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            _load_weights(CLIPTextModel, source, "text_encoder", dtype=dtype),
            _load_weights(UNet2DConditionModel, source, "unet", torch_dtype=dtype),
            _load_weights(AutoencoderKL, source, "vae", torch_dtype=dtype),
            scheduler_class.from_pretrained(source, subfolder="scheduler"))
    require(components.tokenizer.model_max_length <= components.text_encoder.config.max_position_embeddings,
            f"the tokenizer's files of '{model}' are missing or another model's")
    check_fit(components, model)
    for module in (components.text_encoder, components.unet, components.vae):
        module.requires_grad_(False).eval().to(device)
        if device.startswith("cuda"):
            module.to(memory_format=torch.channels_last)  # what its convolutions like best; no gain on a CPU
    if gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        components.vae.enable_gradient_checkpointing()
    return components


def check_fit(components: Components, model: str):
    """Raise UserError where the parts are not of one text-to-image model that draws from noise and a prompt alone."""
    unet, scheduler = components.unet.config, components.scheduler
    reads, hears = unet.in_channels, unet.cross_attention_dim
    require(reads == components.vae.config.latent_channels and hears == components.text_encoder.config.hidden_size,
            f"'{model}' is not such a model as Stable Diffusion 1 or 2: its UNet reads {reads} channels and embeddings "
            f"of {hears}, its VAE makes {components.vae.config.latent_channels} and its text encoder "
            f"{components.text_encoder.config.hidden_size}")
    require(hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input"),
            f"the scheduler of '{model}', {type(scheduler).__name__}, is not one for Stable Diffusion")


def _load_weights(cls, source, part, **dtype):
    """Take the fp16 files for fp16 and the full ones otherwise; the other kind where a checkpoint has only that."""
    variants = ("fp16", None) if torch.float16 in dtype.values() else (None, "fp16")
    errors = []
    for variant in variants:
        try:
            return cls.from_pretrained(source, subfolder=part, variant=variant, **dtype)
        except (OSError, ValueError) as error:
            errors.append(error)
    raise errors[variants.index(None)]


def encode_prompts(components: Components, prompts: list[str]) -> torch.Tensor:
    """Prompts -> prompt_embeds [B, L, D], padded to L = tokenizer.model_max_length as in every SD pipeline.

    Raises:
        UserError: a prompt longer than L tokens, whose end (and the token in it, perhaps) would be cut off.
    """
    tokenizer = components.tokenizer
    length = tokenizer.model_max_length
    input_ids = tokenizer(prompts, padding="max_length", max_length=length, return_tensors=None).input_ids
    for prompt, ids in zip(prompts, input_ids, strict=True):
        require(len(ids) <= length, f"the prompt has {len(ids)} tokens and the model reads {length}, so its end, and "
                                    f"the class token where it stands there, would be cut off: '{prompt}'")
    return components.text_encoder(torch.tensor(input_ids, device=components.device))[0]


def noise_sources(seeds: list[int]) -> list[torch.Generator]:
    """One generator an image, seeded by that image's seed: batches and other classes never change a picture."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_latents(components: Components, generators: list[torch.Generator], height: int, width: int):
    """Unit noise z_T [B, 4, H/8, W/8], drawn in float32 on the CPU whatever the device and precision."""
    factor = components.vae_scale_factor
    require(height % factor == 0 and width % factor == 0,
            f"height and width must be divisible by {factor}, for the VAE: {height} x {width} are not")
    shape = (len(generators), components.unet.config.in_channels, height // factor, width // factor)
    return randn_tensor(shape, generator=generators).to(components.device, components.unet.dtype)


def trajectory(components: Components, num_inference_steps: int, timesteps: list[int] | None = None):
    """A new scheduler set for one trajectory: the checkpoint's own, or explicit timesteps and then a jump to z_0."""
    config = components.scheduler.config
    if timesteps is None:
        # as StableDiffusionPipeline does for old checkpoints; latents have no range to be clipped to
        scheduler = type(components.scheduler).from_config(config, clip_sample=False, steps_offset=1)
        try:
            scheduler.set_timesteps(num_inference_steps)  # on the CPU, or every step would wait for the GPU
        except ValueError as error:
            raise UserError(f"num_inference_steps {num_inference_steps}: {' '.join(str(error).split())}") from error
    else:
        last = config.num_train_timesteps - 1
        require(timesteps[0] <= last, f"train_timesteps start at {timesteps[0]}, the model's go from {last} to 0")
        scheduler = EulerDiscreteScheduler.from_config(
            config, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
            final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


def denoise(components: Components, scheduler, latents: torch.Tensor, prompt_embeds: torch.Tensor,
            negative_prompt_embeds: torch.Tensor | None, guidance_scale: float, generators: list[torch.Generator],
            batch_size: int | None = None) -> torch.Tensor:
    """z_T [B, 4, h, w] -> z_0, with a graph through one UNet call: the conditional half of the final step.

    Gradient skipping (Sec. 3.2): earlier steps, and the unconditional half of the final one, run without a graph.
    `scheduler` comes from `trajectory` and serves once. No guidance at a scale of 1 or less: the
    unconditional half, and `negative_prompt_embeds`, are not computed. `generators` are drawn
    from by stochastic schedulers alone. The graph is made anew on the way back, `batch_size` images (all) at a time.
    """
    unet, guided = components.unet, guidance_scale > 1
    latents = latents * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    *early, final = zip(scheduler.timesteps, scheduler.timesteps.to(latents.device), strict=True)  # one copy to the GPU
    with torch.no_grad():
        both = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
        for t, t_unet in early:
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            noise_pred = unet(model_input, t_unet, encoder_hidden_states=both).sample
            if guided:
                unconditional, conditional = noise_pred.chunk(2)
                noise_pred = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(noise_pred, t, latents, **extra).prev_sample
        t, t_unet = final
        model_input = scheduler.scale_model_input(latents, t)
        if guided:
            unconditional = unet(model_input, t_unet, encoder_hidden_states=negative_prompt_embeds).sample
    parts = zip(model_input.split(batch_size or len(latents)), prompt_embeds.split(batch_size or len(latents)),
                strict=True)
    noise_pred = torch.cat([checkpoint(lambda z, embeds: unet(z, t_unet, encoder_hidden_states=embeds).sample, *part,
                                       use_reentrant=False, preserve_rng_state=False) for part in parts])
    if guided:
        noise_pred = unconditional + guidance_scale * (noise_pred - unconditional)
    return scheduler.step(noise_pred, t, latents, **extra).prev_sample


def generate_latents(components: Components, prompt_embeds: torch.Tensor, seeds: list[int], height: int, width: int,
                     guidance_scale: float, num_inference_steps: int, timesteps: list[int] | None = None,
                     batch_size: int | None = None) -> torch.Tensor:
    """z_0 [B, 4, h, w] of `prompt_embeds` [B, L, D], one a seed; differentiable as `denoise` is.

    `timesteps` None runs the checkpoint's own scheduler for `num_inference_steps`.
    """
    negative_prompt_embeds = None
    if guidance_scale > 1:
        with torch.no_grad():
            negative_prompt_embeds = encode_prompts(components, [""]).expand(len(seeds), -1, -1)
    generators = noise_sources(seeds)
    latents = initial_latents(components, generators, height, width)
    scheduler = trajectory(components, num_inference_steps, timesteps)
    return denoise(components, scheduler, latents, prompt_embeds, negative_prompt_embeds, guidance_scale, generators,
                   batch_size)


def decode(components: Components, latents: torch.Tensor) -> torch.Tensor:
    """z_0 [B, 4, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
    images = components.vae.decode(latents / components.vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def generate_images(components: Components, prompt_embeds: torch.Tensor, seeds: list[int], *sampling) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] of the latents of `generate_latents`, which takes the same arguments."""
    return decode(components, generate_latents(components, prompt_embeds, seeds, *sampling))
