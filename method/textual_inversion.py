"""The baseline: textual inversion (Gal et al. 2023), which learns a word from real pictures.

The recipe is that of diffusers' script: PER_STEP pictures in each step, flipped at random.
"""

from contextlib import suppress

import torch
from tqdm import tqdm

from models.base import Generator
from models.denoising import compute_denoising_loss, encode_images
from models.stable_diffusion import StableDiffusion
from prompt_datasets import TEMPLATES
from utils import UserError

PER_STEP = 4  # pictures of a class in each step
LR = 5e-3  # AdamW's learning rate
AT_ONCE = 40  # pictures with a graph


def learn_vectors(
    generator: StableDiffusion,
    pictures: list[torch.Tensor],
    start: torch.Tensor,
    placeholder: str,
    steps: list[int],
    weight_decay: float,
    seed: int = 0,
) -> dict[int, torch.Tensor]:
    """Learn vectors by the ordinary denoising loss; return those [C, K, D] after each of `steps`.

    `pictures` holds those of every class, [N, 3, H, W] in [0, 1], and `start` its first vectors [C,
    K, D]. All classes learn in the same steps, each as if it learned alone.
    """
    noise = torch.Generator().manual_seed(seed)
    moments = [encode_images(generator, torch.cat([some, some.flip(3)])) for some in pictures]
    vectors = start.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=weight_decay)
    is_half = generator.dtype == torch.float16
    scaler = torch.amp.GradScaler(generator.device.type, enabled=is_half)
    learned = {}
    for step in tqdm(
        range(1, max(steps) + 1), desc="textual inversion", unit="step", mininterval=2
    ):
        optimizer.zero_grad()
        for part in torch.arange(len(pictures)).split(AT_ONCE // PER_STEP):
            latents = torch.cat([sample_latents(moments[i], noise) for i in part.tolist()])
            chosen = torch.randint(len(TEMPLATES), (len(latents),), generator=noise)
            prompts = [TEMPLATES[i].format(placeholder) for i in chosen]
            cond = generator.encode(prompts, vectors[part].repeat_interleave(PER_STEP, 0))
            loss = compute_denoising_loss(generator, latents, cond, noise)
            scaler.scale(loss * len(part)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step in steps:
            learned[step] = vectors.detach().cpu().clone()
    return learned


def sample_latents(
    moments: tuple[torch.Tensor, torch.Tensor], noise: torch.Generator
) -> torch.Tensor:
    """Sample latents [PER_STEP, 4, h, w] of some of a class's pictures."""
    means, stds = moments
    rows = torch.randint(len(means), (PER_STEP,), generator=noise)
    unit_noise = torch.randn(means[rows].shape, generator=noise).to(means.device)
    return means[rows] + stds[rows] * unit_noise


def embed_first_word(generator: Generator, name: str, initializer: str) -> torch.Tensor:
    """Return the embedding [K, D] of a class name's first word, the start of this method.

    That of `initializer` if the word is several tokens.
    """
    with suppress(UserError):
        return generator.initial_vectors(name.split()[0], 1)
    return generator.initial_vectors(initializer)
