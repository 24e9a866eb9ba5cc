"""Distances to real pictures: features against torch-fidelity's and the classifier's own, and what
the notes say.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.v2.functional import pil_to_tensor

from evaluation.fidelity import (
    extract_files,
    fidelity_table,
    find_comparable,
    measure_distances,
    measure_fidelity,
)
from evaluation.read_image import load_images, read_image
from evaluation.statistics import frechet_distance, measure_prdc, pool_features
from models.classifiers import load_classifier
from models.extractors import Extractor, load_extractor, resize_clean
from run import main
from system.tensor_files import save_pixels, to_pixels
from tests.conftest import flags
from utils import UserError


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Larger and smaller than Inception's 299 x 299, and of just its size."""
    files = [tmp_path / name for name in ("a.jpg", "b.png", "c.png", "d.png")]
    for i, (file, size) in enumerate(
        zip(files, ((640, 400), (40, 30), (123, 299), (299, 299)), strict=True)
    ):
        pixels = np.random.default_rng(i).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.BICUBIC).save(file)
    return files


def test_legacy_features_are_torch_fidelity_s(inception_weights, photos):
    """What reaches the network, read by torch-fidelity's own data set, bit for bit; and what leaves
    it.
    """
    extractor = load_extractor(f"inception:{inception_weights}", "cpu", "legacy")
    reference, reached = (
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights)),
        [],
    )
    reference.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, inputs: reached.append(inputs[0])
    )
    theirs = torch.cat([reference(picture[None])[0] for picture in ImagesPathDataset(photos)])
    for file, tensor in zip(photos, reached, strict=True):
        assert torch.equal(
            (extractor.prepare(pil_to_tensor(read_image(file))) - 128) / 128, tensor[0]
        )
    ours = extract_files(extractor, photos)
    assert ours.shape == (4, 2048)
    assert (ours - theirs).norm() < 1e-3 * (theirs[0] - theirs[1]).norm()


@pytest.mark.parametrize(
    "tiles, expected",
    [  # of clean-fid 0.1.35: build_resizer("clean")(pixels)[::75, ::99, 1]
        (
            1,
            [
                0.0,
                81.18,
                224.668,
                104.998,
                210.62,
                61.998,
                200.799,
                107.01,
                118.301,
                117.482,
                41.983,
                97.14,
                78.657,
                19.597,
                4.861,
                13.077,
            ],
        ),
        (
            20,
            [
                40.89,
                117.443,
                131.26,
                149.696,
                47.982,
                117.541,
                124.46,
                153.958,
                60.031,
                124.127,
                120.718,
                145.265,
                80.771,
                130.979,
                115.699,
                127.979,
            ],
        ),
    ],
)
def test_clean_pictures_are_clean_fid_s(tiles, expected):
    pixels = np.tile(
        (np.arange(30 * 40 * 3) ** 2 % 251).astype(np.uint8).reshape(30, 40, 3), (tiles, tiles, 1)
    )
    found = resize_clean(pil_to_tensor(Image.fromarray(pixels)))
    assert found.dtype == torch.float32  # not rounded to 8 bits
    assert found[1, ::75, ::99].flatten().tolist() == pytest.approx(expected, abs=6e-4)


def test_features_are_tried_when_they_are_loaded(inception_weights):
    """Weights that give non-finite features are refused; other than the published ones are never
    comparable.
    """
    assert (
        load_extractor(f"inception:{inception_weights}", "cpu", "clean").name
        == "InceptionV3 with other weights"
    )
    state = torch.load(inception_weights, weights_only=True)
    state["Mixed_7c.branch1x1.conv.weight"].fill_(float("inf"))
    torch.save(state, inception_weights)
    with pytest.raises(UserError, match="non-finite"):
        load_extractor(f"inception:{inception_weights}", "cpu", "clean")


def test_inception_weights_are_not_unpickled_freely(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"fc.bias": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"hostile\.pth") as error:
        load_extractor(f"inception:{tmp_path / 'hostile.pth'}", "cpu", "legacy")
    assert not (tmp_path / "executed").exists() and "\n" not in str(error.value)


def test_distances_to_real_pictures(tiny_config, tmp_path, real_images, capsys):
    """FID and company on a classifier's features are those of the folders' features; the broken
    file is named.
    """
    argv = flags(
        tiny_config,
        class_index=3,
        train=True,
        evaluate=True,
        num_train_epochs=1,
        test_size=6,
        real_images=real_images,
        features=tiny_config.classifier,
    )
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "skipped 1 of 10" in err and "9.jpg" in err
    assert (
        "6 generated against 9 real pictures" in out and "not comparable with published FIDs" in out
    )
    distances = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())[
        "distribution"
    ]
    classifier = load_classifier(tiny_config.classifier, "cpu")

    @torch.no_grad()
    def extract_features(files):
        return torch.cat(
            [
                classifier.model.vit(classifier.preprocess(load_images([file]))).last_hidden_state[
                    :, 0
                ]
                for file in files
            ]
        )

    real = extract_features(sorted(real_images.rglob("[0-8].jpg")))
    generated = extract_features(sorted(next((tmp_path / "img").rglob("eval/with")).glob("*.png")))
    assert distances["with"]["fid"] == pytest.approx(
        frechet_distance(pool_features([real], 9), pool_features([generated], 6)), rel=1e-3
    )
    assert distances["with"]["coverage"] == measure_prdc(real, generated)["coverage"]
    assert "with" in distances and "real" not in distances  # too few real ones to set some aside


@pytest.fixture
def pixel_extractor() -> Extractor:
    return Extractor("pixels", lambda image: image[:, :2, :2], lambda batch: batch.flatten(1))


@pytest.fixture
def noise_files(tmp_path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(40)]
    save_pixels(
        to_pixels(torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))), files
    )
    return files


def test_unequal_numbers_of_real_pictures_are_noted(pixel_extractor, noise_files, tmp_path):
    """Two classes, eight generated pictures each; the note tells when the real ones weigh
    otherwise.
    """
    arms = {"without": noise_files[:16], "with": noise_files[4:20]}
    notes = [
        fidelity_table(measure_fidelity(pixel_extractor, arms, real, tmp_path / "cache")).note
        for real in ([noise_files[:9], noise_files[9:20]], [noise_files[:10], noise_files[10:20]])
    ]
    assert "Classes have 9 to 11 real pictures" in notes[0] and "Classes have" not in notes[1]
    assert all("needs twice as many real pictures" in note for note in notes)


def test_the_ceiling_is_real_pictures_against_others(pixel_extractor, noise_files, tmp_path):
    """Where a class has enough, as many as are generated are set aside and measured like generated
    ones.
    """
    arms = {"without": noise_files[:8], "with": noise_files[8:16]}
    found = measure_fidelity(
        pixel_extractor, arms, [noise_files[16:28], noise_files[28:]], tmp_path / "cache"
    )
    assert (found["real"]["generated_images"], found["with"]["real_images"]) == (8, 16)
    table = fidelity_table(found)
    assert (
        table.header == ["by pixels", "without", "with", "real"] and "The ceiling" not in table.note
    )
    assert table.rows[0][0] == "fid" and len(table.rows) == 7


def test_distances_name_their_counts(pixel_extractor, noise_files):
    features = extract_files(pixel_extractor, noise_files)
    real, generated = pool_features([features[:24]], 24), pool_features([features[24:]], 16)
    found = measure_distances(real, generated)
    assert (found["real_images"], found["generated_images"], found["kid_subset_size"]) == (
        24,
        16,
        8,
    )
    assert found["fid"] == frechet_distance(real, generated)


def test_fids_of_few_pictures_or_other_features_are_not_comparable(
    pixel_extractor, noise_files, tmp_path
):
    inception = pixel_extractor._replace(name="InceptionV3", fid_mode="legacy")
    assert find_comparable(inception, 2048) == "torch-fidelity"
    assert find_comparable(inception._replace(fid_mode="clean"), 2048) == "clean-fid"
    assert find_comparable(inception, 2047) is None
    assert find_comparable(pixel_extractor, 2048) is None
    found = measure_fidelity(inception, {"with": noise_files[:16]}, [noise_files[16:]], tmp_path)
    assert "not comparable with published FIDs" in fidelity_table(found).note
    found["comparable_with"] = "clean-fid"
    assert "comparable with FIDs by clean-fid" in fidelity_table(found).note


def test_features_of_real_pictures_are_extracted_once(pixel_extractor, noise_files, tmp_path):
    """Until one of their class is replaced, or other features are asked for."""
    generated, classes = noise_files[:6], []
    for name, files in (("few", noise_files[6:16]), ("many", noise_files[16:])):
        (tmp_path / name).mkdir()
        classes.append([Path(shutil.copy(file, tmp_path / name)) for file in files])
    prepared, found = [], []

    def count_prepared(extractor: Extractor) -> int:
        prepared.clear()
        counting = extractor._replace(
            prepare=lambda image: prepared.append(image) or extractor.prepare(image)
        )
        distances = measure_fidelity(counting, {"with": generated}, classes, tmp_path / "cache")
        found.append(distances["with"])
        return len(prepared) - len(generated)

    assert count_prepared(pixel_extractor) == 34
    assert count_prepared(pixel_extractor) == 0
    assert found[0] == found[1]
    classes[0][3].touch()
    assert count_prepared(pixel_extractor) == 10
    assert count_prepared(pixel_extractor._replace(identity=["others"])) == 34


def test_a_sample_is_noted(pixel_extractor, noise_files, tmp_path):
    conditions = {"with": noise_files[:16]}
    found = measure_fidelity(pixel_extractor, conditions, [noise_files[16:]], tmp_path / "cache")
    assert found["with"]["sampled_for_kid_and_prdc"] == [24, 16]
    assert "random samples" not in fidelity_table(found).note
    found["with"]["sampled_for_kid_and_prdc"] = [12, 11]
    assert "random samples: 11 generated, 12 real" in fidelity_table(found).note
    for key in ("sampled_for_kid_and_prdc", "fid_mode"):  # a summary of earlier code has none
        found.pop(key, found["with"].pop(key, None))
    assert "random samples" not in fidelity_table(found).note


def test_a_torchscript_inception_is_told_by_its_name(tmp_path):
    """clean-fid's own file: torch's advice, to drop weights_only, would run its code."""

    class Network(torch.nn.Module):
        def forward(self, images):
            return images

    torch.jit.save(torch.jit.script(Network()), tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(
        UserError, match="05.pt' is TorchScript.*weights-inception-2015-12-05-67"
    ) as raised:
        load_extractor(f"inception:{tmp_path / 'inception-2015-12-05.pt'}", "cpu", "clean")
    assert "weights_only" not in str(raised.value)
