"""Where the token attends: cross-attention maps (DAAM, Tang et al. 2023).

Averaged over steps, heads and layers.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.drawing import Condition, encode_condition
from evaluation.read_image import read_image
from models.base import Generator
from models.placeholder import tokenize_prompts
from models.sampling import SamplingSettings
from system.tensor_files import save_image
from utils import require

SHOWN = 4  # seeds whose maps a page shows
WORDS = ("token", "noun")  # whose maps these are
OPACITY = 0.6  # of the brightest place of a map over its picture


class AttentionRecorder:
    """An attention processor of diffusers that also keeps the attention to some words."""

    def __init__(
        self,
        processor,
        words: list[list[int]],
        maps: list[torch.Tensor],
        size: tuple[int, int],
    ):
        """Wrap a `processor`.

        `words` holds the places of every word in the prompt; `maps` gets [words, h, w] of every
        call.
        """
        self.processor = processor
        self.words = words
        self.maps = maps
        self.size = size

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        """Called by diffusers; the prompt is the last of the batch."""
        query = attn.head_to_batch_dim(attn.to_q(hidden_states[-1:]))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states[-1:]))
        scores = attn.get_attention_scores(query, key).float().mean(0)  # [positions, L], over heads
        grid = find_grid(len(scores), self.size)
        of_words = [scores[:, places].mean(1).view(grid) for places in self.words]
        maps = F.interpolate(torch.stack(of_words)[None], self.size, mode="bilinear")[0]
        self.maps.append(maps.cpu())
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def find_grid(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Find height and width of a layer with so many positions.

    The UNet halves latents of `size`, rounding up.
    """
    height, width = size
    while height * width > positions:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    require(
        height * width == positions,
        f"attention_maps: {positions} positions of this UNet are no part of its latents of "
        f"{size[0]} x {size[1]}: leave --attention_maps out",
    )
    return height, width


@torch.no_grad()
def map_attention(
    generator: Generator, condition: Condition, name: str, seed: int, sampling: SamplingSettings
) -> torch.Tensor:
    """Map the attention [2, h, w] of one picture's latents to the token and to the class name.

    Each map sums to 1. The picture is drawn again; networks and files do not change.
    """
    denoiser = generator.denoiser
    words = place_words(generator, condition, name)
    factor = generator.scale_factor
    size = (sampling.height // factor, sampling.width // factor)
    maps: list[torch.Tensor] = []
    before = denoiser.attn_processors
    recording = dict(before)
    for place, processor in before.items():
        if ".attn2." in place:
            recording[place] = AttentionRecorder(processor, words, maps, size)
    denoiser.set_attn_processor(recording)
    try:
        generator.sample(encode_condition(generator, condition), [seed], sampling)
    finally:
        denoiser.set_attn_processor(before)
    total = torch.stack(maps).mean(0)
    return total / total.sum((1, 2), keepdim=True)


def place_words(generator: Generator, condition: Condition, name: str) -> list[list[int]]:
    """Find the places of the token's vectors in the prompt, and of the class name after them."""
    encoder = generator.prompt_encoders[0]
    count = len(condition.vectors)
    token_id = encoder.placeholder_id
    ids, _ = tokenize_prompts(encoder.tokenizer, [condition.prompt], token_id, count)
    first = ids[0].tolist().index(token_id)
    noun = encoder.tokenizer(name, add_special_tokens=False).input_ids
    end = first + count
    return [list(range(first, end)), list(range(end, end + len(noun)))]


def overlay_map(picture: Image.Image, attention: torch.Tensor) -> Image.Image:
    """Overlay a picture with a map [h, w]: dark where it is lowest, bright where it is highest."""
    lowest, highest = attention.min(), attention.max()
    attention = (attention - lowest) / (highest - lowest).clamp_min(1e-12)
    large = F.interpolate(attention[None, None], picture.size[::-1], mode="bicubic")
    strength = large.clamp(0, 1)[0, 0].numpy()
    heat = matplotlib.colormaps["inferno"](strength)[..., :3]
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    pixels = 255 * ((1 - OPACITY) * grey + OPACITY * heat)
    return Image.fromarray(pixels.round().astype(np.uint8))


def show_attention(
    generator: Generator,
    condition: Condition,
    name: str,
    start: torch.Tensor,
    sampling: SamplingSettings,
    folder: Path,
) -> dict[str, list[str]]:
    """Write folder/attention/<word>/<seed>.png of the first pictures of `condition` there.

    Returns the words of the vocabulary nearest to `start` [K, D], before training, and to the
    token.
    """
    for seed in range(min(SHOWN, condition.images)):
        picture = read_image(folder / condition.folder / f"{seed}.png")
        maps = map_attention(generator, condition, name, seed, sampling)
        for word, attention in zip(WORDS, maps, strict=True):
            file = folder / "attention" / word / f"{seed}.png"
            save_image(overlay_map(picture, attention), file)
    return {
        "before": generator.nearest_words(start),
        "after": generator.nearest_words(condition.vectors),
    }
