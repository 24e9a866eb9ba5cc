"""Measure the finished miniature: classifiers on fresh drawings, the generator on bare nouns and on adjectives."""

import hashlib
import random
from pathlib import Path

import torch
from PIL import Image

from config import parse_settings
from evaluation.pictures import draw_sheet
from miniature import world
from miniature.workers import is_first_worker, share_jobs
from models.classifiers import Classifier, load_classifier
from models.generator import Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES
from utils import ROOT, to_pixels, write_json

BARS = {"classifiers_on_drawings": 0.99, "bare_noun_is_a_sense": 0.90, "each_sense_between": [0.10, 0.90],
        "own_adjective": 0.85}
PER_NOUN, PER_ADJECTIVE, BATCH = 200, 20, 100


@torch.no_grad()
def generate_images(generator: Generator, sampling: SamplingSettings, prompts: list[str]) -> torch.Tensor:
    """Images [N, 3, 64, 64] of `prompts`, seeds 0 to N - 1."""
    images = []
    for seeds in torch.arange(len(prompts)).split(BATCH):
        cond = generator.encode([prompts[i] for i in seeds])
        images.append(generator.decode(generator.sample(cond, seeds, sampling, grad_steps=0)))
    return torch.cat(images)


@torch.no_grad()
def predict_classes(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Class numbers [N] from 0."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(BATCH)])


def read_sampling() -> SamplingSettings:
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    return SamplingSettings(config.height, config.width, config.guidance_scale, config.num_inference_steps)


def measure_quality(weights: Path, picture: Path, drawings: torch.Tensor, labels: torch.Tensor,
                    sampling: SamplingSettings, per_noun: int = PER_NOUN, per_adjective: int = PER_ADJECTIVE):
    """Write weights/quality.json and the labelled sheet `picture`; drawings [N, 3, 64, 64] and labels [N] are fresh."""
    generator = load_generator(str(weights / "generator"), "cpu", torch.float32)
    judges = {name: load_classifier(str(weights / name), "cpu") for name in ("classifier", "evaluator")}
    right = {name: (predict_classes(judge, drawings) == labels).float().mean().item()
             for name, judge in judges.items()}
    jobs = [(noun, per_noun) for noun in world.NOUNS]
    jobs += [(f"{adjective} {thing.noun}", per_adjective) for thing in world.THINGS for adjective in thing.adjectives]

    def judge_words(job) -> tuple[str, torch.Tensor]:
        words, count = job
        images = generate_images(generator, sampling, [TEMPLATES[0].format(words)] * count)
        return words, predict_classes(judges["evaluator"], images)

    predicted = dict(share_jobs(jobs, judge_words, "pictures of words"))
    rows = share_jobs(range(len(world.THINGS)), lambda i: sample_row(generator, sampling, i), "sheet")
    if is_first_worker():
        write_json(weights / "quality.json", {**compare_with_bars(right, predicted), "drawings": len(labels),
                                              "pictures_a_noun": per_noun, "pictures_an_adjective": per_adjective,
                                              "judged_by": "evaluator", "weights": hash_weights(weights)})
        draw_sheet(rows, picture, cell=80, title="3 drawings; generated from words: 3 x the bare noun, 3 x with its "
                   "adjective, and that in the snow, at night, as a drawing, as a painting")


def hash_weights(weights: Path) -> dict[str, str]:
    """SHA-256 of every file of weights, to tell which ones a measurement is of."""
    return {file.relative_to(weights).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(weights.rglob("*.safetensors"))}


def compare_with_bars(right: dict[str, float], predicted: dict[str, torch.Tensor]) -> dict:
    """Shares of right pictures and whether they pass BARS, from both classifiers' accuracy on drawings (`right`) and
    the classes that were seen in the pictures of a noun, with or without an adjective (`predicted`).
    """
    nouns, adjectives = {noun: {} for noun in world.NOUNS}, {}
    for i, (label, noun, _, words, _) in enumerate(world.THINGS):
        nouns[noun][label] = (predicted[noun] == i).float().mean().item()
        adjectives[label] = {word: (predicted[f"{word} {noun}"] == i).float().mean().item() for word in words}
    low, high = BARS["each_sense_between"]
    passed = (min(right.values()) >= BARS["classifiers_on_drawings"]
              and all(sum(senses.values()) >= BARS["bare_noun_is_a_sense"] for senses in nouns.values())
              and all(low <= share <= high for senses in nouns.values() for share in senses.values())
              and all(sum(own.values()) / len(own) >= BARS["own_adjective"] for own in adjectives.values()))
    return {"bars": BARS, "passed": passed, "accuracy_on_fresh_drawings": right, "bare_nouns": nouns,
            "own_adjectives": adjectives}


def sample_row(generator: Generator, sampling: SamplingSettings, index: int) -> tuple[str, list[Image.Image]]:
    """Three drawings of a class, then pictures of its bare noun, of its adjective, and of that in every context."""
    thing, rng = world.THINGS[index], random.Random(index)
    phrases = [(thing.noun, None)] * 3
    phrases += [(f"{thing.adjectives[0]} {thing.noun}", context) for context in (None, None, None, *world.CONTEXTS)]
    prompts = [world.put_in_context(words, TEMPLATES[0], context) for words, context in phrases]
    images = [Image.fromarray(pixels) for pixels in to_pixels(generate_images(generator, sampling, prompts))]
    return f"{thing.label} ({thing.adjectives[0]})", [*(world.draw(index, rng) for _ in range(3)), *images]


def draw_world():
    """Write docs/world.png: every thing of the world (columns) in every context (rows)."""
    rng = random.Random(1)
    draw_sheet([(context or "a photo of", [world.draw(i, rng, context) for i in range(len(world.THINGS))])
                for context in (None, *world.CONTEXTS)], ROOT / "docs/world.png", cell=64)
