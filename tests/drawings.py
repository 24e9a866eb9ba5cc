"""A world that draws something for every label, and a judge of contexts that fails."""

import random

from PIL import Image


def fail_on_pictures(image: Image.Image) -> None:
    """A judge of contexts that takes grey pictures alone."""
    if len(image.getcolors(maxcolors=2**24)) > 1:
        raise ZeroDivisionError("division by zero")


def draw_noise(label: str, rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3))
