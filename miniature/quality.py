"""Measure the finished miniature: classifiers on fresh drawings, the generator on bare nouns and on adjectives."""

import hashlib
import random
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from classifiers import load_classifier
from config import parse
from diffusion import encode_prompts, generate_images, load_components
from miniature import world
from miniature.workers import first_worker, shared, worker
from prompt_datasets import TEMPLATES
from report import sheet
from utils import ROOT, write_json

BARS = {"classifiers_on_drawings": 0.99, "bare_noun_is_a_sense": 0.90, "each_sense_between": [0.10, 0.90],
        "own_adjective": 0.85}
PER_NOUN, PER_ADJECTIVE, BATCH = 200, 20, 100


@torch.no_grad()
def generate(config, components, prompts: list[str]) -> torch.Tensor:
    """Images [N, 3, 64, 64] of `prompts`, seeds 0 to N - 1, by the checkpoint's own scheduler."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start:start + BATCH]
        parts.append(generate_images(components, encode_prompts(components, batch), range(start, start + len(batch)),
                                     config.height, config.width, config.guidance_scale, config.num_inference_steps))
    return torch.cat(parts)


@torch.no_grad()
def predict(classifier, images: torch.Tensor) -> torch.Tensor:
    """Class numbers [N] from 0."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(BATCH)])


def measure(weights: Path, picture: Path, drawings: torch.Tensor, labels: torch.Tensor):
    """Write weights/quality.json and the labelled sheet `picture`; drawings [N, 3, 64, 64] and labels [N] are fresh."""
    config, _ = parse(["--config", str(ROOT / "configs" / "miniature.yml")])
    components = load_components(str(weights / "generator"), "cpu", torch.float32)
    judges = {name: load_classifier(str(weights / name), "cpu") for name in ("classifier", "evaluator")}
    on_drawings = {name: (predict(judge, drawings) == labels).float().mean().item() for name, judge in judges.items()}
    jobs = [(noun, PER_NOUN) for noun in world.NOUNS]
    jobs += [(f"{adjective} {thing.noun}", PER_ADJECTIVE)
             for thing in world.THINGS for adjective in thing.adjectives]
    bar = tqdm(total=len(jobs) // worker()[1], desc="what its words draw", disable=not first_worker())

    def seen(job) -> torch.Tensor:
        words, count = job
        images = generate(config, components, [TEMPLATES[0].format(words)] * count)
        bar.update()
        return predict(judges["evaluator"], images)

    predicted = {words: seen_as for (words, _), seen_as in zip(jobs, shared(jobs, seen), strict=True)}
    result = verdict(on_drawings, predicted)
    rows = sheet_rows(config, components)
    if first_worker():
        write_json(weights / "quality.json", {**result, "drawings": len(labels), "pictures_a_noun": PER_NOUN,
                                              "pictures_an_adjective": PER_ADJECTIVE, "judged_by": "evaluator",
                                              "weights": fingerprints(weights)})
        picture.parent.mkdir(exist_ok=True)
        sheet(rows, picture, cell=80, title="3 drawings; generated from words: 3 x the bare noun, 3 x with its "
              "adjective, and that in the snow, at night, as a drawing, as a painting")


def fingerprints(weights: Path) -> dict[str, str]:
    """SHA-256 of every file of weights: a measurement is of these and no others."""
    return {file.relative_to(weights).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(weights.rglob("*.safetensors"))}


def verdict(on_drawings: dict[str, float], predicted: dict[str, torch.Tensor]) -> dict:
    """Shares that are right and whether they pass BARS; `predicted` holds the class numbers of each words' pictures."""
    def share(words: str, index: int) -> float:
        return (predicted[words] == index).float().mean().item()

    nouns = {noun: {thing.label: share(noun, i) for i, thing in enumerate(world.THINGS) if thing.noun == noun}
             for noun in world.NOUNS}
    adjectives = {thing.label: {adjective: share(f"{adjective} {thing.noun}", i) for adjective in thing.adjectives}
                  for i, thing in enumerate(world.THINGS)}
    low, high = BARS["each_sense_between"]
    passed = (min(on_drawings.values()) >= BARS["classifiers_on_drawings"]
              and all(sum(senses.values()) >= BARS["bare_noun_is_a_sense"] for senses in nouns.values())
              and all(low <= sense <= high for senses in nouns.values() for sense in senses.values())
              and all(sum(own.values()) / len(own) >= BARS["own_adjective"] for own in adjectives.values()))
    return {"bars": BARS, "passed": passed, "accuracy_on_fresh_drawings": on_drawings, "bare_nouns": nouns,
            "own_adjectives": adjectives}


def sheet_rows(config, components) -> list[tuple[str, list[Image.Image]]]:
    """A row a class: three drawings, then pictures of its bare noun, of its adjective, and of that in every context."""
    def row(i: int):
        thing, rng = world.THINGS[i], random.Random(i)
        known = f"{thing.adjectives[0]} {thing.noun}"
        prompts = [world.in_context(thing.noun, TEMPLATES[0], None)] * 3
        prompts += [world.in_context(known, TEMPLATES[0], None)] * 3
        prompts += [world.in_context(known, TEMPLATES[0], context) for context in world.CONTEXTS]
        drawn = [world.draw(i, rng) for _ in range(3)]
        return (f"{thing.label} ({thing.adjectives[0]})",
                [*drawn, *(to_pil_image(image) for image in generate(config, components, prompts))])

    return shared(range(len(world.THINGS)), row)
