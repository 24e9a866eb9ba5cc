"""How near the generated pictures lie to real ones: FID, KID, precision, recall, density and coverage."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from classifiers import load_classifier, penultimate
from memory import fitting
from metrics import COMPARABLE_FID, NEAREST_K, Prdc, frechet_distance, kernel_distance, prdc
from opening import opening
from utils import read_image, require

INCEPTION, INCEPTION_SIZE = "InceptionV3", 299
READ_AT_ONCE = 32
VARIED = 0.8  # of the real pictures' coverage: less is worth a warning
FEW = 100  # generated pictures below which neighbourhoods say little


class Extractor(NamedTuple):
    """Features [B, D] of pictures that `prepare` has brought to one size."""

    name: str
    prepare: Callable[[torch.Tensor], torch.Tensor]  # image [3, H, W] in [0, 1] -> [3, h, w]
    features: Callable[[torch.Tensor], torch.Tensor]  # [B, 3, h, w] -> [B, D]
    device: torch.device


def load_extractor(name: str, device: str) -> Extractor:
    """'inception' (downloaded), 'inception:<file of weights>', or a classifier's penultimate features.

    Raises:
        UserError: one line that says what is missing.
    """
    if name.split(":")[0] != "inception":
        classifier = load_classifier(name, device)
        blank = classifier.preprocessing(torch.zeros(1, 3, 64, 64)).to(device)
        penultimate(classifier, blank)  # now, not after everything is drawn
        return Extractor(classifier.name, lambda image: classifier.preprocessing(image[None])[0],
                         lambda prepared: penultimate(classifier, prepared), torch.device(device))
    weights = name.partition(":")[2] or None
    require(weights is None or Path(weights).is_file(), f"features '{name}': no file '{weights}'")
    with opening(name, weights, instead="or give --features inception:<file of weights> or a classifier"):
        if weights:  # the libraries unpickle freely, so they get no file that needs it
            torch.load(weights, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights).to(device)
    return Extractor(INCEPTION, _to_inception, model, torch.device(device))


def _to_inception(image: torch.Tensor) -> torch.Tensor:
    resized = TF.resize(image, [INCEPTION_SIZE] * 2, TF.InterpolationMode.BICUBIC, antialias=True)
    return (resized.clamp(0, 1) * 255).round().byte()


def features_of(extractor: Extractor, files: list[Path]) -> torch.Tensor:
    """Features [N, D] of picture files of any size, on the CPU."""
    return fitting(features_in_batches, None, READ_AT_ONCE)(extractor, files)


@torch.no_grad()
def features_in_batches(batch_size: int, extractor: Extractor, files: list[Path]) -> torch.Tensor:
    parts = []
    for start in tqdm(range(0, len(files), batch_size), desc=f"{extractor.name} features", unit="batch", leave=False):
        arrays = [np.array(read_image(file)) for file in files[start:start + batch_size]]
        images = [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]
        batch = torch.stack([extractor.prepare(image) for image in images])
        parts.append(extractor.features(batch.to(extractor.device)).float().cpu())
    return torch.cat(parts)


def distances(real: torch.Tensor, generated: torch.Tensor) -> dict:
    """FID, KID with its std over subsets, and PRDC."""
    mean, std, size = kernel_distance(real, generated)
    return {"fid": frechet_distance(real, generated), "kid": mean, "kid_std": std, "kid_subset_size": size,
            **prdc(real, generated)._asdict(), "real_images": len(real), "generated_images": len(generated)}


def distribution(extractor: Extractor, arms: dict[str, list[Path]], real: list[list[Path]]) -> dict:
    """Every arm's pictures of all classes against the real ones [class][picture], pooled.

    Where every class has enough real pictures, as many of them as an arm has of the class, picked at random, stand
    aside and are measured like an arm of their own, 'real': the ceiling that a perfect generator would reach.
    """
    aside = len(next(iter(arms.values()))) // len(real)
    real = [random.Random(0).sample(files, len(files)) for files in real]
    if all(len(files) >= 2 * aside for files in real):
        arms = {**arms, "real": [file for files in real for file in files[:aside]]}
        real = [files[aside:] for files in real]
    pooled = features_of(extractor, [file for files in real for file in files])
    counts = [len(files) for files in real]
    generated = len(next(iter(arms.values())))
    return {"features": extractor.name, "real_images_a_class": [min(counts), max(counts)],
            "comparable_with_published_fids": comparable(extractor.name, sum(counts), generated),
            **{arm: distances(pooled, features_of(extractor, files)) for arm, files in arms.items()}}


def comparable(features: str, real: int, generated: int) -> bool:
    """Whether an FID of these features and so many images may stand beside published ones."""
    return features == INCEPTION and min(real, generated) >= COMPARABLE_FID


def check_counts(generated: int, real: int):
    """Raise UserError where there are too few pictures to measure a distance."""
    for count, kind, remedy in ((real, "real", "put more into --real_images"),
                                (generated, "generated", "give a larger --test_size or more classes")):
        require(count > NEAREST_K, f"FID, KID and coverage need more than {NEAREST_K} {kind} pictures, all classes "
                                   f"together; there are {count}: {remedy}, or give --real_images none")


def distribution_lines(distances: dict) -> tuple[list[list[str]], str]:
    """A table, one line a measure and a column an arm, and a note on how many pictures it rests on."""
    arms = [arm for arm in ("without", "with", "real") if arm in distances]
    sides = distances[arms[0]]
    lines = [[f"by {distances['features']}", *arms]]
    spread = f"kid's std over subsets of {min(distances[arm]['kid_subset_size'] for arm in arms)}"
    names = {"fid": "fid", "kid": "kid", "kid_std": spread, **{name: name for name in Prdc._fields}}
    lines += [[name, *(f"{distances[arm][measure]:#.3g}".rstrip(".") for arm in arms)]
              for measure, name in names.items()]
    note = f"{sides['generated_images']} generated against {sides['real_images']} real pictures, all classes together"
    if not distances["comparable_with_published_fids"]:
        note += (f": not comparable with published FIDs, which are of {INCEPTION}'s features and {COMPARABLE_FID} or "
                 "more pictures a side")
    if min(distances[arm]["kid"] for arm in arms) < 0:
        note += ". KID is an unbiased estimate: near its true value 0 it falls below by chance"
    fewest, most = distances["real_images_a_class"]
    if fewest < most:
        note += (f". Classes have {fewest} to {most} real pictures and weigh accordingly among the real, but all the "
                 "same among the generated ones")
    if sides["generated_images"] < FEW:
        note += f". Precision, recall, density and coverage mean little with fewer than {FEW} pictures"
    elif "real" in distances and distances["with"]["coverage"] < VARIED * distances["real"]["coverage"]:
        note += f". With the token the pictures cover less than {VARIED} of what as many real ones cover"
    if "real" not in distances:
        note += ". The ceiling, real against real, needs twice as many real pictures of every class as are generated"
    note += "."
    return lines, note
