"""Distances to real pictures: features against torch-fidelity's and the classifier's own, and what the notes say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.fidelity import (
    Extractor,
    extract_files,
    fidelity_table,
    load_extractor,
    measure_distances,
    measure_fidelity,
)
from evaluation.statistics import frechet_distance, measure_prdc
from models.classifiers import load_classifier
from run import main
from tests.test_run import flags
from utils import UserError, load_images, save_pixels, to_pixels


class RandomInception(FeatureExtractorInceptionV3):
    """torch-fidelity's network with the weights that it was made with."""

    def load_state_dict(self, state_dict, **_):
        pass


@pytest.fixture
def inception_weights(tmp_path):
    """A file in the format of torch-fidelity's weights, random."""
    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    network = RandomInception("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_features_are_torch_fidelity_s(inception_weights, tmp_path):
    """From a file of weights, of pictures that Pillow, which resizes with antialiasing, brought to 299 x 299."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array).resize((640, 400), Image.BICUBIC) for array in pixels]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    ours = extract_files(load_extractor(f"inception:{inception_weights}", "cpu"), files)
    reference = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
    resized = np.stack([np.asarray(picture.resize((299, 299), Image.BICUBIC)) for picture in pictures])
    theirs, = reference(torch.from_numpy(resized).permute(0, 3, 1, 2))
    assert ours.shape == (2, 2048)
    assert (ours - theirs).norm() < 0.05 * (theirs[0] - theirs[1]).norm()


def test_inception_weights_are_not_unpickled_freely(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"fc.bias": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"hostile\.pth") as error:
        load_extractor(f"inception:{tmp_path / 'hostile.pth'}", "cpu")
    assert not (tmp_path / "executed").exists() and "\n" not in str(error.value)


def test_distances_to_real_pictures(tiny_config, tmp_path, real_images, capsys):
    """FID and company on a classifier's features are those of the folders' features; the broken file is named."""
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "1",
                 "--test_size", "6", "--real_images", str(real_images), "--features", tiny_config.classifier)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "warning: skipped 1 of 10 real pictures, which cannot be read" in err and "9.jpg" in err
    assert "6 generated against 9 real pictures" in out and "not comparable with published FIDs" in out
    distances = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())["distribution"]
    classifier = load_classifier(tiny_config.classifier, "cpu")

    @torch.no_grad()
    def extract_features(files):
        return torch.cat([classifier.model.vit(classifier.preprocess(load_images([file]))).last_hidden_state[:, 0]
                          for file in files])

    real = extract_features(sorted(real_images.rglob("[0-8].jpg")))
    generated = extract_features(sorted(next((tmp_path / "img").rglob("eval/with")).glob("*.png")))
    assert distances["with"]["fid"] == pytest.approx(frechet_distance(real, generated), rel=1e-3)
    assert distances["with"]["coverage"] == measure_prdc(real, generated)["coverage"]
    assert "with" in distances and "real" not in distances  # too few real ones to set some aside


@pytest.fixture
def pixel_extractor() -> Extractor:
    return Extractor("pixels", lambda image: image[:, :2, :2], lambda batch: batch.flatten(1))


@pytest.fixture
def noise_files(tmp_path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(40)]
    save_pixels(to_pixels(torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))), files)
    return files


def test_unequal_numbers_of_real_pictures_are_noted(pixel_extractor, noise_files):
    """Two classes, eight generated pictures each; the note tells when the real ones weigh otherwise."""
    arms = {"without": noise_files[:16], "with": noise_files[4:20]}
    notes = [fidelity_table(measure_fidelity(pixel_extractor, arms, real)).note
             for real in ([noise_files[:9], noise_files[9:20]], [noise_files[:10], noise_files[10:20]])]
    assert "Classes have 9 to 11 real pictures" in notes[0] and "Classes have" not in notes[1]
    assert all("needs twice as many real pictures" in note for note in notes)


def test_the_ceiling_is_real_pictures_against_others(pixel_extractor, noise_files):
    """Where a class has enough, as many as are generated are set aside and measured like generated ones."""
    arms = {"without": noise_files[:8], "with": noise_files[8:16]}
    found = measure_fidelity(pixel_extractor, arms, [noise_files[16:28], noise_files[28:]])
    assert (found["real"]["generated_images"], found["with"]["real_images"]) == (8, 16)
    table = fidelity_table(found)
    assert table.header == ["by pixels", "without", "with", "real"] and "The ceiling" not in table.note
    assert table.rows[0][0] == "fid" and len(table.rows) == 7


def test_distances_name_their_counts(pixel_extractor, noise_files):
    features = extract_files(pixel_extractor, noise_files)
    found = measure_distances(features[:24], features[24:])
    assert (found["real_images"], found["generated_images"], found["kid_subset_size"]) == (24, 16, 8)
    assert found["fid"] == frechet_distance(features[:24], features[24:])


def test_fids_of_few_pictures_or_other_features_are_not_comparable(pixel_extractor, noise_files, monkeypatch):
    monkeypatch.setattr("evaluation.fidelity.COMPARABLE_FID", 16)
    inception = pixel_extractor._replace(name="InceptionV3")

    def is_comparable(extractor: Extractor, real: int, generated: int) -> bool:
        arms = {"with": noise_files[:generated]}
        return measure_fidelity(extractor, arms, [noise_files[16:16 + real]])["comparable_with_published_fids"]

    assert is_comparable(inception, 16, 16)
    assert not is_comparable(inception, 15, 16) and not is_comparable(inception, 16, 15)
    assert not is_comparable(pixel_extractor, 16, 16)
