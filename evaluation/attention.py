"""What the token looks at: cross-attention maps, averaged over steps, heads and layers (DAAM, Tang et al. 2023)."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.images import Arm, encode_arm
from evaluation.read_image import read_image
from models.generator import Generator
from models.placeholder import tokenize_prompts
from models.sampling import SamplingSettings
from system.tensor_files import save_image
from utils import require

SHOWN = 4  # seeds whose maps a page shows
WORDS = ("token", "noun")  # whose maps these are
OPACITY = 0.6  # of the brightest place of a map over its picture


class AttentionRecorder:
    """A processor of diffusers: another one's result, beside which the attention to some words is added up."""

    def __init__(self, processor, words: list[list[int]], maps: list[torch.Tensor], size: tuple[int, int]):
        """`words` holds the places in the prompt of every word; `maps` gets [words, h, w] of every call."""
        self.processor, self.words, self.maps, self.size = processor, words, maps, size

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query, key = (attn.head_to_batch_dim(part) for part in (
            attn.to_q(hidden_states[-1:]), attn.to_k(encoder_hidden_states[-1:])))  # the last one has the prompt
        scores = attn.get_attention_scores(query, key).float().mean(0)  # [positions, L], over heads
        grid = find_grid(len(scores), self.size)
        maps = torch.stack([scores[:, places].mean(1).view(grid) for places in self.words])
        self.maps.append(F.interpolate(maps[None], self.size, mode="bilinear")[0].cpu())
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def find_grid(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with so many positions in a UNet that halves latents of `size`, rounding up."""
    height, width = size
    while height * width > positions:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    require(height * width == positions, f"attention_maps: {positions} positions of this UNet are no part of its "
                                         f"latents of {size[0]} x {size[1]}: leave --attention_maps out")
    return height, width


@torch.no_grad()
def map_attention(generator: Generator, arm: Arm, name: str, seed: int, sampling: SamplingSettings) -> torch.Tensor:
    """The attention [2, h, w] of one picture's latents to the token and to the class name `name`, whose sum is 1 each.

    Draws the picture of `arm` and `seed` again; networks and pictures stay what they are.
    """
    denoiser, words = generator.denoiser, place_words(generator, arm, name)
    before, maps = denoiser.attn_processors, []
    size = tuple(side // generator.scale_factor for side in (sampling.height, sampling.width))
    denoiser.set_attn_processor({place: AttentionRecorder(processor, words, maps, size)
                                 if ".attn2." in place else processor for place, processor in before.items()})
    try:
        generator.sample(encode_arm(generator, arm), [seed], sampling)
    finally:
        denoiser.set_attn_processor(before)
    total = torch.stack(maps).mean(0)
    return total / total.sum((1, 2), keepdim=True)


def place_words(generator: Generator, arm: Arm, name: str) -> list[list[int]]:
    """Where the token's vectors stand in the arm's prompt, and where the class name does, which follows them."""
    encoder, count = generator.prompt_encoders[0], len(arm.vectors)
    ids = tokenize_prompts(encoder.tokenizer, [arm.prompt], encoder.placeholder_id, count)[0][0].tolist()
    first = ids.index(encoder.placeholder_id)
    nouns = len(encoder.tokenizer(name, add_special_tokens=False).input_ids)
    return [list(range(first, first + count)), list(range(first + count, first + count + nouns))]


def overlay_map(picture: Image.Image, attention: torch.Tensor) -> Image.Image:
    """A picture with a map [h, w] over it, from dark where there is least to bright where there is most."""
    attention = (attention - attention.min()) / (attention.max() - attention.min()).clamp_min(1e-12)
    strength = F.interpolate(attention[None, None], picture.size[::-1], mode="bicubic").clamp(0, 1)[0, 0].numpy()
    heat = matplotlib.colormaps["inferno"](strength)[..., :3]
    pixels = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    return Image.fromarray((255 * ((1 - OPACITY) * pixels + OPACITY * heat)).round().astype(np.uint8))


def show_attention(generator: Generator, arm: Arm, name: str, start: torch.Tensor,
                   sampling: SamplingSettings, folder: Path) -> dict[str, list[str]]:
    """Write folder/attention/<word>/<seed>.png over the first pictures of `arm` there.

    Returns the words of the vocabulary nearest to `start` [K, D], before training, and to the token.
    """
    for seed in range(min(SHOWN, arm.images)):
        maps = map_attention(generator, arm, name, seed, sampling)
        for word, attention in zip(WORDS, maps, strict=True):
            save_image(overlay_map(read_image(folder / arm.folder / f"{seed}.png"), attention),
                       folder / "attention" / word / f"{seed}.png")
    return {"before": generator.nearest_words(start), "after": generator.nearest_words(arm.vectors)}
