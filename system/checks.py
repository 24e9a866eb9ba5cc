"""What a setting's value may be, as a check and in words."""

from collections.abc import Callable
from typing import Any

Check = tuple[Callable[[Any], bool], str]  # whether a value can work, and the same in words
# Where a placeholder could stand in a token's file.
NAMES_IN_FILES = ("__metadata__", "clip_l", "clip_g", "emb_params", "*")


def from_to(low: float, high: float) -> Check:
    """Allow numbers of this range, including its ends."""
    return lambda value: low <= value <= high, f"from {low} to {high:,}"


def greater_than(low: float, high: float) -> Check:
    """Allow numbers of this range, excluding its lower end."""
    return lambda value: low < value <= high, f"greater than {low}, {high:,} at most"


def one_of(*choices: str) -> Check:
    """Allow these words."""
    return lambda value: value in choices, f"{', '.join(choices[:-1])} or {choices[-1]}"


def word_such_as(example: str) -> Check:
    """Allow words that can be a placeholder."""
    return is_word, f"one word of 50 letters at most, without spaces, such as {example}"


def is_word(text: str) -> bool:
    """Return whether a text can be a placeholder."""
    is_of_length = 0 < len(text) <= 50
    return is_of_length and not set(text) & set(" {}") and text not in NAMES_IN_FILES


def is_folder_name(name: str) -> bool:
    """Return whether a name can be a folder's on every disk."""
    is_of_length = 0 < len(name.encode()) <= 100
    return is_of_length and name.strip(". ") == name and not set(name) & set("/\\")


def is_trajectory(timesteps: list) -> bool:
    """Return whether timesteps fall from noise to image."""
    if not timesteps or None in timesteps:
        return False
    is_falling = timesteps == sorted(set(timesteps), reverse=True)
    return is_falling and timesteps[-1] >= 0 and timesteps[0] <= 999


def is_pair_of_betas(betas: list[float]) -> bool:
    """Return whether AdamW accepts these betas."""
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def is_side(pixels: int) -> bool:
    """Return whether a VAE can decode pictures with this side."""
    return 8 <= pixels <= 8192 and pixels % 8 == 0


GIVEN = (lambda value: bool(value.strip()), "a name or a folder (--help shows which)")
SIDE = (is_side, "divisible by 8, for the VAE, and from 8 to 8,192")
FOLDER_NAME = (
    is_folder_name,
    "a folder's name of 100 bytes at most, without / or \\, without a dot or space at its ends",
)
BETAS = (is_pair_of_betas, "two numbers in [0, 1), such as 0.9 0.999")
TRAJECTORY = (
    is_trajectory,
    "falling numbers from 999 to 0, from noise to image, such as 999 800 600",
)
