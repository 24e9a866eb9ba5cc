"""What the user is told when a checkpoint cannot be opened, from the libraries' own exceptions."""

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

from models.checkpoints import opening_checkpoint
from utils import UserError

# httpx, or what took its place in the hub's client
http = import_module(HTTPError.__module__.split(".")[0])


def answer(status):
    return http.Response(status, request=http.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            GatedRepoError("gated", response=answer(403)),
            "accept the terms at huggingface.co/own/model, then run `hf auth",
        ),
        (
            RepositoryNotFoundError("none", response=answer(404)),
            "check the spelling",
        ),
        (
            HfHubHTTPError("forbidden", response=answer(403)),
            "refuses your access: run `hf auth login`",
        ),
        (
            HfHubHTTPError("busy", response=answer(503)),
            "status 503",
        ),
        (HFValidationError("Repo id must be ..."), "no such folder"),
        (LocalEntryNotFoundError("not cached"), "hub cannot be reached"),
        (OfflineModeIsEnabled("offline"), "hub cannot be reached"),
        (
            URLError("[Errno -2] Name or service not known"),
            "hub cannot be reached",
        ),
        (http.ConnectError("refused"), "hub cannot be reached"),
        (http.ProxyError("proxy"), "hub cannot be reached"),
        (
            RuntimeError("size mismatch\nfor 12 tensors"),
            "cannot open 'name' (own/model): size mismatch (half downloaded",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_error_is_one_line(error, sentence, wrapped):
    """Alone, or wrapped in the OSError that transformers and diffusers make of it."""
    with pytest.raises(UserError) as raised, opening_checkpoint("name", "own/model"):
        if not wrapped:
            raise error
        try:
            raise error
        except Exception as cause:
            raise (
                RuntimeError(str(error))
                if isinstance(error, RuntimeError)
                else OSError("Can't load it")
            ) from cause
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_refused_access_behind_a_missing_entry():
    """The hub's client wraps a refused token in 'not cached'; the refusal is the cause."""
    with pytest.raises(UserError, match="refuses your access"), opening_checkpoint("own/model"):
        raise LocalEntryNotFoundError("not cached") from HfHubHTTPError(
            "forbidden", response=answer(403)
        )


def test_folder_with_a_broken_file(tmp_path):
    with (
        pytest.raises(UserError, match="bad header"),
        opening_checkpoint(str(tmp_path)),
    ):
        raise Exception("bad header.")


def test_memory_that_runs_out_is_no_broken_file(tmp_path):
    """Entry points say what helps."""
    with pytest.raises(torch.OutOfMemoryError), opening_checkpoint(str(tmp_path)):
        raise torch.OutOfMemoryError("CUDA out of memory")
