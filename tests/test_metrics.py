"""Measurements against independent ones: torch-fidelity, scipy, statsmodels' formulas by hand, brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from distribution import comparable, features_of, load_extractor
from metrics import frechet_distance, kernel_distance, mcnemar, prdc, wilson
from utils import UserError


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 12, generator=generator)
    return real, torch.randn(300, 12, generator=generator) * 1.3 + 0.4


@pytest.mark.parametrize("successes, count", [(0, 10), (3, 10), (50, 50), (400, 800)])
def test_wilson_is_its_formula(successes, count):
    p, z = successes / count, 1.959963984540054
    middle, scale = p + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    value, low, high = wilson(successes, count)
    assert (value, low, high) == pytest.approx((p, (middle - half) / scale, (middle + half) / scale), abs=1e-9)


def test_mcnemar_is_the_exact_binomial():
    before = torch.tensor([1] * 20 + [0] * 30).bool()
    after = torch.tensor([1] * 18 + [0] * 2 + [1] * 12 + [0] * 18).bool()  # 12 gained, 2 lost
    assert mcnemar(before, after) == pytest.approx(2 * binom.cdf(2, 14, 0.5))
    assert mcnemar(before, before) == 1.0


def test_fid_equals_torch_fidelity(features):
    statistics = [fid_features_to_statistics(part) for part in features]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*features) == pytest.approx(theirs, rel=1e-3)
    assert abs(frechet_distance(features[0], features[0])) < 1e-3


def test_kid_equals_torch_fidelity(features):
    theirs = kid_features_to_metric(*features, kid_subsets=100, kid_subset_size=150, verbose=False, rng_seed=1)
    mean, std, size = kernel_distance(*features, subset_size=150)
    assert size == 150 and kernel_distance(*features)[2] == 150  # half of the smaller side: subsets must differ
    assert abs(mean - theirs["kernel_inception_distance_mean"]) < std / 3
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.4)
    assert kernel_distance(*features) == kernel_distance(*features)


def test_prdc_equals_brute_force(features):
    real, generated, k = features[0][:40], features[1][:30], 5

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real, generated = real.double().tolist(), generated.double().tolist()
    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, i) for i in range(len(generated))]
    inside = [[math.dist(r, g) < real_radii[i] for g in generated] for i, r in enumerate(real)]
    precision = sum(any(row[j] for row in inside) for j in range(len(generated))) / len(generated)
    recall = sum(any(math.dist(r, g) < generated_radii[j] for j, g in enumerate(generated)) for r in real) / len(real)
    density = sum(map(sum, inside)) / (k * len(generated))
    coverage = sum(any(row) for row in inside) / len(real)
    ours = prdc(torch.tensor(real), torch.tensor(generated), k)
    assert ours == pytest.approx((precision, recall, density, coverage))
    assert 0 < ours.coverage < 1


@pytest.mark.parametrize("measure", [prdc, frechet_distance])
def test_too_few_images_are_refused(features, measure):
    with pytest.raises(ValueError, match="not 400 and 1"):
        measure(features[0], features[1][:1])


def test_fid_keeps_its_digits_where_float32_would_not(features):
    """Shifting both sides far off changes nothing."""
    real, generated = (part.double() for part in features)
    assert frechet_distance(real + 3e4, generated + 3e4) == pytest.approx(frechet_distance(real, generated), rel=1e-6)


def test_fids_of_few_pictures_or_other_features_are_not_comparable():
    assert comparable("InceptionV3", 2048, 5000)
    assert not comparable("InceptionV3", 5000, 800) and not comparable("miniature_evaluator", 5000, 5000)


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file in the format of torch-fidelity's weights, random."""
    with monkeypatch.context() as without_weights:
        without_weights.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: None)
        without_weights.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_features_are_torch_fidelitys(inception_weights, tmp_path):
    """From a file of weights, of pictures that Pillow, which resizes with antialiasing, brought to 299 x 299."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).resize((640, 400), Image.BICUBIC) for each in pixels]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    ours = features_of(load_extractor(f"inception:{inception_weights}", "cpu"), files)
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
