"""How a class token is usually coded, to compare with: correct, and made of a pipeline's own parts, but plain.

One image at a time, accumulated; both guidance halves of the last step through the UNet with a graph; the whole
embedding matrix in AdamW, its other rows put back after each step; the whole pipeline saved at every improvement.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from classifiers import Classifier
from config import RunConfig
from diffusion import Components, trajectory
from prompt_datasets import TEMPLATES


def train(config: RunConfig, components: Components, classifier: Classifier, class_index: int, class_name: str,
          folder: Path | None) -> Iterator[tuple[float, torch.Tensor]]:
    """Update after update of the paper's loop; yields its mean loss and the token's vector that it was made with.

    `components` are changed: the tokenizer and the embedding matrix grow by one, whose row is trained. Without a
    `folder` nothing is saved.
    """
    tokenizer, text_encoder = components.tokenizer, components.text_encoder.float()
    tokenizer.add_tokens(config.placeholder_token)
    token_id = tokenizer.convert_tokens_to_ids(config.placeholder_token)
    if len(tokenizer) > len(text_encoder.get_input_embeddings().weight):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[token_id] = table[tokenizer(config.initializer_token, add_special_tokens=False).input_ids[0]]
    words = table[:token_id].detach().clone()
    table.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    scaler = torch.amp.GradScaler(components.device.type, init_scale=2.0**10,
                                  enabled=components.unet.dtype == torch.float16)
    best, update = float("inf"), 0
    while True:
        vector, loss = table[token_id].detach().clone(), 0.0
        for i in range(config.epoch_size):
            template = TEMPLATES[i % config.number_of_prompts]
            seed = config.seed + i + (update * config.epoch_size if config.fresh_noise else 0)
            image = draw(config, components, template.format(f"{config.placeholder_token} {class_name}"), seed)
            image_loss = F.cross_entropy(classifier(image), torch.tensor([class_index], device=image.device))
            scaler.scale(image_loss / config.epoch_size).backward()
            loss += image_loss.item() / config.epoch_size
        if loss < best and folder:
            best = loss
            pipeline(components).save_pretrained(folder)
        scaler.unscale_(optimizer)
        table.grad[:token_id] = 0
        torch.nn.utils.clip_grad_norm_([table], config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:token_id] = words
        update += 1
        yield loss, vector


def pipeline(components: Components) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(components.vae, components.text_encoder, components.tokenizer, components.unet,
                                   components.scheduler, None, None, requires_safety_checker=False)


def draw(config: RunConfig, components: Components, prompt: str, seed: int) -> torch.Tensor:
    """One image [1, 3, H, W] in [0, 1], with a graph through both halves of the final step."""
    tokenizer, unet, vae, factor = components.tokenizer, components.unet, components.vae, components.vae_scale_factor
    tokens = tokenizer(["", prompt], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    embeds = components.text_encoder(tokens.input_ids.to(unet.device))[0].to(unet.dtype)
    scheduler = trajectory(components, config.num_inference_steps, config.train_timesteps)
    latents = torch.randn(1, unet.config.in_channels, config.height // factor, config.width // factor,
                          generator=torch.Generator().manual_seed(seed))
    latents = latents.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.set_grad_enabled(bool(t == scheduler.timesteps[-1])):
            noise_pred = unet(scheduler.scale_model_input(torch.cat([latents] * 2), t), t, embeds).sample
            unconditional, conditional = noise_pred.chunk(2)
            latents = scheduler.step(unconditional + config.guidance_scale * (conditional - unconditional), t,
                                     latents).prev_sample
    return (vae.decode(latents / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)
