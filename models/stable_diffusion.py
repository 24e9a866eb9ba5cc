"""Stable Diffusion 1 and 2: prompts to embeddings, noise to latents with a graph on the final step, and to images."""

import inspect

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTokenizer

from models.checkpoints import load_part
from models.placeholder import add_placeholder, initial_vectors, inserted_vectors, tokenize_prompts
from models.sampling import SamplingSettings, initial_noise, new_scheduler, scheduler_class, seeded_generators
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

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizer the word that stands for the token; see `add_placeholder`."""
        self.placeholder_id = add_placeholder(self.tokenizer, placeholder)

    def initial_vectors(self, initializer: str) -> torch.Tensor:
        """The vectors [1, D], float32, that training starts from: the embedding of the word `initializer`."""
        return initial_vectors(self.tokenizer, self.text_encoder, initializer).to(self.device)

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts and the token's vectors [P, K, D] in each -> prompt_embeds [P, L, D], differentiable in `vectors`."""
        count = 1 if vectors is None else vectors.shape[1]
        input_ids = tokenize_prompts(self.tokenizer, prompts, self.placeholder_id, count).to(self.device)
        with inserted_vectors(self.text_encoder, self.placeholder_id, vectors):
            return self.text_encoder(input_ids)[0]

    def sample(self, cond: torch.Tensor, seeds, settings: SamplingSettings, grad_steps: int = 1,
               batch_size: int | None = None, start: torch.Tensor | None = None) -> torch.Tensor:
        """prompt_embeds [B, L, D] and their seeds -> latents z_0 [B, 4, h, w].

        Gradient skipping (Sec. 3.2): autograd records the last `grad_steps` steps alone. With `batch_size` their graph
        is made again on the way back, for so many images at a time. With latents `start` the trajectory begins at
        these, noised to the first timestep, instead of pure noise.
        """
        scheduler, generators = new_scheduler(self.scheduler, settings), seeded_generators(seeds)
        step_kwargs = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        negative = None
        if settings.guidance_scale > 1:
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
        """Classifier-free guidance (Ho & Salimans 2022); none where `negative` is None."""
        if negative is None:
            return self.predict_noise(latents, t, cond, batch_size)
        if torch.is_grad_enabled():  # two calls, so that the conditional half alone has a graph
            unconditional = self.predict_noise(latents, t, negative)
            conditional = self.predict_noise(latents, t, cond, batch_size)
        else:
            both = self.predict_noise(torch.cat([latents] * 2), t, torch.cat([negative, cond]))
            unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def predict_noise(self, latents, t, cond, batch_size: int | None = None) -> torch.Tensor:
        """The UNet's prediction [B, 4, h, w]; `batch_size` as in `sample`."""
        if batch_size is None or not torch.is_grad_enabled():
            return self.unet(latents, t, encoder_hidden_states=cond).sample
        parts = zip(latents.split(batch_size), cond.split(batch_size), strict=True)
        return torch.cat([checkpoint(self.predict_noise, z, t, part, use_reentrant=False, preserve_rng_state=False)
                          for z, part in parts])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """z_0 [B, 4, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def initial_noise(self, generators: list[torch.Generator], settings: SamplingSettings) -> torch.Tensor:
        """Unit noise z_T [B, 4, h, w]."""
        scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return initial_noise(generators, self.unet.config.in_channels, scale_factor, settings, self.device, self.dtype)

    def check_sampling(self, settings: SamplingSettings):
        """Raise UserError for steps or sides that the checkpoint does not have."""
        new_scheduler(self.scheduler, settings)
        self.initial_noise(seeded_generators([0]), settings)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [B, 4, h, w], float32, of the latents of images [B, 3, H, W] in [0, 1]."""
        posterior = self.vae.encode((images * 2 - 1).to(self.device, self.dtype)).latent_dist
        return tuple((self.vae.config.scaling_factor * part).float() for part in (posterior.mean, posterior.std))

    def denoising_loss(self, latents: torch.Tensor, cond: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The loss that the UNet was trained with, on latents [B, 4, h, w]; noise and timesteps from `generator`."""
        require(self.scheduler.config.prediction_type == "epsilon", "this generator does not predict the noise")
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noisy = self.scheduler.add_noise(latents.cpu(), noise, timesteps).to(self.device, self.dtype)
        return F.mse_loss(self.predict_noise(noisy, timesteps.to(self.device), cond).float(), noise.to(self.device))

    def compile_networks(self):
        """Compile what runs in every step or with a graph: the UNet and the VAE's decoder."""
        self.unet.compile()
        self.vae.decoder.compile()


def load_stable_diffusion(model: str, source: str, index: dict, device: str, dtype: torch.dtype) -> StableDiffusion:
    """The parts that model_index.json (`index`) names, read one by one; nothing else of the pipeline is.

    Raises:
        UserError: the parts are not of one text-to-image model that draws from noise and a prompt alone.
    """
    scheduler = scheduler_class(index["scheduler"][1], model).from_pretrained(source, subfolder="scheduler")
    generator = StableDiffusion(
        CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
        load_part(CLIPTextModel, source, "text_encoder", dtype=dtype),
        load_part(UNet2DConditionModel, source, "unet", torch_dtype=dtype),
        load_part(AutoencoderKL, source, "vae", torch_dtype=dtype), scheduler, device)
    text, unet, vae = (network.config for network in generator.networks)
    require(generator.tokenizer.model_max_length <= text.max_position_embeddings,
            f"the tokenizer's files of '{model}' are missing or another model's")
    require(unet.in_channels == vae.latent_channels and unet.cross_attention_dim == text.hidden_size,
            f"'{model}' is not laid out as Stable Diffusion 1 or 2: its UNet reads {unet.in_channels} channels and "
            f"embeddings of {unet.cross_attention_dim}, its VAE makes {vae.latent_channels} and its text encoder "
            f"{text.hidden_size}")
    require(hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input"),
            f"the scheduler of '{model}', {type(scheduler).__name__}, is not one for Stable Diffusion")
    return generator
