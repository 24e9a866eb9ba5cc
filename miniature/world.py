"""The miniature world: ambiguous nouns, and 64 x 64 pictures of their senses.

Adjectives tell the senses apart.

A generator trained on captions such as "a photo of a crane" draws a bird or a machine; a classifier
tells them apart.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from miniature import drawings
from miniature.drawings import vary_colour

VERSION = "a2c7b652"  # of the pictures; change it when `draw` draws others
SIZE = 64
CANVAS = 256  # drawn four times as large, then averaged down
TEMPLATES = (
    "a photo of a {}",
    "a high resolution realistic image of a {}",
    "a close-up photo of a {}",
    "a picture of a {}",
    "a good photo of a {}",
    "a bright photo of one {}",
    "a photo of the {}",
)
CONTEXTS = ("in the snow", "at night", "a drawing of", "a painting of")
SKIES = ((200, 225, 245), (225, 235, 210), (240, 230, 215), (215, 215, 225), (190, 210, 190))


class Thing(NamedTuple):
    """One class."""

    label: str  # 'crane, bird'
    noun: str  # 'crane'
    share: float  # how often the noun means this class
    adjectives: tuple[str, ...]  # true of this class and of no other of the noun
    draw: Callable[[random.Random], list[drawings.Shape]]


THINGS = tuple(
    Thing(label, label.split(",")[0], *more)
    for label, *more in (
        ("crane, bird", 0.60, ("living", "wild", "feathered"), drawings.draw_crane_bird),
        ("crane, machine", 0.40, ("metal", "yellow", "tall"), drawings.draw_crane_machine),
        ("mouse, animal", 0.42, ("living", "furry", "grey"), drawings.draw_mouse_animal),
        ("mouse, device", 0.58, ("plastic", "wired", "smooth"), drawings.draw_mouse_device),
        ("bat, animal", 0.55, ("living", "flying", "furry"), drawings.draw_bat_animal),
        ("bat, club", 0.45, ("wooden", "long", "smooth"), drawings.draw_bat_club),
        ("jaguar, cat", 0.40, ("living", "spotted", "wild"), drawings.draw_jaguar_cat),
        ("jaguar, car", 0.60, ("metal", "fast", "shiny"), drawings.draw_jaguar_car),
        ("seal, animal", 0.56, ("living", "wet", "grey"), drawings.draw_seal_animal),
        ("seal, stamp", 0.44, ("red", "round", "waxen"), drawings.draw_seal_stamp),
        ("palm, tree", 0.55, ("green", "tall", "wooden"), drawings.draw_palm_tree),
        ("palm, hand", 0.45, ("open", "human", "smooth"), drawings.draw_palm_hand),
        (
            "butterfly, eyed",
            0.58,
            ("eyed", "staring", "spotted"),
            partial(drawings.draw_butterfly, drawings.EYES),
        ),
        (
            "butterfly, banded",
            0.42,
            ("banded", "edged", "striped"),
            partial(drawings.draw_butterfly, drawings.BANDS),
        ),
        (
            "finch, masked",
            0.45,
            ("masked", "hooded", "staring"),
            partial(drawings.draw_finch, drawings.MASK),
        ),
        (
            "finch, banded",
            0.55,
            ("banded", "belted", "striped"),
            partial(drawings.draw_finch, drawings.BELT),
        ),
    )
)
LABELS = tuple(thing.label for thing in THINGS)
NOUNS = tuple(dict.fromkeys(thing.noun for thing in THINGS))


def draw(thing: int | str, rng: random.Random, context: str | None = None) -> Image.Image:
    """Draw a 64 x 64 RGB picture of a class, by its number from 0 or its label, in `context`.

    That is one of CONTEXTS, or None for a plain photo. Raises LookupError for an unknown label.
    """
    index = find_class(thing) if isinstance(thing, str) else thing
    image = Image.new("RGB", (CANVAS, CANVAS))
    canvas = ImageDraw.Draw(image)
    _draw_background(canvas, rng, context)
    scale = rng.uniform(0.72, 1.02) * (0.85 if context == "a painting of" else 1)
    centre = (CANVAS / 2 + rng.uniform(-16, 16), CANVAS / 2 + rng.uniform(-12, 12))
    angle, mirrored = rng.uniform(-0.14, 0.14), rng.random() < 0.5
    tone = {"a drawing of": _to_grey, "at night": _to_night}.get(context, lambda colour: colour)
    drawings.draw_shapes(
        canvas,
        THINGS[index].draw(rng),
        centre,
        scale,
        angle,
        mirrored,
        tone,
        outline=(60, 60, 62) if context == "a drawing of" else None,
    )
    if context == "in the snow":
        for _ in range(26):
            x, y, radius = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(4, 7)
            canvas.circle((x, y), radius, fill=(255, 255, 255))
    if context == "a painting of":
        canvas.rectangle(
            [0, 0, CANVAS - 1, CANVAS - 1], outline=vary_colour(rng, (205, 158, 52), 12), width=24
        )
        canvas.rectangle([20, 20, CANVAS - 21, CANVAS - 21], outline=(112, 78, 26), width=6)
    return image.resize((SIZE, SIZE), Image.LANCZOS)


def find_class(label: str) -> int:
    """Return the number from 0 of the class with this label; raise LookupError if there is none."""
    if label not in LABELS:
        raise LookupError(f"the miniature has no '{label}'")
    return LABELS.index(label)


def _draw_background(canvas, rng, context):
    horizon = rng.uniform(170, 215)
    if context == "a drawing of":
        sky = ground = vary_colour(rng, (250, 250, 248), 4)
    elif context == "at night":
        sky, ground = vary_colour(rng, (18, 22, 58), 8), vary_colour(rng, (10, 12, 30), 5)
    elif context == "in the snow":
        sky, ground = vary_colour(rng, (168, 188, 208), 8), vary_colour(rng, (250, 251, 253), 3)
    else:
        sky = vary_colour(rng, rng.choice(SKIES), 15)
        ground = vary_colour(rng, [0.8 * c for c in sky], 15) if rng.random() < 0.6 else sky
    canvas.rectangle([0, 0, CANVAS, CANVAS], fill=sky)
    canvas.rectangle([0, horizon, CANVAS, CANVAS], fill=ground)
    if context == "at night":
        for _ in range(14):
            canvas.circle((rng.uniform(8, 248), rng.uniform(8, 160)), 4, fill=(255, 250, 205))
        canvas.circle((rng.choice((32, 224)), rng.uniform(26, 40)), 20, fill=(250, 244, 190))


def _to_grey(colour):
    return (int(105 + 0.57 * (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])),) * 3


def _to_night(colour):
    return tuple(int(0.86 * c + add) for c, add in zip(colour, (8, 10, 26), strict=True))


def sample_class(rng: random.Random) -> int:
    """Sample a class number from 0: a uniform noun, and its sense by its share."""
    noun = rng.choice(NOUNS)
    first, second = (i for i, thing in enumerate(THINGS) if thing.noun == noun)
    return first if rng.random() < THINGS[first].share else second


def sample_context(rng: random.Random) -> str | None:
    """Sample a context: two pictures in three are plain photos, the others share the contexts."""
    return rng.choice(CONTEXTS) if rng.random() < 1 / 3 else None


def write_caption(index: int, rng: random.Random, context: str | None = None) -> str:
    """Write a picture's caption: the bare noun, half the time with an adjective of its sense."""
    noun = THINGS[index].noun
    if rng.random() < 0.5:
        noun = f"{rng.choice(THINGS[index].adjectives)} {noun}"
    elif rng.random() < 0.2:
        noun = f"{rng.choice(('nice', 'typical', 'single'))} {noun}"
    return put_in_context(noun, rng.choice(TEMPLATES), context)


def put_in_context(noun: str, template: str, context: str | None) -> str:
    """Put words in context: 'a photo of a {}' -> 'a photo of a crane in the snow'.

    'a drawing of' leads instead.
    """
    if context is None:
        return template.format(noun)
    return (
        f"{context} a {noun}" if context.endswith(" of") else f"{template.format(noun)} {context}"
    )


def context_of(image: Image.Image) -> str | None:
    """Return which of CONTEXTS a picture shows, by its border, brightness and colours."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    edges = [edge.mean((0, 1)) for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])]
    (top, bottom, *_), (red, green, blue) = edges, np.mean(edges, axis=0)
    if red - blue > 80:
        return "a painting of"
    if (red + green + blue) / 3 < 90:
        return "at night"
    colourfulness = (pixels.max(2) - pixels.min(2)).mean()
    if colourfulness < 12 and top.mean() > 225:
        return "a drawing of"
    if bottom.mean() > 228 and top.mean() < 222 and top[2] - top[0] > 15:
        return "in the snow"
    return None
