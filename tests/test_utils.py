"""Files that are whole or not there, and images that come back from them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from utils import load_images, replace_file, save_pixels, to_pixels


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with replace_file(file) as temporary:
        temporary.write_text("whole")
    with pytest.raises(RuntimeError), replace_file(file) as temporary:
        temporary.write_text("hal")
        raise RuntimeError
    assert file.read_text() == "whole" and [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_images_come_back_to_the_nearest_level(tmp_path):
    images = torch.rand(2, 3, 5, 7)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    save_pixels(to_pixels(images), paths)
    assert (load_images(paths) - images).abs().max() <= 0.5 / 255 + 1e-6


def test_two_threads_may_write_one_file(tmp_path):
    """An update that is tried again with a smaller batch writes its pictures while the first try's are on their way."""
    together = threading.Barrier(2)

    def write(text):
        with replace_file(tmp_path / "file") as temporary:
            temporary.write_text(text)
            together.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one", "two")))
    assert (tmp_path / "file").read_text() in ("one", "two") and len(list(tmp_path.iterdir())) == 1
