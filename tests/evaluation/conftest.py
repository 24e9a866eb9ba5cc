"""Real pictures of a class, and InceptionV3 with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


@pytest.fixture
def real_images(tmp_path):
    """Ten odd-sized pictures of a tiger cat, one of them broken."""
    folder = tmp_path / "real" / "tiger cat"
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 256, (10, 3))
    for i, colour in enumerate(colours):
        Image.new("RGB", (30 + i, 40 - i), tuple(colour.tolist())).save(folder / f"{i}.jpg")
    (folder / "9.jpg").write_bytes(b"not a picture")
    return tmp_path / "real"


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
