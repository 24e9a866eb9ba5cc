"""How near the generated pictures lie to real ones: FID, KID, precision, recall, density and coverage."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from evaluation.statistics import NEAREST_K, frechet_distance, kernel_distance, measure_prdc
from evaluation.tables import Table
from models.batch_size import fit_batch_size
from models.checkpoints import opening_checkpoint
from models.classifiers import Classifier, load_classifier, penultimate_features
from utils import read_image, require

INCEPTION, INCEPTION_SIZE = "InceptionV3", 299
COMPARABLE_FID = 2048  # images on each side below which FID's bias dwarfs the differences that papers report
VARIED = 0.8  # of the real pictures' coverage: less is worth a warning
FEW = 100  # generated pictures below which neighbourhoods say little


class Extractor(NamedTuple):
    """Features [B, D] of pictures that `prepare` has brought to one size."""

    name: str
    prepare: Callable[[torch.Tensor], torch.Tensor]  # image [3, H, W] in [0, 1] -> [3, h, w]
    extract_features: Callable[[torch.Tensor], torch.Tensor]  # [B, 3, h, w] -> [B, D]


def classifier_extractor(classifier: Classifier) -> Extractor:
    """The features that a classifier's last linear layer reads; a UserError where it ends in none."""
    blank = classifier.preprocess(torch.zeros(1, 3, 64, 64)).to(classifier.device)
    penultimate_features(classifier, blank)  # now, not after everything is drawn
    return Extractor(classifier.name, lambda image: classifier.preprocess(image[None])[0],
                     lambda prepared: penultimate_features(classifier, prepared.to(classifier.device)))


def load_extractor(name: str, device: str) -> Extractor:
    """'inception' (downloaded), 'inception:<file of weights>', or a classifier's penultimate features."""
    if name.split(":")[0] != "inception":
        return classifier_extractor(load_classifier(name, device))
    weights = name.partition(":")[2] or None
    require(weights is None or Path(weights).is_file(), f"features '{name}': no file '{weights}'")
    with opening_checkpoint(name, weights, instead="or give --features inception:<file of weights> or a classifier"):
        if weights:  # the libraries unpickle freely, so they get no file that needs it
            torch.load(weights, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights).to(device)

    def resize_image(image: torch.Tensor) -> torch.Tensor:
        resized = TF.resize(image, [INCEPTION_SIZE] * 2, TF.InterpolationMode.BICUBIC, antialias=True)
        return (resized.clamp(0, 1) * 255).round().byte()

    return Extractor(INCEPTION, resize_image, lambda prepared: model(prepared.to(device)))


def extract_files(extractor: Extractor, files: list[Path]) -> torch.Tensor:
    """Features [N, D] of picture files of any size, on the CPU."""
    return fit_batch_size(extract_in_batches, None, 32)(extractor, files)  # 32 at first


@torch.no_grad()
def extract_in_batches(extractor: Extractor, files: list[Path], batch_size: int) -> torch.Tensor:
    parts = []
    for start in tqdm(range(0, len(files), batch_size), desc=f"{extractor.name} features", unit="batch", leave=False):
        images = [TF.pil_to_tensor(read_image(file)).float() / 255 for file in files[start:start + batch_size]]
        parts.append(extractor.extract_features(torch.stack(list(map(extractor.prepare, images)))).float().cpu())
    return torch.cat(parts)


def measure_distances(real: torch.Tensor, generated: torch.Tensor) -> dict:
    """FID, KID with its std over subsets, and PRDC, of features [N, D] and [M, D]."""
    mean, std, size = kernel_distance(real, generated)
    return {"fid": frechet_distance(real, generated), "kid": mean, "kid_std": std, "kid_subset_size": size,
            **measure_prdc(real, generated), "real_images": len(real), "generated_images": len(generated)}


def measure_fidelity(extractor: Extractor, arms: dict[str, list[Path]], real: list[list[Path]]) -> dict:
    """Every arm's pictures of all classes against the real ones [class][picture], pooled."""
    aside = len(arms["with"]) // len(real)
    real = [random.Random(0).sample(files, len(files)) for files in real]
    if all(len(files) >= 2 * aside for files in real):  # some make an arm of their own: a perfect generator's ceiling
        arms = {**arms, "real": [file for files in real for file in files[:aside]]}
        real = [files[aside:] for files in real]
    pooled = extract_files(extractor, [file for files in real for file in files])
    counts, generated = [len(files) for files in real], len(arms["with"])
    is_comparable = extractor.name == INCEPTION and min(sum(counts), generated) >= COMPARABLE_FID
    return {"features": extractor.name, "real_images_a_class": [min(counts), max(counts)],
            "comparable_with_published_fids": is_comparable,
            **{arm: measure_distances(pooled, extract_files(extractor, files)) for arm, files in arms.items()}}


def check_counts(generated: int, real: int):
    """Raise UserError where there are too few pictures to measure a distance."""
    for count, kind, remedy in ((real, "real", "put more into --real_images"),
                                (generated, "generated", "give a larger --test_size or more classes")):
        require(count > NEAREST_K, f"FID, KID and coverage need more than {NEAREST_K} {kind} pictures, all classes "
                                   f"together; there are {count}: {remedy}, or give --real_images none")


def fidelity_table(found: dict) -> Table:
    """One row per measure and a column per arm, and a note on how many pictures it rests on."""
    arms = [arm for arm in ("without", "with", "real") if arm in found]
    generated, real = found["with"]["generated_images"], found["with"]["real_images"]
    names = {"kid_std": f"kid's std over subsets of {min(found[arm]['kid_subset_size'] for arm in arms)}"}
    rows = [[names.get(measure, measure), *(f"{found[arm][measure]:#.3g}".rstrip(".") for arm in arms)]
            for measure in ("fid", "kid", "kid_std", "precision", "recall", "density", "coverage")]
    fewest, most = found["real_images_a_class"]
    others = "" if found["comparable_with_published_fids"] else (
        f": not comparable with published FIDs, which are of {INCEPTION}'s features and {COMPARABLE_FID} or more "
        "pictures on each side")
    ceiling = found.get("real", {"coverage": 0.0})["coverage"]
    notes = (
        (True, f"{generated} generated against {real} real pictures, all classes together{others}"),
        (min(found[arm]["kid"] for arm in arms) < 0,
         "KID is an unbiased estimate: near its true value 0 it falls below by chance"),
        (fewest < most, f"Classes have {fewest} to {most} real pictures and weigh accordingly among the real, but all "
         "the same among the generated ones"),
        (generated < FEW, f"Precision, recall, density and coverage mean little with fewer than {FEW} pictures"),
        (generated >= FEW and found["with"]["coverage"] < VARIED * ceiling,
         f"With the token the pictures cover less than {VARIED} of what as many real ones cover"),
        ("real" not in found,
         "The ceiling, real against real, needs twice as many real pictures of every class as are generated"))
    return Table([f"by {found['features']}", *arms], rows, "Distance to real pictures",
                 "".join(f"{text}. " for applies, text in notes if applies).rstrip())
