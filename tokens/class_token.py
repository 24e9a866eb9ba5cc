"""The trained vectors v_c, which stand before a class name, and their file."""

from pathlib import Path
from typing import NamedTuple

import torch

from models.base import Generator
from system.paths import find_path
from system.tensor_files import write_tensors
from tokens.formats import PAIR, find_halves, read_token_file
from utils import TOKEN_SUFFIXES, require


class ClassToken(NamedTuple):
    """A class's placeholder, its vectors [K, D], and the rest of its file.

    D is the sum of `widths`, one for each text encoder: (768,) for SD 1.4, (768, 1280) for SDXL,
    with clip_l first.
    """

    placeholder: str
    vectors: torch.Tensor  # [K, D], float32
    widths: tuple[int, ...]
    header: dict[str, str]


def start_vectors(generator: Generator, initializer: str, num_vectors: int | None) -> torch.Tensor:
    """Return the initial vectors [K, D]: of a phrase's tokens in turn, or of a token file.

    Raises:
        UserError: a phrase or file that does not give `num_vectors`, or a token of another model.
    """
    if not names_file(initializer):
        return generator.initial_vectors(initializer, num_vectors)
    token = load_token(initializer)
    check_widths(token, generator, initializer)
    count = len(token.vectors)
    require(
        num_vectors in (None, count),
        f"num_vectors is {num_vectors}, and '{initializer}' holds {count} vectors: leave it out",
    )
    return token.vectors.to(generator.device)


def names_file(initializer: str) -> bool:
    """Return whether an initialiser is a token file, not a phrase."""
    return initializer.endswith(TOKEN_SUFFIXES)


def check_widths(token: ClassToken, generator: Generator, file: str):
    """Raise UserError if the token in `file` does not fit the generator's text encoders."""
    found, needed = token.widths, generator.token_widths
    if found == needed:
        return
    cause = "it was trained for another --model"
    if len(found) < len(needed) and found[0] in needed:
        cause = (
            "it is one half of a token for two text encoders, and the other, such as "
            "'learned_embeds_2.safetensors' beside 'learned_embeds.safetensors', is missing"
        )
    require(
        False,
        f"the vectors in '{file}' have {join_widths(found)} dimensions and this model's "
        f"{join_widths(needed)}: {cause}",
    )


def join_widths(widths: tuple[int, ...]) -> str:
    """Format widths: (768, 1280) -> '768 + 1280'."""
    return " + ".join(map(str, widths))


def split_vectors(vectors: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Split SDXL's vectors [K, W_l + W_g] into {"clip_l": [K, W_l], "clip_g": [K, W_g]}."""
    parts = vectors.split(widths, 1)
    return {key: part.contiguous() for key, part in zip(PAIR, parts, strict=True)}


def save_token(
    path: Path, placeholder: str, vectors: torch.Tensor, widths: tuple[int, ...], header: dict
):
    """Write vectors [K, D] as safetensors with a text header, as diffusers reads them.

    One width: {placeholder: [D], or [K, D] for K > 1}. Two: `split_vectors`, and the header names
    the placeholder.
    """
    vectors = vectors.detach().float().cpu().contiguous()
    text = {"format": "pt", **{key: str(value) for key, value in header.items()}}
    if len(widths) > 1:
        tensors = split_vectors(vectors, widths)
        text["placeholder"] = placeholder
    else:
        tensors = {placeholder: vectors[0] if len(vectors) == 1 else vectors}
    write_tensors(Path(path), tensors, text)


def load_token(path: Path | str) -> ClassToken:
    """Load the token of our file, or of diffusers, Automatic1111, kohya or the original code.

    The placeholder is the tensor's name, else what the file says, else the file's own name. Of the
    two files that diffusers writes for SDXL either may be given.

    Raises:
        UserError: no such file, or what it holds instead of one token.
    """
    path = find_path(str(path)) or Path(path)
    first, second = find_halves(path)
    if first == second or not (first.is_file() and second.is_file()):
        return load_file(path)
    half, other = load_file(first), load_file(second)
    widths = half.widths + other.widths
    has_one_word = half.placeholder == other.placeholder
    is_token = has_one_word and len(half.vectors) == len(other.vectors) and len(set(widths)) == 2
    if not is_token:  # two tokens beside each other
        return load_file(path)
    vectors = torch.cat([half.vectors, other.vectors], 1)
    return ClassToken(half.placeholder, vectors, widths, half.header)


def load_file(path: Path) -> ClassToken:
    """Load the token in one file; see `load_token`."""
    placeholder, parts, header = read_token_file(path)
    widths = tuple(part.shape[1] for part in parts)
    return ClassToken(placeholder, torch.cat(parts, 1), widths, header)
