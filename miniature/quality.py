"""Measure the finished miniature: classifiers on fresh drawings, the generator on bare nouns and on adjectives."""

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
from prompt_datasets import TEMPLATES
from report import sheet
from utils import ROOT, write_json

BARS = {"classifiers_on_drawings": 0.99, "bare_noun_is_a_sense": 0.90, "each_sense_between": [0.10, 0.90],
        "own_adjective": 0.85}
PER_NOUN, PER_ADJECTIVE, BATCH = 200, 30, 100


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
    evaluator = judges["evaluator"]
    nouns, adjectives = {}, {}
    for noun in tqdm(world.NOUNS, desc="bare nouns"):
        predicted = predict(evaluator, generate(config, components, [TEMPLATES[0].format(noun)] * PER_NOUN))
        senses = {thing.label: (predicted == i).float().mean().item()
                  for i, thing in enumerate(world.THINGS) if thing.noun == noun}
        nouns[noun] = {"is_a_sense": sum(senses.values()), "senses": senses}
    for i, thing in enumerate(tqdm(world.THINGS, desc="adjectives")):
        adjectives[thing.label] = {}
        for adjective in thing.adjectives:
            prompts = [TEMPLATES[0].format(f"{adjective} {thing.noun}")] * PER_ADJECTIVE
            right = predict(evaluator, generate(config, components, prompts)) == i
            adjectives[thing.label][adjective] = right.float().mean().item()
    low, high = BARS["each_sense_between"]
    passed = (min(on_drawings.values()) >= BARS["classifiers_on_drawings"]
              and all(noun["is_a_sense"] >= BARS["bare_noun_is_a_sense"] for noun in nouns.values())
              and all(low <= share <= high for noun in nouns.values() for share in noun["senses"].values())
              and all(sum(own.values()) / len(own) >= BARS["own_adjective"] for own in adjectives.values()))
    write_json(weights / "quality.json", {
        "bars": BARS, "passed": passed, "accuracy_on_fresh_drawings": on_drawings, "drawings": len(labels),
        "bare_nouns": nouns, "pictures_a_noun": PER_NOUN, "own_adjectives": adjectives,
        "pictures_an_adjective": PER_ADJECTIVE, "judged_by": "evaluator"})
    picture.parent.mkdir(exist_ok=True)
    sheet(sheet_rows(config, components), picture, cell=80,
          title="3 drawings; generated from words: 3 x the bare noun, 3 x with its adjective, and that in the snow, at "
                "night, as a drawing, as a painting")


def sheet_rows(config, components) -> list[tuple[str, list[Image.Image]]]:
    """A row a class: three drawings, then pictures of its bare noun, of its adjective, and of that in every context."""
    rng, rows = random.Random(7), []
    for i, thing in enumerate(tqdm(world.THINGS, desc="sheet")):
        known = f"{thing.adjectives[0]} {thing.noun}"
        prompts = [world.in_context(thing.noun, TEMPLATES[0], None)] * 3
        prompts += [world.in_context(known, TEMPLATES[0], None)] * 3
        prompts += [world.in_context(known, TEMPLATES[0], context) for context in world.CONTEXTS]
        drawn = [world.draw(i, rng) for _ in range(3)]
        rows.append((f"{thing.label} ({thing.adjectives[0]})",
                     [*drawn, *(to_pil_image(image) for image in generate(config, components, prompts))]))
    return rows
