"""Checkpoints of the Hugging Face hub: what is on this disk, and whether the hub answers.

Imports nothing slow: missing checkpoints are reported before torch is imported.
"""

import functools
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from system.paths import find_path, split_revision
from utils import require

COMMIT = "[0-9a-f]{40}"
# one of them
OF_EVERY_COPY = (
    "model_index.json",
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
)
NOT_DOWNLOADED = (
    "it is not downloaded yet and the hub cannot be reached; connect once, or give the path of a "
    "copy;"
)
NO_SUCH_FOLDER = (
    "no such folder, and no hub id either (the miniature's weights come from `make miniature`)"
)


def is_hub_id(source: str) -> bool:
    """Return whether `source` can be a hub repository, and is not an existing path.

    It may have a revision.
    """
    place, _ = split_revision(source)
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII) is not None and not find_path(
        place
    )


def locate_source(source: str) -> dict[str, str]:
    """Return the arguments with which `from_pretrained` finds a folder, or a hub id and revision.

    Raises:
        UserError: a folder with a revision.
    """
    place, revision = split_revision(source)
    if revision is None:
        return {"pretrained_model_name_or_path": source}
    require(
        not find_path(place),
        f"'{source}': '{place}' is a folder here, and only hub ids have revisions",
    )
    return {"pretrained_model_name_or_path": place, "revision": revision}


@functools.cache
def find_commit(hub_id: str) -> str | None:
    """Find the commit that a hub id stands for now; the one on this disk if no hub answers.

    Asked once per process, so that all parts of a checkpoint have one commit.
    """
    place, revision = split_revision(hub_id)
    if revision and re.fullmatch(COMMIT, revision):
        return revision
    from huggingface_hub import HfApi  # here: it takes 0.3 s

    try:
        return HfApi().model_info(place, revision=revision).sha
    except Exception:  # the hub's library and the one below it raise their own kinds
        for file in OF_EVERY_COPY:
            cached = find_cached_file(hub_id, file)
            if cached:
                return cached.parent.name
        raise


def explain_missing(source: str) -> str:
    """Explain why a checkpoint that is neither on this disk nor downloadable cannot be opened."""
    return NOT_DOWNLOADED if is_hub_id(source) else NO_SUCH_FOLDER


def find_cached_file(hub_id: str, file: str) -> Path | None:
    """Find a file of a hub repository on this disk; None if it was never downloaded.

    Imports huggingface_hub, which then decides once and for all whether to work offline.
    """
    if not is_hub_id(hub_id):
        return None
    from huggingface_hub import try_to_load_from_cache  # here: it takes 0.3 s

    place, revision = split_revision(hub_id)
    found = try_to_load_from_cache(place, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def answers_within(address: str, seconds: float) -> bool:
    """Return whether a server answers at a web address, whatever it says, within `seconds`."""
    answered = threading.Event()

    def ask_server():
        request = urllib.request.Request(address, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # other clients may know its certificate
                return
        except OSError:
            return
        answered.set()

    # looking up a name has no limit of its own, hence the thread
    thread = threading.Thread(target=ask_server, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
