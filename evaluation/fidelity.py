"""Distances between generated and real pictures: FID, KID, precision, recall, coverage."""

import random
from collections.abc import Iterator
from pathlib import Path

import PIL
import timm
import torch
import transformers
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from evaluation.drawing import BETTER_WORDS, digest_json
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
from utils import require

EXTRACTED_AT_ONCE = 32  # pictures, at first
CHUNK = 4096  # pictures whose features are one file of the cache
# Images on each side below which FID's bias dwarfs the differences that papers report.
COMPARABLE_FID = 2048
VARIED = 0.8  # of the real pictures' coverage: less is worth a warning
FEW = 100  # generated pictures below which neighbourhoods say little
# Raise it where the same picture files give other features or distances than before: reading,
# resizing, an extractor or a measure has changed.
VERSION = 1
CODE = [VERSION, PIL.__version__, timm.__version__, transformers.__version__]
MODES = {"legacy": "torch-fidelity", "clean": "clean-fid"}
MEASURES = ("fid", "kid", "kid_std", "precision", "recall", "density", "coverage")


def extract_files(extractor: Extractor, files: list[Path]) -> torch.Tensor:
    """Extract the features [N, D] of picture files of any size, on the CPU."""
    extract = fit_batch_size(extract_in_batches, None, EXTRACTED_AT_ONCE)
    return extract(extractor, files)


@torch.no_grad()
def extract_in_batches(extractor: Extractor, files: list[Path], batch_size: int) -> torch.Tensor:
    """Extract features as `extract_files`, `batch_size` at a time."""
    starts = range(0, len(files), batch_size)
    parts = []
    for start in tqdm(starts, desc=f"{extractor.name} features", unit="batch", leave=False):
        prepared = []
        for file in files[start : start + batch_size]:
            prepared.append(extractor.prepare(TF.pil_to_tensor(read_image(file))))
        parts.append(extractor.extract_features(torch.stack(prepared)).float().cpu())
    return torch.cat(parts)


def read_features(
    extractor: Extractor, files: list[Path], chosen: list[int], cache: Path
) -> Iterator[torch.Tensor]:
    """Yield the features [n, D] of the files with the indices `chosen`, part by part.

    Those of all files are kept in `cache`.
    """
    for start in range(0, len(files), CHUNK):
        features = load_chunk(extractor, files[start : start + CHUNK], start, cache)
        here = [i - start for i in chosen if start <= i < start + CHUNK]
        yield features[here]


def load_chunk(extractor: Extractor, files: list[Path], start: int, cache: Path) -> torch.Tensor:
    """Load the features [n, D] of these files; the first is number `start` of its class."""
    place = digest_json([extractor.name, extractor.fid_mode, str(files[0].parent), start])
    stored = cache / f"features_{place[:16]}.safetensors"
    digest = digest_json([extractor.identity, CODE, [stamp_file(file) for file in files]])
    if stored.exists():
        found, header = read_tensors(stored)
        if header.get("digest") == digest:
            return found["features"]
    features = extract_files(extractor, files)
    write_tensors(stored, {"features": features}, {"digest": digest})
    return features


def extract_chunks(extractor: Extractor, files: list[Path]) -> Iterator[torch.Tensor]:
    """Yield the features [n, D] of files, CHUNK by CHUNK."""
    for start in range(0, len(files), CHUNK):
        yield extract_files(extractor, files[start : start + CHUNK])


def measure_distances(real: FeatureSet, generated: FeatureSet) -> dict:
    """Measure FID, KID with its standard deviation over subsets, and PRDC."""
    mean, std, size = kernel_distance(real.sample, generated.sample)
    return {
        "fid": frechet_distance(real, generated),
        "kid": mean,
        "kid_std": std,
        "kid_subset_size": size,
        **measure_prdc(real.sample, generated.sample),
        "real_images": real.count,
        "generated_images": generated.count,
        "sampled_for_kid_and_prdc": [len(real.sample), len(generated.sample)],
    }


def measure_fidelity(
    extractor: Extractor,
    conditions: dict[str, list[Path]],
    real: list[list[Path]],
    cache: Path,
) -> dict:
    """Compare every condition's pictures with the real ones [class][picture], classes pooled.

    `cache` keeps features. If there are twice as many real pictures of every class as generated
    ones, some of them become a condition of their own: the ceiling of a perfect generator.
    """
    aside = len(conditions["with"]) // len(real)
    if min(len(files) for files in real) < 2 * aside:
        aside = 0
    orders = [random.Random(0).sample(range(len(files)), len(files)) for files in real]

    def pool_real(part: slice) -> FeatureSet:
        chosen = [order[part] for order in orders]
        count = sum(len(rows) for rows in chosen)
        return pool_features(read_classes(extractor, real, chosen, cache), count)

    pooled = pool_real(slice(aside, None))
    generated = {}
    for condition, files in conditions.items():
        generated[condition] = pool_features(extract_chunks(extractor, files), len(files))
    if aside:
        generated["real"] = pool_real(slice(aside))
    counts = [len(files) - aside for files in real]
    fewest = min(pooled.count, len(conditions["with"]))
    found = {
        "features": extractor.name,
        "fid_mode": extractor.fid_mode,
        "real_images_a_class": [min(counts), max(counts)],
        "comparable_with": find_comparable(extractor, fewest),
    }
    for condition, features in generated.items():
        found[condition] = measure_distances(pooled, features)
    return found


def find_comparable(extractor: Extractor, fewest: int) -> str | None:
    """Return the library whose FIDs are comparable, if one side has `fewest` pictures, or None."""
    if extractor.name != INCEPTION or fewest < COMPARABLE_FID:
        return None
    return MODES.get(extractor.fid_mode)


def read_classes(
    extractor: Extractor, real: list[list[Path]], chosen: list[list[int]], cache: Path
) -> Iterator[torch.Tensor]:
    """Yield the features [n, D] of the `chosen` real pictures [class][number], part by part."""
    for files, rows in zip(real, chosen, strict=True):
        yield from read_features(extractor, files, rows, cache)


def check_counts(generated: int, real: int):
    """Raise UserError for too few pictures to measure a distance."""
    kinds = (
        (real, "real", "put more into --real_images"),
        (generated, "generated", "give a larger --test_size or more classes"),
    )
    for count, kind, remedy in kinds:
        require(
            count > NEAREST_K,
            f"FID, KID and coverage need more than {NEAREST_K} {kind} pictures, all classes "
            f"together; there are {count}: {remedy}, or give --real_images none",
        )


def fidelity_table(found: dict) -> Table:
    """Make a table: a row per measure, a column per condition, and a note on the pictures."""
    known = ("without", "with", BETTER_WORDS, "real")
    conditions = [condition for condition in known if condition in found]
    titles = ["better words" if name == BETTER_WORDS else name for name in conditions]
    subset = min(found[condition]["kid_subset_size"] for condition in conditions)
    rows = []
    for measure in MEASURES:
        name = f"kid's std over subsets of {subset}" if measure == "kid_std" else measure
        cells = [f"{found[condition][measure]:#.3g}".rstrip(".") for condition in conditions]
        rows.append([name, *cells])
    note = " ".join(f"{text}." for text in list_notes(found, conditions))
    header = [f"by {found['features']}", *titles]
    return Table(header, rows, "Distance to real pictures", note)


def list_notes(found: dict, conditions: list[str]) -> list[str]:
    """List what a reader of the distances must know."""
    with_token = found["with"]
    generated, real = with_token["generated_images"], with_token["real_images"]
    comparable = (
        f"not comparable with published FIDs, which are of {INCEPTION}'s features and "
        f"{COMPARABLE_FID} or more pictures on each side"
    )
    if found.get("comparable_with"):
        comparable = f"comparable with FIDs by {found['comparable_with']}"
    notes = [
        f"{generated} generated against {real} real pictures, all classes together: {comparable}"
    ]
    sampled_real, sampled_generated = with_token.get("sampled_for_kid_and_prdc", [real, generated])
    if (sampled_real, sampled_generated) != (real, generated):
        notes.append(
            "KID, precision, recall, density and coverage are of random samples: "
            f"{sampled_generated} generated, {sampled_real} real"
        )
    if found.get("fid_mode"):
        notes.append(f"Pictures are resized as by {MODES.get(found['fid_mode'])}")
    if min(found[condition]["kid"] for condition in conditions) < 0:
        notes.append("KID is an unbiased estimate: near its true value 0 it falls below by chance")
    fewest, most = found["real_images_a_class"]
    if fewest < most:
        notes.append(
            f"Classes have {fewest} to {most} real pictures and weigh accordingly among the real, "
            "but all the same among the generated ones"
        )
    if generated < FEW:
        notes.append(
            f"Precision, recall, density and coverage mean little with fewer than {FEW} pictures"
        )
    elif "real" in found and with_token["coverage"] < VARIED * found["real"]["coverage"]:
        notes.append(
            f"With the token the pictures cover less than {VARIED} of what as many real ones cover"
        )
    if "real" not in found:
        notes.append(
            "The ceiling, real against real, needs twice as many real pictures of every class as "
            "are generated"
        )
    return notes
