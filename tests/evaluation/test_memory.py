"""Photos of 24 megapixels need little more memory than the networks that look at them."""

import subprocess
import sys

import pytest
from PIL import Image

from utils import ROOT

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from evaluation.fidelity import measure_fidelity
from evaluation.real_images import find_real_images
from models.extractors import load_extractor
from prompt_datasets import target_class

folder, features, fid_mode = Path(sys.argv[1]), *sys.argv[2:]
extractor, target = load_extractor(features, "cpu", fid_mode), target_class(0, "crane", "crane")
extractor.extract_features(torch.stack([extractor.prepare(torch.zeros(3, 512, 512).byte())] * 32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, cache = str(folder / "real"), folder / "cache"
real = find_real_images(source, [target], {target: folder}, 1, cache)[target]
measure_fidelity(extractor, {"with": real[:8]}, [real], folder / "cache")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "features, fid_mode, kind", [("inception", "legacy", "jpg"), ("classifier", "clean", "png")]
)
def test_large_photos_take_little_memory(
    inception_weights, tiny_classifier, tmp_path, features, fid_mode, kind
):
    """Less than 2 GB: a batch of 32 at full size would be 9 GB. All are turned, the PNG are
    transparent too.
    """
    (tmp_path / "real" / "crane").mkdir(parents=True)
    photo = Image.effect_noise((1500, 1000), 60).resize((6000, 4000), Image.BICUBIC)
    photo = Image.merge("RGB" if kind == "jpg" else "RGBA", [photo] * (3 if kind == "jpg" else 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / f"photo.{kind}", exif=exif, compress_level=1)
    for i in range(34):
        (tmp_path / "real" / "crane" / f"{i}.{kind}").hardlink_to(tmp_path / f"photo.{kind}")
    name = {"inception": f"inception:{inception_weights}", "classifier": tiny_classifier}[features]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), name, fid_mode],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert float(found.stdout) < 2
