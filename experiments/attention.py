"""What the token looks at: its cross-attention maps beside the class name's, and whether the judge needs those places.

    python -m experiments.attention

Maps are DAAM's (`evaluation.attention`). The most or the least attended places of every picture are painted over in its
mean colour, the token's, the class name's, or as many at random, and the judge looks again. Things stand in the middle:
so the control of the least attended places are those of a picture of another class, which have the same form.
"""

import functools

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from evaluation.attention import WORDS, map_attention, overlay_map
from evaluation.images import Arm
from evaluation.pictures import draw_sheet
from evaluation.read_image import read_image
from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from experiments import common
from experiments.trainings import describe_tests
from prompt_datasets import TEMPLATES, TargetClass

HIDDEN = 0.25  # of a picture's places
PLACES = [f"{end} attended, {word}" for word in WORDS for end in ("most", "least")]
RANDOM, OTHER = "random", "least attended, token, in a picture of another class"
CONTRASTS = [("most attended, token", "nothing"), ("most attended, token", RANDOM), ("least attended, token", RANDOM),
             ("least attended, token", OTHER), ("least attended, token", "least attended, noun")]


def map_class(lab: common.Lab, target: TargetClass, vectors: torch.Tensor) -> list:
    """Attention maps [N][2][h][w] of the first `--images` seeds to the token and to the noun."""
    prompt = TEMPLATES[0].format(f"{lab.config.placeholder_token} {target.name}")
    arm = Arm("", prompt, vectors, lab.options.images)
    return [map_attention(lab.get_generator(), arm, target.name, seed, lab.drawer.sampling).tolist()
            for seed in range(arm.images)]


def hide_places(image: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """An image [3, H, W] with its mean colour in the HIDDEN places [h, w] of most attention."""
    order = attention.flatten().argsort(descending=True)
    hidden = torch.zeros(attention.numel()).index_fill(0, order[:round(HIDDEN * len(order))], 1)
    mask = F.interpolate(hidden.view(1, 1, *attention.shape), image.shape[1:], mode="nearest")[0]
    return torch.where(mask > 0, image.mean((1, 2), keepdim=True), image)


@torch.no_grad()
def judge_hidden(lab: common.Lab, target: TargetClass, files: list, maps: torch.Tensor,
                 others: torch.Tensor) -> dict[str, float]:
    """The share right of a class's pictures as they are, and with places hidden by their own maps [N, 2, h, w] or by
    those of `others`.
    """
    noise = torch.rand(maps[:, 0].shape, generator=torch.Generator().manual_seed(target.index))
    images = [to_tensor(read_image(file)) for file in files]
    ranks = [maps[:, 0], -maps[:, 0], maps[:, 1], -maps[:, 1], noise, -others[:, 0]]
    hidden = {"nothing": images, **{place: list(map(hide_places, images, places)) for place, places in zip(
        (*PLACES, RANDOM, OTHER), ranks, strict=True)}}
    judge = lab.get_judge()
    return {place: (judge(torch.stack(some).to(judge.device)).argmax(1) == target.index).float().mean().item()
            for place, some in hidden.items()}


def main(argv: list[str] | None = None):
    lab = common.open_lab(common.parse_options(__doc__, argv, "all", quick={"images": 2}, images=20))
    folders = common.learn_tokens(lab)
    vectors = common.load_vectors(folders)
    sets, right, rows = common.draw_sets(lab, vectors, lab.options.images), {}, []
    maps = {target: torch.tensor(common.cached_result(
        lab, functools.partial(map_class, lab, target, vectors[target]), attention=target.number,
        images=lab.options.images)) for target in lab.targets}
    for i, (target, files) in enumerate(sets.items()):
        other = lab.targets[(i + len(lab.targets) // 2) % len(lab.targets)]
        right[target.title] = judge_hidden(lab, target, files, maps[target], maps[other])
        if i % max(1, len(lab.targets) // 5) == 0:
            pictures = list(map(read_image, files[:8]))
            rows.append((f"{target.label}: picture", pictures))
            rows += [(f"its {word}", [overlay_map(picture, attention) for picture, attention in zip(
                pictures, maps[target][:8, j], strict=True)]) for j, word in enumerate(WORDS)]
    draw_sheet(rows, lab.out / "attention.png", cell=72, title="where the token and the noun look")
    by_place = {place: [shares[place] for shares in right.values()] for place in ("nothing", *PLACES, RANDOM, OTHER)}
    tests = correct_pvalues({f"{ours}, beside {theirs}": compare_classes(by_place[ours], by_place[theirs])
                             for ours, theirs in CONTRASTS})
    common.publish_result(
        lab, "attention", common.EXPLORATORY, "What the token looks at",
        f"Right when {HIDDEN:.0%} of a picture is painted over: {describe_tests(tests)}",
        ["painted over", "right class"],
        [[place, interval_over_classes(shares)] for place, shares in by_place.items()],
        f"One training, {lab.options.images} held-out pictures per class. Maps: cross-attention averaged over heads, "
        "layers and steps. The share painted over, and the least attended places, were set after a first run, in which "
        "10% of most attention made no difference; the picture of another class after a second one.",
        {"right": right, "tests": tests})


if __name__ == "__main__":
    common.run_script(main)
