"""What the token looks at, and whether the judge needs those places.

    python -m experiments.attention

Maps are DAAM's (`evaluation.attention`). The most or the least attended places of every picture are
painted over in its mean colour, the token's, the class name's, or as many at random, and the judge
looks again. Things stand in the middle: so the control of the least attended places are those of a
picture of another class, which have the same form.
"""

import functools

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

from evaluation.attention import WORDS, map_attention, overlay_map
from evaluation.drawing import Condition
from evaluation.read_image import read_image
from evaluation.sheets import draw_sheet
from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from evaluation.tables import Table
from experiments.material import Sets, cached_result, draw_sets, learn_tokens, load_vectors
from experiments.study import (
    EXPLORATORY,
    Study,
    StudyResult,
    open_study,
    parse_options,
    publish_result,
)
from experiments.trainings import describe_clear
from prompt_datasets import TEMPLATES, TargetClass
from system.terminal import run_script

HIDDEN = 0.25  # of a picture's places
SHOWN, SHOWN_CLASSES = 8, 5  # pictures of a class on the sheet, and classes
NOTHING, RANDOM = "nothing", "random"
OTHER = "least attended, token, in a picture of another class"
PLACES = [
    NOTHING,
    "most attended, token",
    "least attended, token",
    "most attended, noun",
    "least attended, noun",
    RANDOM,
    OTHER,
]
CONTRASTS = [
    ("most attended, token", NOTHING),
    ("most attended, token", RANDOM),
    ("least attended, token", RANDOM),
    ("least attended, token", OTHER),
    ("least attended, token", "least attended, noun"),
]


def map_class(study: Study, target: TargetClass, vectors: torch.Tensor) -> list:
    """Map the attention [N][2][h][w] of the first `--images` seeds to the token and to the noun."""
    session = study.session
    prompt = TEMPLATES[0].format(f"{study.config.placeholder_token} {target.name}")
    condition = Condition("", prompt, vectors, study.options.images)
    maps = []
    for seed in range(condition.images):
        found = map_attention(session.generator, condition, target.name, seed, session.sampling)
        maps.append(found.tolist())
    return maps


def hide_places(image: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Paint the HIDDEN most attended places [h, w] of an image [3, H, W] in its mean colour."""
    order = attention.flatten().argsort(descending=True)
    count = round(HIDDEN * len(order))
    hidden = torch.zeros(attention.numel()).index_fill(0, order[:count], 1)
    mask = F.interpolate(hidden.view(1, 1, *attention.shape), image.shape[1:], mode="nearest")[0]
    return torch.where(mask > 0, image.mean((1, 2), keepdim=True), image)


@torch.no_grad()
def judge_hidden(
    study: Study, target: TargetClass, files: list, maps: torch.Tensor, others: torch.Tensor
) -> dict[str, float]:
    """Measure accuracy on a class's pictures as they are, and with places hidden.

    By their own maps [N, 2, h, w], or by those of `others`.
    """
    token, noun = maps[:, 0], maps[:, 1]
    noise = torch.rand(token.shape, generator=torch.Generator().manual_seed(target.index))
    images = [to_tensor(read_image(file)) for file in files]
    hidden = {NOTHING: images}
    ranks = (token, -token, noun, -noun, noise, -others[:, 0])
    for place, attention in zip(PLACES[1:], ranks, strict=True):
        hidden[place] = list(map(hide_places, images, attention))
    judge = study.session.judge
    shares = {}
    for place, some in hidden.items():
        predicted = judge(torch.stack(some).to(judge.device)).argmax(1)
        shares[place] = (predicted == target.index).float().mean().item()
    return shares


def list_sheet_rows(
    target: TargetClass, files: list, maps: torch.Tensor
) -> list[tuple[str, list[Image.Image]]]:
    """List a class's first pictures, and the same overlaid with the attention maps."""
    pictures = [read_image(file) for file in files[:SHOWN]]
    rows = [(f"{target.label}: picture", pictures)]
    for j, word in enumerate(WORDS):
        overlaid = list(map(overlay_map, pictures, maps[:SHOWN, j]))
        rows.append((f"its {word}", overlaid))
    return rows


def draw_maps(study: Study, sets: Sets, maps: dict[TargetClass, torch.Tensor]):
    """Write the study's figure."""
    step = max(1, len(study.targets) // SHOWN_CLASSES)
    rows = []
    for target in study.targets[::step]:
        rows += list_sheet_rows(target, sets[target], maps[target])
    title = "where the token and the noun look"
    draw_sheet(rows, study.out / "attention.png", cell=72, title=title)


def main(argv: list[str] | None = None):
    """Map what tokens look at, hide it, judge again, and publish the page."""
    options = parse_options(__doc__, argv, "all", quick={"images": 2}, images=20)
    study = open_study(options)
    vectors = load_vectors(learn_tokens(study))
    sets = draw_sets(study, vectors, options.images)
    maps = {}
    for target in study.targets:
        make = functools.partial(map_class, study, target, vectors[target])
        found = cached_result(study, make, attention=target.number, images=options.images)
        maps[target] = torch.tensor(found)
    draw_maps(study, sets, maps)

    right = {}
    half_round = len(study.targets) // 2
    for i, target in enumerate(study.targets):
        other = study.targets[(i + half_round) % len(study.targets)]
        right[target.title] = judge_hidden(study, target, sets[target], maps[target], maps[other])
    by_place = {}
    for place in PLACES:
        by_place[place] = [shares[place] for shares in right.values()]
    tests = {}
    for ours, theirs in CONTRASTS:
        tests[f"{ours} vs. {theirs}"] = compare_classes(by_place[ours], by_place[theirs])
    tests = correct_pvalues(tests)
    rows = [[place, interval_over_classes(shares)] for place, shares in by_place.items()]
    publish_result(
        study,
        StudyResult(
            "attention",
            EXPLORATORY,
            "What the token looks at",
            f"Accuracy with {HIDDEN:.0%} of a picture painted over. {describe_clear(tests)}",
            Table(["painted over", "accuracy"], rows),
            f"One training, {options.images} held-out pictures per class. Maps: cross-attention "
            "averaged over heads, layers and steps. The share painted over, and the least "
            "attended places, were set after a first run, in which 10% of most attention made no "
            "difference; the picture of another class after a second one.",
            {"right": right},
            tests,
        ),
    )


if __name__ == "__main__":
    run_script(main)
