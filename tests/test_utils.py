"""What a person is told when a checkpoint cannot be opened, from the libraries' own exceptions; files; images."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from urllib.error import URLError

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from opening import opening
from utils import UserError, load_images, replacing, save_images

http = import_module(HTTPError.__module__.split(".")[0])  # httpx, or what took its place in the hub's client


def answer(status):
    return http.Response(status, request=http.Request("GET", "https://hub"))


@pytest.mark.parametrize("error, sentence", [
    (GatedRepoError("gated", response=answer(403)), "accept the terms at huggingface.co/own/model, then run `hf auth"),
    (RepositoryNotFoundError("none", response=answer(404)), "no such model on the hub; check the spelling"),
    (HfHubHTTPError("forbidden", response=answer(403)), "refuses your access: run `hf auth login`"),
    (HfHubHTTPError("busy", response=answer(503)), "the hub answered with status 503; try again later"),
    (HFValidationError("Repo id must be ..."), "no such folder, and no hub id either"),
    (LocalEntryNotFoundError("not cached"), "not downloaded yet and the hub cannot be reached"),
    (OfflineModeIsEnabled("offline"), "not downloaded yet and the hub cannot be reached"),
    (URLError("[Errno -2] Name or service not known"), "not downloaded yet and the hub cannot be reached"),
    (http.ConnectError("refused"), "not downloaded yet and the hub cannot be reached"),
    (http.ProxyError("proxy"), "not downloaded yet and the hub cannot be reached"),
    (RuntimeError("size mismatch\nfor 12 tensors"), "cannot open 'name' (own/model): size mismatch (half downloaded"),
])
@pytest.mark.parametrize("wrapped", [False, True])
def test_one_right_line(error, sentence, wrapped):
    """Alone, or wrapped in the OSError that transformers and diffusers make of it."""
    with pytest.raises(UserError) as raised, opening("name", "own/model"):
        if not wrapped:
            raise error
        try:
            raise error
        except Exception as cause:
            raise (RuntimeError(str(error)) if isinstance(error, RuntimeError) else OSError("Can't load it")) from cause
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_refused_access_behind_a_missing_entry():
    """The hub's client wraps a refused token in 'not cached'; the refusal is what matters."""
    with pytest.raises(UserError, match="refuses your access"), opening("own/model"):
        raise LocalEntryNotFoundError("not cached") from HfHubHTTPError("forbidden", response=answer(403))


def test_a_folder_with_a_broken_file(tmp_path):
    with pytest.raises(UserError, match="the folder lacks a file or holds a broken one: bad header"), \
            opening(str(tmp_path)):
        raise Exception("bad header.")


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with replacing(file) as temporary:
        temporary.write_text("whole")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("hal")
        raise RuntimeError
    assert file.read_text() == "whole" and [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_images_come_back_to_the_nearest_level(tmp_path):
    images = torch.rand(2, 3, 5, 7)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    save_images(images, paths)
    assert (load_images(paths) - images).abs().max() <= 0.5 / 255 + 1e-6


def test_two_threads_may_write_one_file(tmp_path):
    """An update that is tried again with a smaller batch writes its pictures while the first try's are on their way."""
    together = threading.Barrier(2)

    def write(text):
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text(text)
            together.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one", "two")))
    assert (tmp_path / "file").read_text() in ("one", "two") and len(list(tmp_path.iterdir())) == 1
