"""How a class token is usually coded, to compare with: correct, on a pipeline of diffusers, but plain.

One image at a time, accumulated; both guidance halves of the last step through the UNet with a graph; the whole
embedding matrix in AdamW, its other rows restored after each step; the whole pipeline saved (not timed) in the end.
"""

from collections.abc import Iterator
from itertools import count

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from method.class_training import TrainingSettings
from models.classifiers import Classifier
from models.sampling import SamplingSettings, new_scheduler
from prompt_datasets import TEMPLATES, TargetClass


def train_token(pipeline: StableDiffusionPipeline, classifier: Classifier, target: TargetClass,
                settings: TrainingSettings, sampling: SamplingSettings) -> Iterator[tuple[float, torch.Tensor]]:
    """Update after update of the paper's loop; yields its mean loss and the vector [D] that its images were drawn with.

    `pipeline` is changed: its tokenizer and embedding matrix grow by one, whose row is trained.
    """
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False).eval()
        if network.device.type == "cuda":
            network.to(memory_format=torch.channels_last)
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder.float()
    tokenizer.add_tokens(settings.placeholder_token)
    token_id = tokenizer.convert_tokens_to_ids(settings.placeholder_token)
    if len(tokenizer) > len(text_encoder.get_input_embeddings().weight):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[token_id] = table[tokenizer(settings.initializer_token, add_special_tokens=False).input_ids[0]]
    words = table[:token_id].detach().clone()
    table.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], settings.lr, tuple(settings.betas), settings.eps, settings.weight_decay)
    scaler = torch.amp.GradScaler(table.device.type, init_scale=2.0**10, enabled=pipeline.unet.dtype == torch.float16)
    for update in count():
        vector, loss = table[token_id].detach().clone(), 0.0
        for i in range(settings.epoch_size):
            prompt = TEMPLATES[i % settings.number_of_prompts].format(f"{settings.placeholder_token} {target.name}")
            seed = settings.seed + i + (update * settings.epoch_size if settings.fresh_noise else 0)
            image = draw_image(pipeline, prompt, seed, sampling)
            image_loss = F.cross_entropy(classifier(image), torch.tensor([target.index], device=image.device))
            scaler.scale(image_loss / settings.epoch_size).backward()
            loss += image_loss.item() / settings.epoch_size
        scaler.unscale_(optimizer)
        table.grad[:token_id] = 0
        torch.nn.utils.clip_grad_norm_([table], settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:token_id] = words
        yield loss, vector


def draw_image(pipeline: StableDiffusionPipeline, prompt: str, seed: int, sampling: SamplingSettings) -> torch.Tensor:
    """One image [1, 3, H, W] in [0, 1], with a graph through the final step, both halves of guidance."""
    halves = 2 if sampling.guidance_scale > 1 else 1  # diffusers' pipeline leaves the other out, too
    tokenizer, unet, vae, factor = pipeline.tokenizer, pipeline.unet, pipeline.vae, pipeline.vae_scale_factor
    tokens = tokenizer(["", prompt][-halves:], padding="max_length", max_length=tokenizer.model_max_length,
                       return_tensors="pt")
    embeds = pipeline.text_encoder(tokens.input_ids.to(unet.device))[0].to(unet.dtype)
    scheduler = new_scheduler(pipeline.scheduler, sampling)
    latents = torch.randn(1, unet.config.in_channels, sampling.height // factor, sampling.width // factor,
                          generator=torch.Generator().manual_seed(seed))
    latents = latents.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.set_grad_enabled(bool(t == scheduler.timesteps[-1])):
            noise_pred = unet(scheduler.scale_model_input(torch.cat([latents] * halves), t), t, embeds).sample
            unconditional, conditional = noise_pred[:1], noise_pred[-1:]
            latents = scheduler.step(unconditional + sampling.guidance_scale * (conditional - unconditional), t,
                                     latents).prev_sample
    return (vae.decode(latents / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)
