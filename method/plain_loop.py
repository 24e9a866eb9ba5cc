"""Start here: the method of Discriminative Class Tokens (ICCV 2023) in plain lines.

A frozen text-to-image model reads "tiger cat" as a tiger; a frozen classifier knows better. One new
word S_c is put in front of the class name. Its embedding v_c is all that learns: draw images,
classify them, and follow the gradient of the cross-entropy back through the LAST denoising step
alone.

This page is right and slow, on a pipeline of diffusers: one image at a time, both halves of
guidance with a graph in the last step, the whole embedding matrix in the optimiser.
`method/update.py` takes the same steps at speed (tests/method/test_plain_loop.py), and
benchmarks/cost.py says what that saves.
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


def train_token(
    pipeline: StableDiffusionPipeline,
    classifier: Classifier,
    target: TargetClass,
    settings: TrainingSettings,
    sampling: SamplingSettings,
) -> Iterator[tuple[float, torch.Tensor]]:
    """Learn v_c, update after update (Sec. 3).

    Yields an update's mean loss and the v_c [D] that its images were drawn with. `pipeline`
    changes: its vocabulary grows by the word S_c, whose embedding is trained.
    """
    freeze_networks(pipeline)
    token_id = add_word(pipeline, settings.placeholder_token, settings.initializer_token)
    embeddings = pipeline.text_encoder.get_input_embeddings().weight  # [words, D]
    embeddings.requires_grad_(True)
    other_words = embeddings[:token_id].detach().clone()
    optimizer = torch.optim.AdamW(
        [embeddings], settings.lr, settings.betas, settings.eps, settings.weight_decay
    )
    is_half = pipeline.unet.dtype == torch.float16
    scaler = torch.amp.GradScaler(embeddings.device.type, init_scale=2.0**10, enabled=is_half)

    for update in count():
        v_c = embeddings[token_id].detach().clone()
        mean_loss = 0.0
        for i in range(settings.epoch_size):
            template = TEMPLATES[i % settings.number_of_prompts]  # "A photo of a {}"
            prompt = template.format(f"{settings.placeholder_token} {target.name}")
            seed = settings.seed + i  # the same noise in every update, as in the paper ...
            if settings.fresh_noise:  # ... or new noise
                seed += update * settings.epoch_size
            image = draw_image(pipeline, prompt, seed, sampling)
            c = torch.tensor([target.index], device=image.device)
            loss = F.cross_entropy(classifier(image), c) / settings.epoch_size  # Sec. 3.1
            scaler.scale(loss).backward()
            mean_loss += loss.item()

        scaler.unscale_(optimizer)
        embeddings.grad[:token_id] = 0  # v_c alone learns
        torch.nn.utils.clip_grad_norm_([embeddings], settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            embeddings[:token_id] = other_words  # weight decay has moved them
        yield mean_loss, v_c


def freeze_networks(pipeline: StableDiffusionPipeline):
    """Only v_c, which is float32, will have a gradient."""
    pipeline.text_encoder.float()
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False).eval()
        if network.device.type == "cuda":
            network.to(memory_format=torch.channels_last)


def add_word(pipeline: StableDiffusionPipeline, word: str, initializer: str) -> int:
    """Add S_c to the vocabulary, v_c being a copy of the initialiser's embedding; its id."""
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    tokenizer.add_tokens(word)
    if len(tokenizer) > len(text_encoder.get_input_embeddings().weight):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    token_id = tokenizer.convert_tokens_to_ids(word)
    first_id = tokenizer(initializer, add_special_tokens=False).input_ids[0]
    embeddings = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[token_id] = embeddings[first_id]
    return token_id


def draw_image(
    pipeline: StableDiffusionPipeline, prompt: str, seed: int, sampling: SamplingSettings
) -> torch.Tensor:
    """One image [1, 3, H, W] in [0, 1] with a graph through the final step alone.

    That is gradient skipping (Sec. 3.2): z_T -> ... -> z_1 without a graph, z_1 -> z_0 with one.
    """
    unet, vae = pipeline.unet, pipeline.vae
    has_guidance = sampling.guidance_scale > 1
    prompts = ["", prompt] if has_guidance else [prompt]
    prompt_embeds = encode_prompts(pipeline, prompts)  # [2 or 1, L, D]
    scheduler = new_scheduler(pipeline.scheduler, sampling)
    side = pipeline.vae_scale_factor
    shape = (1, unet.config.in_channels, sampling.height // side, sampling.width // side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    z = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma  # z_T
    for t in scheduler.timesteps:
        is_last = bool(t == scheduler.timesteps[-1])
        with torch.set_grad_enabled(is_last):
            inputs = scheduler.scale_model_input(torch.cat([z] * len(prompts)), t)
            noise_pred = unet(inputs, t, prompt_embeds).sample
            unconditional, conditional = noise_pred[:1], noise_pred[-1:]
            difference = conditional - unconditional
            guided = unconditional + sampling.guidance_scale * difference
            z = scheduler.step(guided, t, z).prev_sample
    x = vae.decode(z / vae.config.scaling_factor).sample  # z is z_0 now
    return (x.float() / 2 + 0.5).clamp(0, 1)


def encode_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """What the UNet reads of the prompts, [P, L, D]; v_c enters here."""
    tokenizer, unet = pipeline.tokenizer, pipeline.unet
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    prompt_embeds = pipeline.text_encoder(tokens.input_ids.to(unet.device))[0]
    return prompt_embeds.to(unet.dtype)
