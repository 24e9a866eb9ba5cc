"""A token learned on one checkpoint, used on another of the same text encoder.

    python -m experiments.transfer
    python -m experiments.transfer --class_index 281-290 --config configs/imagenet.yml --other stable-diffusion-v1-5/...

Stable Diffusion 1.4 and 1.5 share their text encoder; their UNets were trained on from one another. Where no --other is
given the miniature's own UNet is trained on for some steps on pictures and captions that its world draws.
"""

import random
import shutil
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from diffusion import encode_prompts
from evaluation import interval
from experiments.common import (
    MINIATURE,
    Lab,
    open_lab,
    parser,
    pictures,
    publish,
    script,
    share_right,
    tokens,
    vector_of,
)
from miniature import world
from report import sheet
from utils import find_path, load_images, require

STEPS, BATCH, LR, DRAWINGS = 100, 24, 5e-4, 1200
WITHOUT_CAPTION = 0.1  # of the pictures, for guidance


def trained_on(lab: Lab) -> Path:
    """A copy of the generator whose UNet learned on from fresh drawings; its text encoder and VAE are the same."""
    folder = lab.work / f"generator_{STEPS}_{BATCH}_{LR}_{DRAWINGS}"
    if folder.exists():
        return folder
    components, _ = lab.generator()
    rng, generator = random.Random("transfer"), torch.Generator().manual_seed(1)
    drawn = [(index, world.sample_context(rng)) for index in (world.sample_class(rng) for _ in range(DRAWINGS))]
    images = torch.stack([to_tensor(world.draw(index, rng, context)) for index, context in tqdm(drawn, desc="drawing")])
    captions = ["" if rng.random() < WITHOUT_CAPTION else world.caption(index, rng, context)
                for index, context in drawn]
    with torch.no_grad():
        embeds = torch.cat([encode_prompts(components, captions[i:i + 100]) for i in range(0, DRAWINGS, 100)])
        latents = torch.cat([components.vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(50)])
    latents = latents * components.vae.config.scaling_factor
    unet = components.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), LR, weight_decay=0.01)
    for _ in tqdm(range(STEPS), desc="another UNet", unit="step"):
        rows = torch.randint(DRAWINGS, (BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noisy = components.scheduler.add_noise(latents[rows], noise, timesteps)
        optimizer.zero_grad()
        F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=embeds[rows]).sample, noise).backward()
        optimizer.step()
    half_written = folder.with_name("half_written")
    shutil.rmtree(half_written, ignore_errors=True)
    shutil.copytree(find_path(lab.config.model), half_written)
    unet.save_pretrained(half_written / "unet")
    half_written.rename(folder)
    return folder


def main():
    arguments = parser(__doc__, "1,3,5,7,9,11,13,15")
    arguments.add_argument("--other", help="the other generator (the run's own, trained on)")
    arguments.add_argument("--images", type=int, default=10, help="held-out pictures a class and arm (10)")
    options = arguments.parse_args()
    lab = open_lab(options)
    require(options.other or options.config == MINIATURE or lab.config.real_images == "miniature.world:draw",
            "give --other, a checkpoint of the same text encoder")
    vectors = {index: vector_of(folder) for index, folder in tokens(lab, "token").items()}
    other = options.other or str(trained_on(open_lab(options)).resolve())
    labs = {"its own generator": lab, "the other generator": open_lab(options, model=other)}
    rows, data, sets = [], {}, {}
    for name, each in labs.items():
        each = each._replace(work=each.work / ("transfer" if name == "the other generator" else ""))
        sets[name] = {arm: {index: pictures(each, index, arm, vector if arm == "with" else None, options.images)
                            for index, vector in vectors.items()} for arm in ("without", "with")}
        shares = {arm: share_right(each, files) for arm, files in sets[name].items()}
        rows.append([name, *map(interval, shares.values())])
        data[name] = {arm: share._asdict() for arm, share in shares.items()}
    sheet([(f"{lab.labels[index]}: {arm}, {name}", each[arm][index][:8])
           for index in lab.classes[::max(1, len(lab.classes) // 4)][:4] for arm in ("without", "with")
           for name, each in sets.items()], lab.out / "transfer.png", cell=72)
    apart = apart_by(*(each["without"] for each in sets.values()))
    publish(lab, "transfer", "A token works on another checkpoint of the same text encoder",
            f"On another checkpoint the token takes the right class from {rows[1][1]} to {rows[1][2]} "
            f"({rows[0][1]} to {rows[0][2]} on its own).",
            ["drawn by", "without", "with the token"], rows,
            {"shares": data, "pictures_a_class": options.images, "levels_apart": apart},
            f"Right by {lab.judged} [Wilson 95 % interval over the pictures of one training a class]. The other "
            f"generator: {options.other or f'the same, its UNet trained on for {STEPS} steps of {BATCH} drawings'}. "
            f"The plain pictures of the two differ by {apart:.0f} of 255 levels a pixel on the same seeds.",
            "transfer.png")


def apart_by(some: dict[int, list[Path]], others: dict[int, list[Path]]) -> float:
    """Mean absolute difference, in levels of 255, of the same pictures by two generators."""
    pairs = [(file, other) for index in some for file, other in zip(some[index], others[index], strict=True)]
    return 255 * mean((load_images([file]) - load_images([other])).abs().mean().item() for file, other in pairs)


if __name__ == "__main__":
    script(main)
