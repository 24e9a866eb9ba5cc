"""Draw the same seeds without and with the token; what was drawn, and how, is kept beside the pictures."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from models.batch_size import WITHOUT_GRAPH, default_batch_size, fit_batch_size
from models.generator import Generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, prompt_folder
from system.tensor_files import save_pixels, to_pixels
from system.text_files import read_json
from utils import replace_file, require, write_json

ARMS = ("without", "with")
CONTROLS = ("untrained", "random")
ORACLE = "oracle"  # other words for the class, and no token
MORE_ARMS = (*CONTROLS, ORACLE)
DECODED_AT_ONCE = 8  # at first; one fp16 picture of 512 x 512 takes 0.13 GB in the decoder's widest layer
RECORD = "drawn.json"  # beside the pictures: how they were drawn
FRAMES = 10  # of the film of one picture over the updates


class Arm(NamedTuple):
    """A set of pictures of a class: its folder, its prompt, what the token stands for [K, D], how many seeds."""

    folder: str
    prompt: str
    vectors: torch.Tensor | None
    images: int


def list_arms(target: TargetClass, vectors: torch.Tensor, widths: tuple[int, ...], placeholder: str, images: int, eval_prompts: list[str],
              controls: bool, start: torch.Tensor | str, oracle: str | None = None) -> list[Arm]:
    """Without and with the token, in every prompt; as controls its `start` (vectors [K, D], or words) or random ones of
    its norms in its place; the words `oracle` in place of the class name.
    """
    with_token, arms = f"{placeholder} {target.name}", []
    for template in (TEMPLATES[0], *eval_prompts):
        folder = "" if template == TEMPLATES[0] else f"prompts/{prompt_folder(template)}/"
        arms += [Arm(f"{folder}without", template.format(target.name), None, images),
                 Arm(f"{folder}with", template.format(with_token), vectors, images)]
    if controls:  # what they gain is not the training's
        directions = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(target.index))
        pairs = zip(vectors.split(widths, 1), directions.split(widths, 1), strict=True)
        random = torch.cat([direction * part.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
                            for part, direction in pairs], dim=1)
        words = isinstance(start, str)
        untrained = TEMPLATES[0].format(f"{start} {target.name}" if words else with_token)
        arms += [Arm("untrained", untrained, None if words else start, images),
                 Arm("random", TEMPLATES[0].format(with_token), random, images)]
    return arms + [Arm(ORACLE, TEMPLATES[0].format(oracle), None, images)] * bool(oracle)


def choose_evenly(count: int) -> list[int]:
    """FRAMES of `count` indices at most, the first and the last among them."""
    return list(dict.fromkeys(torch.linspace(0, count - 1, FRAMES).round().int().tolist()))


def choose_frames(every_update: torch.Tensor) -> dict[str, torch.Tensor]:
    """{update: vectors} of some of a training's updates [updates, K, D], in half precision."""
    return {f"{update:03d}": every_update[update].half().cpu() for update in choose_evenly(len(every_update))}


def list_film_arms(target: TargetClass, placeholder: str, frames: dict[str, torch.Tensor],
                   images: int = 1) -> list[Arm]:
    """The first seeds' pictures by the vectors that `choose_frames` chose, in their order."""
    foreign = [name for name in frames if not re.fullmatch("[0-9]{3,6}", name)]  # names become folders
    require(not foreign, f"the vectors of the training hold {foreign[:1]}, which is not a vector of an update")
    prompt = TEMPLATES[0].format(f"{placeholder} {target.name}")
    return [Arm(f"updates/{update}", prompt, torch.atleast_2d(frames[update].float()), images)
            for update in sorted(frames)]


class Drawer:
    """Draws arms with one generator, which is loaded only where a picture is missing, and one way of sampling."""

    def __init__(self, get_generator: Callable[[], Generator], sampling: SamplingSettings, drawn_by: dict, device: str,
                 batch_size: int | None = None):
        """`drawn_by` holds all that decides the pictures besides prompt, token and seed: settings, weights' files."""
        self.get_generator, self.sampling = get_generator, sampling
        self.settings_digest = digest_json(drawn_by)
        self.plain: dict[str, Path] = {}  # by prompt: where pictures without a token are, for classes of one name
        most = default_batch_size(64, device, sampling.height, sampling.width)
        self.sample_batch = fit_batch_size(self.sample_missing, batch_size and WITHOUT_GRAPH * batch_size, most)
        self.decode_batch = fit_batch_size(decode_parts, None, min(batch_size or most, DECODED_AT_ONCE))

    def describe_arms(self, arms: list[Arm]) -> dict[str, dict]:
        """What RECORD says of these arms once they are drawn."""
        return {arm.folder: {
            "prompt": arm.prompt, "settings": self.settings_digest,
            "token": None if arm.vectors is None else sha256(arm.vectors.float().cpu().numpy().tobytes()).hexdigest(),
        } for arm in arms}

    def find_missing(self, arms: list[Arm], folder: Path) -> tuple[set[str], set[tuple[str, int]]]:
        """The arms drawn otherwise than they would be now, and the (arm, seed) of every picture to draw."""
        before = read_record(folder)
        stale = {name for name, described in self.describe_arms(arms).items() if before.get(name) != described}
        return stale, {(arm.folder, seed) for arm in arms for seed in range(arm.images)
                       if arm.folder in stale or not (folder / arm.folder / f"{seed}.png").exists()}

    @torch.no_grad()
    def draw_arms(self, arms: list[Arm], folder: Path, title: str, stale_results: list[Path] = ()) -> int:
        """Draw what is missing of folder/<arm>/<seed>.png, and count it; first delete `stale_results` of old ones."""
        stale, missing = self.find_missing(arms, folder)
        if not missing:
            return 0
        generator = self.get_generator()
        conds = {arm.folder: encode_arm(generator, arm) for arm in arms}
        for file in stale_results:
            file.unlink(missing_ok=True)
        for name in stale:
            require(not (folder / name).is_symlink(), f"'{folder / name}' is a link, and its pictures are to be drawn "
                                                      "again: remove it")
            shutil.rmtree(folder / name, ignore_errors=not (folder / name).exists())
        write_json(folder / RECORD, read_record(folder) | self.describe_arms(arms))
        plain = [arm for arm in arms if arm.vectors is None]
        with tqdm(total=len(missing), desc=f"drawing {title}", unit="image", leave=False) as bar:
            for together in (*([arm] for arm in plain), [arm for arm in arms if arm.vectors is not None]):
                jobs = [(arm.folder, seed) for arm in together for seed in range(arm.images)]
                copied = self.copy_plain(together, missing, folder)
                bar.update(len(copied))
                for files, images in self.draw_jobs(generator, conds, jobs, missing - copied):
                    require(images.isfinite().all(), f"a picture of {title} is not finite: try --mixed_precision bf16 "
                                                     "or no")
                    save_pixels(to_pixels(images), [folder / file for file in files])
                    bar.update(len(files))
        self.plain |= {arm.prompt: folder / arm.folder for arm in plain}
        return len(missing)

    def copy_plain(self, arms: list[Arm], missing: set[tuple[str, int]], folder: Path) -> set[tuple[str, int]]:
        """Copy what is missing and was drawn for another class of the same name; returns these (arm, seed)."""
        sources = {(arm.folder, seed): self.plain[arm.prompt] / f"{seed}.png" for arm in arms
                   if arm.vectors is None and arm.prompt in self.plain for seed in range(arm.images)}
        found = {job: file for job, file in sources.items() if job in missing and file.exists()}
        for (name, seed), file in found.items():
            with replace_file(folder / name / f"{seed}.png") as written:
                shutil.copyfile(file, written)
        return set(found)

    def draw_jobs(self, generator: Generator, conds: dict[str, torch.Tensor], jobs: list[tuple[str, int]],
                  missing: set[tuple[str, int]]) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Files and images [B, 3, H, W] of those of the (arm, seed) `jobs` that are missing."""
        while jobs:
            batch, latents = self.sample_batch(generator, conds, jobs, missing)
            lacking = [i for i, job in enumerate(batch) if job in missing]
            if lacking:
                yield [f"{name}/{seed}.png" for name, seed in (batch[i] for i in lacking)], \
                    self.decode_batch(generator, latents)[lacking]
            jobs = jobs[len(batch):]

    def sample_missing(self, generator: Generator, conds: dict[str, torch.Tensor], jobs: list[tuple[str, int]],
                       missing: set[tuple[str, int]], batch_size: int):
        """The first `batch_size` jobs and their latents z_0; None where none of them is missing."""
        batch = jobs[:batch_size]  # whole batches alone: what a resumed command draws is then the same bit for bit
        if missing.isdisjoint(batch):
            return batch, None
        cond = torch.cat([conds[name] for name, _ in batch])
        return batch, generator.sample(cond, [seed for _, seed in batch], self.sampling)


def decode_parts(generator: Generator, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Images [B, 3, H, W], `batch_size` at a time: a decoder takes more memory than the trajectory, which is kept."""
    return torch.cat([generator.decode(part) for part in latents.split(batch_size)])


def read_record(folder: Path) -> dict:
    return read_json(folder / RECORD) if (folder / RECORD).exists() else {}


def encode_arm(generator: Generator, arm: Arm) -> torch.Tensor:
    """The arm's cond [1, ...]."""
    if arm.vectors is None:
        return generator.encode([arm.prompt])
    found, width = arm.vectors.shape[1], sum(generator.token_widths)
    require(found == width, f"the token's vectors have {found} numbers and this model's have {width}: it was trained "
                            "for another --model")
    return generator.encode([arm.prompt], arm.vectors[None].to(generator.device))


def digest_json(value) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
