"""A token learned on one checkpoint, used on another of the same text encoder.

    python -m experiments.transfer
    python -m experiments.transfer --class_index 281-290 --config configs/imagenet.yml --other
        stable-diffusion-v1-5/...

Without --other the second checkpoint is the miniature, its UNet trained further on pictures that
its world draws.
"""

import random
import shutil
from pathlib import Path
from statistics import mean

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from evaluation.tables import Table
from experiments.material import WORLD, draw_sets, learn_tokens, load_vectors, show_sets
from experiments.study import TESTED, Study, StudyResult, open_study, parse_options, publish_result
from experiments.trainings import judge_sets, list_seeds
from miniature import world
from models.denoising import compute_denoising_loss, encode_images
from models.generator import PRECISIONS
from runs.session import open_generator
from system.paths import find_path
from system.terminal import run_script
from utils import replace_file, require

BATCH = 24
LR = 5e-4
WITHOUT_CAPTION = 0.1  # of the pictures, for guidance
OWN, OTHER = "its own generator", "the other generator"


def train_denoiser(study: Study, drawings: int, steps: int) -> Path:
    """Copy the miniature and train its denoiser further on new drawings."""
    config = study.config
    folder = study.work / f"generator_{steps}_{BATCH}_{LR}_{drawings}"
    if folder.exists():
        return folder
    precision = PRECISIONS[config.mixed_precision]
    generator = open_generator(  # one of its own, which is trained
        config.model, config.device, precision, False, False, config.placeholder_token
    )
    images, captions = draw_captioned(drawings)
    with torch.no_grad():
        cond = torch.cat([generator.encode(captions[i : i + 100]) for i in range(0, drawings, 100)])
    latents = torch.cat([encode_images(generator, part)[0] for part in images.split(50)])
    denoiser = generator.denoiser.requires_grad_(True).train()
    noise_source = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LR, weight_decay=0.01)
    for _ in tqdm(range(steps), desc="another denoiser", unit="step"):
        rows = torch.randint(drawings, (BATCH,), generator=noise_source)
        optimizer.zero_grad()
        loss = compute_denoising_loss(generator, latents[rows], cond[rows], noise_source)
        loss.backward()
        optimizer.step()
    with replace_file(folder) as temporary:
        shutil.copytree(find_path(config.model), temporary)
        denoiser.save_pretrained(temporary / "unet")
    return folder


def draw_captioned(drawings: int) -> tuple[torch.Tensor, list[str]]:
    """Draw pictures [N, 3, H, W] of the miniature's world and their captions, some empty."""
    rng = random.Random("transfer")
    sights = []
    for _ in range(drawings):
        index = world.sample_class(rng)
        sights.append((index, world.sample_context(rng)))
    images = []
    for index, context in tqdm(sights, desc="drawing"):
        images.append(to_tensor(world.draw(index, rng, context)))
    captions = []
    for index, context in sights:
        is_empty = rng.random() < WITHOUT_CAPTION
        captions.append("" if is_empty else world.write_caption(index, rng, context))
    return torch.stack(images), captions


def main(argv: list[str] | None = None):
    """Draw with the same tokens on both checkpoints, and publish the page."""
    quick = {"seeds": 2, "images": 1, "drawings": 8, "steps": 1}
    options = parse_options(
        __doc__,
        argv,
        "all",
        quick=quick,
        other=None,
        seeds=3,
        images=10,
        drawings=1200,
        steps=100,
    )
    study = open_study(options)
    require(
        options.other or study.config.real_images == WORLD,
        "give --other, a checkpoint of the same text encoder",
    )
    trainings = []
    for seed in list_seeds(study):
        trainings.append(load_vectors(learn_tokens(study, seed=seed)))
    other = options.other or str(train_denoiser(study, options.drawings, options.steps).resolve())
    conditions = {"without": [dict.fromkeys(trainings[0])], "with": trainings}
    shown, right, tests = {}, {}, {}
    for name, drawn_by in ((OWN, study), (OTHER, open_study(options, model=other))):
        right[name] = {}
        for condition, many in conditions.items():
            sets = [draw_sets(drawn_by, vectors, options.images) for vectors in many]
            shown[f"{condition}, {name}"] = sets[0]
            shares = judge_sets(study, sets).values()
            right[name][condition] = [mean(of_class) for of_class in shares]
        tests[name] = compare_classes(right[name]["with"], right[name]["without"])
    tests = correct_pvalues(tests)
    rows = []
    for name, by_condition in right.items():
        without = interval_over_classes(by_condition["without"])
        with_token = interval_over_classes(by_condition["with"])
        rows.append([name, without, with_token])
    show_sets(study.targets, shown, study.out / "transfer.png")
    trained = f"the same, its UNet trained further for {options.steps} steps of {BATCH} drawings"
    note = (
        f"{options.seeds} trainings, {options.images} held-out pictures per class and training. The"
        f" other generator: {options.other or trained}."
    )
    _, without, with_token = rows[1]
    publish_result(
        study,
        StudyResult(
            "transfer",
            TESTED,
            "A token works on another checkpoint of the same text encoder",
            f"On another checkpoint accuracy is {without} without the token and {with_token} with "
            "it.",
            Table(["drawn by", "accuracy without the token", "with the token"], rows),
            note,
            {"right": right},
            tests,
        ),
    )


if __name__ == "__main__":
    run_script(main)
