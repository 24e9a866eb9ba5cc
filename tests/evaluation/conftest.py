"""Real pictures of a class."""

import numpy as np
import pytest
from PIL import Image


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
