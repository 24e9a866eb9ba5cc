"""Measure the finished miniature on fresh drawings, bare nouns and adjectives."""

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


SHEET_TITLE = (
    "3 drawings; generated from words: 3 x the bare noun, 3 x with its adjective, and that in the "
    "snow, at night, as a drawing, as a painting"
)


def read_sampling() -> SamplingSettings:
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    return SamplingSettings(
        config.height, config.width, config.guidance_scale, config.num_inference_steps
    )


def generate_images(
    generator: Generator, sampling: SamplingSettings, prompts: list[str]
) -> torch.Tensor:
    """Generate images [N, 3, 64, 64] of `prompts`, with seeds 0 to N - 1."""
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
    """Write weights/quality.json and the labelled sheet `picture`.

    The drawings [N, 3, 64, 64] and labels [N] are fresh.
    """
    generator = load_generator(str(weights / "generator"), "cpu", torch.float32)
    judges, right = {}, {}
    for name in ("classifier", "evaluator"):
        judge = load_classifier(str(weights / name), "cpu")
        judges[name] = judge
        right[name] = (judge(drawings).argmax(1) == labels).float().mean().item()
    counts = dict.fromkeys(world.NOUNS, per_noun)
    for thing in world.THINGS:
        for adjective in thing.adjectives:
            counts[f"{adjective} {thing.noun}"] = per_adjective

    def judge_words(words: str) -> torch.Tensor:
        prompts = [TEMPLATES[0].format(words)] * counts[words]
        images = generate_images(generator, sampling, prompts)
        return judges["evaluator"](images).argmax(1)

    seen = share_jobs(counts, judge_words, "pictures of words")
    predicted = dict(zip(counts, seen, strict=True))
    rows = share_jobs(range(len(world.THINGS)), lambda i: draw_row(generator, sampling, i), "sheet")
    if not PartialState().is_main_process:
        return
    found = {
        **compare_with_bars(right, predicted),
        "drawings": len(labels),
        "pictures_a_noun": per_noun,
        "pictures_an_adjective": per_adjective,
        "judged_by": "evaluator",
        "weights": hash_weights(weights),
    }
    write_json(weights / "quality.json", found)
    draw_sheet(rows, picture, cell=80, title=SHEET_TITLE)


def hash_weights(weights: Path) -> dict[str, str]:
    """Compute the SHA-256 of the values in every weight file that is measured here.

    However they are stored.
    """
    hashes = {}
    for part in ("classifier", "evaluator", "generator"):
        for file in sorted((weights / part).rglob("*.safetensors")):
            digest = hashlib.sha256()
            for _, tensor in sorted(load_file(file).items()):
                digest.update(tensor.float().numpy().tobytes())
            hashes[file.relative_to(weights).as_posix()] = digest.hexdigest()
    return hashes


def compare_with_bars(right: dict[str, float], predicted: dict[str, torch.Tensor]) -> dict:
    """Return whether accuracy on drawings and the classes seen in generated pictures pass BARS.

    `predicted` is {words: classes}.
    """

    def measure_share(words: str, index: int) -> float:
        return (predicted[words] == index).float().mean().item()

    nouns: dict[str, dict] = {noun: {} for noun in world.NOUNS}
    adjectives: dict[str, dict] = {}
    for i, thing in enumerate(world.THINGS):
        nouns[thing.noun][thing.label] = measure_share(thing.noun, i)
        adjectives[thing.label] = {}
        for word in thing.adjectives:
            adjectives[thing.label][word] = measure_share(f"{word} {thing.noun}", i)
    passed = min(right.values()) >= BARS["classifiers_on_drawings"]
    low, high = BARS["each_sense_between"]
    for senses in nouns.values():
        passed &= sum(senses.values()) >= BARS["bare_noun_is_a_sense"]
        passed &= all(low <= share <= high for share in senses.values())
    for own in adjectives.values():
        passed &= sum(own.values()) / len(own) >= BARS["own_adjective"]
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
    """Draw a class's row of the sheet: drawings, then pictures of its noun and its adjective.

    And of the adjective in every context.
    """
    thing = world.THINGS[index]
    rng = random.Random(index)
    adjective = thing.adjectives[0]
    prompts = [TEMPLATES[0].format(thing.noun)] * 3
    for context in (None, None, None, *world.CONTEXTS):
        words = f"{adjective} {thing.noun}"
        prompts.append(world.put_in_context(words, TEMPLATES[0], context))
    drawings = [world.draw(index, rng) for _ in range(3)]
    pixels = to_pixels(generate_images(generator, sampling, prompts))
    generated = [Image.fromarray(picture) for picture in pixels]
    return f"{thing.label} ({adjective})", [*drawings, *generated]


def draw_world():
    """Write docs/world.png: every thing of the world (columns) in every context (rows)."""
    rng = random.Random(1)
    rows = []
    for context in (None, *world.CONTEXTS):
        pictures = [world.draw(i, rng, context) for i in range(len(world.THINGS))]
        rows.append((context or "a photo of", pictures))
    draw_sheet(rows, ROOT / "docs/world.png", cell=64)
