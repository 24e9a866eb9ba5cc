"""Measure the finished miniature: classifiers on fresh drawings, the generator on bare nouns and on
adjectives.
"""

import hashlib
import random
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file

from command_line import parse_settings
from evaluation.sheets import draw_sheet
from miniature import world
from miniature.workers import share_jobs
from models.classifiers import load_classifier
from models.generator import Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES
from system.tensor_files import to_pixels
from utils import ROOT, write_json

BARS = {
    "classifiers_on_drawings": 0.99,
    "bare_noun_is_a_sense": 0.90,
    "each_sense_between": [0.10, 0.90],
    "own_adjective": 0.85,
}


def read_sampling() -> SamplingSettings:
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    return SamplingSettings(
        config.height, config.width, config.guidance_scale, config.num_inference_steps
    )


def generate_images(
    generator: Generator, sampling: SamplingSettings, prompts: list[str]
) -> torch.Tensor:
    """Images [N, 3, 64, 64] of `prompts`, seeds 0 to N - 1."""
    return generator.decode(
        generator.sample(generator.encode(prompts), range(len(prompts)), sampling)
    )


@torch.no_grad()
def measure_quality(
    weights: Path,
    picture: Path,
    drawings: torch.Tensor,
    labels: torch.Tensor,
    sampling: SamplingSettings,
    per_noun: int = 200,
    per_adjective: int = 20,
):
    """Write weights/quality.json and the labelled sheet `picture`; drawings [N, 3, 64, 64] and
    labels [N] are fresh.
    """
    generator = load_generator(str(weights / "generator"), "cpu", torch.float32)
    judges = {
        name: load_classifier(str(weights / name), "cpu") for name in ("classifier", "evaluator")
    }
    right = {
        name: (judge(drawings).argmax(1) == labels).float().mean().item()
        for name, judge in judges.items()
    }
    counts = dict.fromkeys(world.NOUNS, per_noun)
    counts |= {
        f"{adjective} {thing.noun}": per_adjective
        for thing in world.THINGS
        for adjective in thing.adjectives
    }

    def judge_words(words: str) -> torch.Tensor:
        images = generate_images(generator, sampling, [TEMPLATES[0].format(words)] * counts[words])
        return judges["evaluator"](images).argmax(1)

    predicted = dict(zip(counts, share_jobs(counts, judge_words, "pictures of words"), strict=True))
    rows = share_jobs(range(len(world.THINGS)), lambda i: draw_row(generator, sampling, i), "sheet")
    if PartialState().is_main_process:
        write_json(
            weights / "quality.json",
            {
                **compare_with_bars(right, predicted),
                "drawings": len(labels),
                "pictures_a_noun": per_noun,
                "pictures_an_adjective": per_adjective,
                "judged_by": "evaluator",
                "weights": hash_weights(weights),
            },
        )
        draw_sheet(
            rows,
            picture,
            cell=80,
            title=(
                "3 drawings; generated from words: 3 x the bare noun, 3 x with its "
                "adjective, and that in the snow, at night, as a drawing, as a painting"
            ),
        )


def hash_weights(weights: Path) -> dict[str, str]:
    """SHA-256 of the values in every file of weights that is measured here, however they are
    stored.
    """
    return {
        file.relative_to(weights).as_posix(): (
            hashlib.sha256(
                b"".join(
                    tensor.float().numpy().tobytes()
                    for _, tensor in sorted(load_file(file).items())
                )
            ).hexdigest()
        )
        for part in ("classifier", "evaluator", "generator")
        for file in sorted((weights / part).rglob("*.safetensors"))
    }


def compare_with_bars(right: dict[str, float], predicted: dict[str, torch.Tensor]) -> dict:
    """Whether accuracy on drawings, and the classes seen in the pictures of words ({words:
    classes}), pass BARS.
    """

    def measure_share(words: str, index: int) -> float:
        return (predicted[words] == index).float().mean().item()

    nouns, adjectives = {noun: {} for noun in world.NOUNS}, {}
    for i, (label, noun, _, words, _) in enumerate(world.THINGS):
        nouns[noun][label] = measure_share(noun, i)
        adjectives[label] = {word: measure_share(f"{word} {noun}", i) for word in words}
    low, high = BARS["each_sense_between"]
    passed = (
        min(right.values()) >= BARS["classifiers_on_drawings"]
        and all(sum(senses.values()) >= BARS["bare_noun_is_a_sense"] for senses in nouns.values())
        and all(low <= share <= high for senses in nouns.values() for share in senses.values())
        and all(
            sum(own.values()) / len(own) >= BARS["own_adjective"] for own in adjectives.values()
        )
    )
    return {
        "bars": BARS,
        "passed": passed,
        "accuracy_on_fresh_drawings": right,
        "bare_nouns": nouns,
        "own_adjectives": adjectives,
    }


def draw_row(
    generator: Generator, sampling: SamplingSettings, index: int
) -> tuple[str, list[Image.Image]]:
    """Three drawings of a class, then pictures of its bare noun, of its adjective, and of that in
    every context.
    """
    thing, rng = world.THINGS[index], random.Random(index)
    words = f"{thing.adjectives[0]} {thing.noun}"
    prompts = [TEMPLATES[0].format(thing.noun)] * 3
    prompts += [
        world.put_in_context(words, TEMPLATES[0], context)
        for context in (None, None, None, *world.CONTEXTS)
    ]
    images = map(Image.fromarray, to_pixels(generate_images(generator, sampling, prompts)))
    return f"{thing.label} ({thing.adjectives[0]})", [
        *(world.draw(index, rng) for _ in range(3)),
        *images,
    ]


def draw_world():
    """Write docs/world.png: every thing of the world (columns) in every context (rows)."""
    rng = random.Random(1)
    draw_sheet(
        [
            (
                context or "a photo of",
                [world.draw(i, rng, context) for i in range(len(world.THINGS))],
            )
            for context in (None, *world.CONTEXTS)
        ],
        ROOT / "docs/world.png",
        cell=64,
    )
