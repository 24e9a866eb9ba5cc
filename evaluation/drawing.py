"""Draw the same seeds without and with the token, and record how."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from models.base import Generator
from models.batch_size import WITHOUT_GRAPH, default_batch_size, fit_batch_size
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, prompt_folder
from system.tensor_files import save_pixels, to_pixels
from system.text_files import read_json
from utils import replace_file, require, write_json

PAIR = ("without", "with")  # the token: the conditions that every evaluation has
CONTROLS = ("untrained", "random")  # other vectors in the token's place
BETTER_WORDS = "oracle"  # other words for the class, and no token
MORE_CONDITIONS = (*CONTROLS, BETTER_WORDS)
SAMPLED_AT_ONCE = 64  # pictures, at first
# At first; one fp16 picture of 512 x 512 takes 0.13 GB in the decoder's widest layer.
DECODED_AT_ONCE = 8
RECORD = "drawn.json"  # beside the pictures: how they were drawn
FRAMES = 10  # of the film of one picture over the updates
Job = tuple[str, int]  # a picture to draw: its condition's folder, and its seed


class Condition(NamedTuple):
    """A set of pictures of a class."""

    folder: str
    prompt: str
    vectors: torch.Tensor | None  # [K, D], what the token stands for
    images: int  # how many seeds


def list_conditions(
    target: TargetClass,
    vectors: torch.Tensor,
    placeholder: str,
    images: int,
    eval_prompts: list[str],
    better_words: str | None = None,
) -> list[Condition]:
    """List the conditions without and with the token's `vectors` [K, D], in every prompt.

    Includes `better_words` in the place of the class name, if there are any.
    """
    with_token = f"{placeholder} {target.name}"
    found = []
    for template in (TEMPLATES[0], *eval_prompts):
        parent = "" if template == TEMPLATES[0] else f"prompts/{prompt_folder(template)}/"
        plain_prompt = template.format(target.name)
        token_prompt = template.format(with_token)
        found.append(Condition(f"{parent}without", plain_prompt, None, images))
        found.append(Condition(f"{parent}with", token_prompt, vectors, images))
    if better_words:
        prompt = TEMPLATES[0].format(better_words)
        found.append(Condition(BETTER_WORDS, prompt, None, images))
    return found


def list_controls(
    target: TargetClass,
    vectors: torch.Tensor,
    widths: tuple[int, ...],
    placeholder: str,
    images: int,
    start: torch.Tensor | str,
) -> list[Condition]:
    """List the controls: the token's start, and random vectors of the norms of `vectors` [K, D].

    What these gain does not come from training. `start` is vectors, or the words that say it
    exactly.
    """
    with_token = TEMPLATES[0].format(f"{placeholder} {target.name}")
    if isinstance(start, str):
        prompt = TEMPLATES[0].format(f"{start} {target.name}")
        untrained = Condition("untrained", prompt, None, images)
    else:
        untrained = Condition("untrained", with_token, start, images)
    noise = torch.Generator().manual_seed(target.index)
    directions = torch.randn(vectors.shape, generator=noise)
    parts = []
    for part, direction in zip(vectors.split(widths, 1), directions.split(widths, 1), strict=True):
        norm = part.norm(dim=1, keepdim=True)
        parts.append(direction * norm / direction.norm(dim=1, keepdim=True))
    random = Condition("random", with_token, torch.cat(parts, dim=1), images)
    return [untrained, random]


def choose_evenly(count: int) -> list[int]:
    """Choose at most FRAMES of `count` indices, evenly, with the first and the last."""
    evenly = torch.linspace(0, count - 1, FRAMES).round().int().tolist()
    return list(dict.fromkeys(evenly))


def choose_frames(every_update: torch.Tensor) -> dict[str, torch.Tensor]:
    """Choose {update: vectors} from a training's updates [updates, K, D], in half precision."""
    frames = {}
    for update in choose_evenly(len(every_update)):
        frames[f"{update:03d}"] = every_update[update].half().cpu()
    return frames


def list_film(
    target: TargetClass, placeholder: str, frames: dict[str, torch.Tensor], images: int = 1
) -> list[Condition]:
    """List the first seeds' pictures for the vectors that `choose_frames` chose, in order."""
    foreign = [name for name in frames if not re.fullmatch("[0-9]{3,6}", name)]
    require(  # names become folders
        not foreign,
        f"the vectors of the training hold {foreign[:1]}, which is not a vector of an update",
    )
    prompt = TEMPLATES[0].format(f"{placeholder} {target.name}")
    film = []
    for update in sorted(frames):
        vectors = torch.atleast_2d(frames[update].float())
        film.append(Condition(f"updates/{update}", prompt, vectors, images))
    return film


class Drawer:
    """Draws conditions with one generator and one way of sampling.

    The generator is loaded only if a picture is missing.
    """

    def __init__(
        self,
        get_generator: Callable[[], Generator],
        sampling: SamplingSettings,
        drawn_by: dict,
        device: str,
        batch_size: int | None = None,
    ):
        """Set up drawing; `drawn_by`: all that affects pictures but prompt, token and seed."""
        self.get_generator = get_generator
        self.sampling = sampling
        self.settings_digest = digest_json(drawn_by)
        # by prompt: where pictures without a token are, for classes of one name
        self.plain: dict[str, Path] = {}
        most = default_batch_size(SAMPLED_AT_ONCE, device, sampling.height, sampling.width)
        without_graph = WITHOUT_GRAPH * batch_size if batch_size else None
        self.sample_batch = fit_batch_size(self.sample_missing, without_graph, most)
        at_once = min(batch_size or most, DECODED_AT_ONCE)
        self.decode_batch = fit_batch_size(decode_parts, None, at_once)

    def describe_conditions(self, conditions: Iterable[Condition]) -> dict[str, dict]:
        """Describe these conditions as RECORD will hold them once they are drawn."""
        described = {}
        for condition in conditions:
            described[condition.folder] = {
                "prompt": condition.prompt,
                "settings": self.settings_digest,
                "token": digest_vectors(condition.vectors),
            }
        return described

    def find_missing(self, conditions: list[Condition], folder: Path) -> tuple[set[str], set[Job]]:
        """Find the conditions that were drawn otherwise, and every picture to draw."""
        before = read_record(folder)
        stale = set()
        for name, described in self.describe_conditions(conditions).items():
            if before.get(name) != described:
                stale.add(name)
        missing = set()
        for condition in conditions:
            name = condition.folder
            for seed in range(condition.images):
                if name in stale or not find_picture(folder, (name, seed)).exists():
                    missing.add((name, seed))
        return stale, missing

    @torch.no_grad()
    def draw_conditions(
        self,
        conditions: list[Condition],
        folder: Path,
        title: str,
        stale_results: Iterable[Path] = (),
    ) -> int:
        """Draw what is missing of folder/<condition>/<seed>.png, and count it.

        First deletes `stale_results`, which were derived from earlier pictures.
        """
        stale, missing = self.find_missing(conditions, folder)
        if not missing:
            return 0
        generator = self.get_generator()
        conds = {}
        for condition in conditions:
            conds[condition.folder] = encode_condition(generator, condition)
        for file in stale_results:
            file.unlink(missing_ok=True)
        for name in stale:
            remove_pictures(folder / name)
        write_json(folder / RECORD, read_record(folder) | self.describe_conditions(conditions))
        plain = [condition for condition in conditions if condition.vectors is None]
        with_vectors = [condition for condition in conditions if condition.vectors is not None]
        with tqdm(total=len(missing), desc=f"drawing {title}", unit="image", leave=False) as bar:
            for together in (*([condition] for condition in plain), with_vectors):
                copied = self.copy_plain(together, missing, folder)
                bar.update(len(copied))
                jobs = list_jobs(together)
                for drawn, images in self.draw_jobs(generator, conds, jobs, missing - copied):
                    require(
                        images.isfinite().all(),
                        f"a picture of {title} is not finite: try --mixed_precision bf16 or no",
                    )
                    files = [find_picture(folder, job) for job in drawn]
                    save_pixels(to_pixels(images), files)
                    bar.update(len(files))
        for condition in plain:
            self.plain[condition.prompt] = folder / condition.folder
        return len(missing)

    def copy_plain(self, conditions: list[Condition], missing: set[Job], folder: Path) -> set[Job]:
        """Copy missing pictures that were drawn for another class of the same name; return them."""
        copied = set()
        for condition in conditions:
            source = self.plain.get(condition.prompt)
            if condition.vectors is not None or source is None:
                continue
            for job in list_jobs([condition]):
                file = source / f"{job[1]}.png"
                if job in missing and file.exists():
                    with replace_file(find_picture(folder, job)) as written:
                        shutil.copyfile(file, written)
                    copied.add(job)
        return copied

    def draw_jobs(
        self,
        generator: Generator,
        conds: dict[str, torch.Tensor],
        jobs: list[Job],
        missing: set[Job],
    ) -> Iterator[tuple[list[Job], torch.Tensor]]:
        """Yield the missing `jobs` and their images [B, 3, H, W], batch by batch."""
        while jobs:
            batch, latents = self.sample_batch(generator, conds, jobs, missing)
            lacking = [i for i, job in enumerate(batch) if job in missing]
            if lacking:
                images = self.decode_batch(generator, latents)
                yield [batch[i] for i in lacking], images[lacking]
            jobs = jobs[len(batch) :]

    def sample_missing(
        self,
        generator: Generator,
        conds: dict[str, torch.Tensor],
        jobs: list[Job],
        missing: set[Job],
        batch_size: int,
    ) -> tuple[list[Job], torch.Tensor | None]:
        """Sample the first `batch_size` jobs and their latents z_0; None if none is missing.

        Only whole batches are drawn, so that a resumed command draws the same, bit for bit.
        """
        batch = jobs[:batch_size]
        if missing.isdisjoint(batch):
            return batch, None
        cond = torch.cat([conds[name] for name, _ in batch])
        seeds = [seed for _, seed in batch]
        return batch, generator.sample(cond, seeds, self.sampling)


def list_jobs(conditions: list[Condition]) -> list[Job]:
    """List every picture of these conditions."""
    jobs = []
    for condition in conditions:
        for seed in range(condition.images):
            jobs.append((condition.folder, seed))
    return jobs


def find_picture(folder: Path, job: Job) -> Path:
    """Return the file of a picture."""
    name, seed = job
    return folder / name / f"{seed}.png"


def remove_pictures(folder: Path):
    """Remove the pictures of a condition, if any; raise UserError for a link."""
    require(
        not folder.is_symlink(),
        f"'{folder}' is a link, but its pictures must be drawn again: remove it",
    )
    if folder.exists():
        shutil.rmtree(folder)


def decode_parts(generator: Generator, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Decode images [B, 3, H, W], `batch_size` at a time.

    The decoder takes more memory than the trajectory, which is kept.
    """
    return torch.cat([generator.decode(part) for part in latents.split(batch_size)])


def read_record(folder: Path) -> dict:
    """Read how the pictures in a folder were drawn."""
    file = folder / RECORD
    return read_json(file) if file.exists() else {}


def encode_condition(generator: Generator, condition: Condition) -> torch.Tensor:
    """Encode the condition's prompt: cond [1, ...]."""
    if condition.vectors is None:
        return generator.encode([condition.prompt])
    found, width = condition.vectors.shape[1], sum(generator.token_widths)
    require(
        found == width,
        f"the token's vectors have {found} dimensions and this model's have {width}: it was "
        "trained for another --model",
    )
    vectors = condition.vectors[None].to(generator.device)
    return generator.encode([condition.prompt], vectors)


def digest_vectors(vectors: torch.Tensor | None) -> str | None:
    """Compute a digest of a token's vectors."""
    if vectors is None:
        return None
    return sha256(vectors.float().cpu().numpy().tobytes()).hexdigest()


def digest_json(value) -> str:
    """Compute a digest of a value that JSON can hold."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
