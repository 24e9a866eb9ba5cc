"""How near the generated pictures lie to real ones: FID, KID, precision, recall, density and coverage."""

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import PIL
import timm
import torch
import transformers
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from evaluation.images import digest_json
from evaluation.read_image import read_image
from evaluation.statistics import (
    NEAREST_K,
    FeatureSet,
    frechet_distance,
    kernel_distance,
    measure_prdc,
    pool_features,
)
from evaluation.tables import Table
from models.batch_size import fit_batch_size
from models.extractors import INCEPTION, Extractor
from system.paths import stamp_file
from system.tensor_files import read_tensors, write_tensors
from utils import ROOT, require

CHUNK = 4096  # pictures whose features are one file of the cache
COMPARABLE_FID = 2048  # images on each side below which FID's bias dwarfs the differences that papers report
VARIED = 0.8  # of the real pictures' coverage: less is worth a warning
CODE = [PIL.__version__, timm.__version__, transformers.__version__, *(  # decides features besides files and weights
    sha256((ROOT / file).read_bytes()).hexdigest()
    for file in ("evaluation/read_image.py", "models/extractors.py", "models/classifiers.py"))]
MODES = {"legacy": "torch-fidelity", "clean": "clean-fid"}
FEW = 100  # generated pictures below which neighbourhoods say little


def extract_files(extractor: Extractor, files: list[Path]) -> torch.Tensor:
    """Features [N, D] of picture files of any size, on the CPU."""
    return fit_batch_size(extract_in_batches, None, 32)(extractor, files)  # 32 at first


@torch.no_grad()
def extract_in_batches(extractor: Extractor, files: list[Path], batch_size: int) -> torch.Tensor:
    parts = []
    for start in tqdm(range(0, len(files), batch_size), desc=f"{extractor.name} features", unit="batch", leave=False):
        prepared = [extractor.prepare(TF.pil_to_tensor(read_image(file))) for file in files[start:start + batch_size]]
        parts.append(extractor.extract_features(torch.stack(prepared)).float().cpu())
    return torch.cat(parts)


def read_features(extractor: Extractor, files: list[Path], chosen: list[int], cache: Path) -> Iterator[torch.Tensor]:
    """Features [n, D] of the files that `chosen` counts, part by part; those of all files are kept in `cache`."""
    for start in range(0, len(files), CHUNK):
        part = files[start:start + CHUNK]
        place = digest_json([extractor.name, extractor.fid_mode, str(part[0].parent), start])[:16]
        stored, digest = cache / f"features_{place}.safetensors", digest_json(
            [extractor.identity, CODE, [stamp_file(file) for file in part]])
        found, header = read_tensors(stored) if stored.exists() else ({}, {})
        if header.get("digest") != digest:
            found = {"features": extract_files(extractor, part)}
            write_tensors(stored, found, {"digest": digest})
        yield found["features"][[i - start for i in chosen if start <= i < start + CHUNK]]


def measure_distances(real: FeatureSet, generated: FeatureSet) -> dict:
    """FID, KID with its std over subsets, and PRDC."""
    mean, std, size = kernel_distance(real.sample, generated.sample)
    return {"fid": frechet_distance(real, generated), "kid": mean, "kid_std": std, "kid_subset_size": size,
            **measure_prdc(real.sample, generated.sample), "real_images": real.count,
            "generated_images": generated.count, "sampled_for_kid_and_prdc": [len(real.sample), len(generated.sample)]}


def measure_fidelity(extractor: Extractor, arms: dict[str, list[Path]], real: list[list[Path]], cache: Path) -> dict:
    """Every arm's pictures of all classes against the real ones [class][picture], pooled; `cache` keeps features."""
    aside = len(arms["with"]) // len(real)
    if any(len(files) < 2 * aside for files in real):  # else some make an arm: a perfect generator's ceiling
        aside = 0
    orders = [random.Random(0).sample(range(len(files)), len(files)) for files in real]

    def pool_real(part: slice) -> FeatureSet:
        chosen = [order[part] for order in orders]
        parts = (features for files, rows in zip(real, chosen, strict=True)
                 for features in read_features(extractor, files, rows, cache))
        return pool_features(parts, sum(map(len, chosen)))

    pooled = pool_real(slice(aside, None))
    generated = {arm: pool_features((extract_files(extractor, files[i:i + CHUNK])
                                     for i in range(0, len(files), CHUNK)), len(files)) for arm, files in arms.items()}
    if aside:
        generated["real"] = pool_real(slice(aside))
    counts = [len(files) - aside for files in real]
    is_comparable = extractor.name == INCEPTION and min(pooled.count, len(arms["with"])) >= COMPARABLE_FID
    return {"features": extractor.name, "fid_mode": extractor.fid_mode,
            "real_images_a_class": [min(counts), max(counts)],
            "comparable_with": MODES.get(extractor.fid_mode) if is_comparable else None,
            **{arm: measure_distances(pooled, features) for arm, features in generated.items()}}


def check_counts(generated: int, real: int):
    """Raise UserError where there are too few pictures to measure a distance."""
    for count, kind, remedy in ((real, "real", "put more into --real_images"),
                                (generated, "generated", "give a larger --test_size or more classes")):
        require(count > NEAREST_K, f"FID, KID and coverage need more than {NEAREST_K} {kind} pictures, all classes "
                                   f"together; there are {count}: {remedy}, or give --real_images none")


def fidelity_table(found: dict) -> Table:
    """One row per measure and a column per arm, and a note on how many pictures it rests on."""
    arms = [arm for arm in ("without", "with", "oracle", "real") if arm in found]
    generated, real = found["with"]["generated_images"], found["with"]["real_images"]
    names = {"kid_std": f"kid's std over subsets of {min(found[arm]['kid_subset_size'] for arm in arms)}"}
    rows = [[names.get(measure, measure), *(f"{found[arm][measure]:#.3g}".rstrip(".") for arm in arms)]
            for measure in ("fid", "kid", "kid_std", "precision", "recall", "density", "coverage")]
    fewest, most = found["real_images_a_class"]
    others = f": comparable with FIDs by {found['comparable_with']}" if found.get("comparable_with") else (
        f": not comparable with published FIDs, which are of {INCEPTION}'s features and {COMPARABLE_FID} or more "
        "pictures on each side")
    sampled = found["with"].get("sampled_for_kid_and_prdc", [real, generated])
    ceiling = found.get("real", {"coverage": 0.0})["coverage"]
    notes = (
        (True, f"{generated} generated against {real} real pictures, all classes together{others}"),
        (sampled != [real, generated], "KID, precision, recall, density and coverage are of random samples: "
         f"{sampled[1]} generated, {sampled[0]} real"),
        (found.get("fid_mode"), f"Pictures are resized as by {MODES.get(found.get('fid_mode'))}"),
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
