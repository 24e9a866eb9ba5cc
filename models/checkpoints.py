"""Checkpoints that cannot be opened or downloaded: whatever the libraries raise, one line that says
what to do.
"""

import logging
import pickle
import sys
import warnings
from contextlib import contextmanager
from urllib.error import URLError

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig

from models.hub import NO_SUCH_FOLDER, NOT_DOWNLOADED, locate_source
from system.paths import find_path
from system.terminal import show_step
from utils import WITHOUT_GPU_OR_NETWORK, UserError, join_lines, require, to_printable

NO_REMOTE_CODE = {"trust_remote_code": False}  # left open, transformers asks the user
REPORTED = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}  # what did not arrive is told, not raised


@contextmanager
def opening_checkpoint(name: str, source: str | None = None, instead: str = WITHOUT_GPU_OR_NETWORK):
    """Turn whatever goes wrong while a checkpoint is opened or downloaded into one line that says
    what to do.

    `source` is the folder or hub id that `name` stands for, `instead` what to do without it.
    Library messages below critical are held back.

    Raises:
        UserError: a gated, private or missing repository, no network, a folder with missing or
            broken files.
    """
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), show_step(f"opening {to_printable(name)}"):
            warnings.simplefilter("ignore")
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise a dozen kinds, some straight from Exception
        causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        source = source or name
        called = f"'{name}'" if source in (name, str(find_path(name))) else f"'{name}' ({source})"
        raise UserError(
            f"cannot open {called}: {_explain_causes(source, causes, instead)}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _explain_causes(source: str, causes: list[BaseException], instead: str) -> str:
    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    lines = str(causes[0]).strip().splitlines() or [type(causes[0]).__name__]
    first = join_lines(" ".join(lines[:2] if lines[0].endswith(":") else lines[:1])).rstrip(".")
    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    # the hub's HTTP library has changed its name before; its connection errors have not
    unreachable = any(
        kind.__name__ == "TransportError" for cause in causes for kind in type(cause).__mro__
    )
    if caused_by(ImportError):
        return first
    if caused_by(pickle.UnpicklingError):  # whose text advises to execute what the file holds
        first = "a file of it holds code or objects besides tensors, which are not loaded"
    source = source.removeprefix("local-dir:")  # timm's
    if find_path(source):
        return (
            f"it is a broken file, or not of the right kind: {first}"
            if find_path(source).is_file()
            else f"the folder lacks a file or holds a broken one: {first}"
        )
    if caused_by(HFValidationError):
        return NO_SUCH_FOLDER
    if caused_by(GatedRepoError):
        reason = (
            f"its owner asks for a login: accept the terms at huggingface.co/{source}, then run `hf"
            " auth login`;"
        )
    elif caused_by(RepositoryNotFoundError):
        reason = (
            "no such folder here and no such model on the hub; check the spelling, or run `hf auth"
            " login` where it is private;"
        )
    elif set(answers) & {401, 403}:
        reason = (
            "the hub refuses your access: run `hf auth login` with a token that may read gated"
            " repositories;"
        )
    elif answers:
        reason = f"the hub answered with status {answers[0]}; try again later,"
    elif unreachable or caused_by(
        LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, URLError
    ):
        reason = NOT_DOWNLOADED
    else:
        reason = (
            f"{first} (half downloaded, perhaps: remove it from ~/.cache/huggingface and connect);"
        )
    return f"{reason} {instead}"


def build_network(cls, source: str, dtype: torch.dtype = torch.float32, **where):
    """A network of diffusers or transformers from its config alone, on the meta device: shapes and
    no values.
    """
    with torch.device("meta"):
        if hasattr(cls, "load_config"):  # diffusers
            network = cls.from_config(cls.load_config(**locate_source(source), **where))
        elif hasattr(cls, "config_class"):
            network = cls(cls.config_class.from_pretrained(**locate_source(source), **where))
        else:  # an Auto class of transformers
            config = AutoConfig.from_pretrained(**locate_source(source), **NO_REMOTE_CODE)
            network = cls.from_config(config, **NO_REMOTE_CODE)
    return network.to(dtype)


def load_network(cls, source: str, device: str):
    """A classifier's network of transformers in float32; on the meta device by `build_network`.

    Raises:
        UserError: see `check_weights`.
    """
    if device == "meta":
        return build_network(cls, source)
    network, report = cls.from_pretrained(
        **locate_source(source), dtype=torch.float32, **REPORTED, **NO_REMOTE_CODE
    )
    check_weights(source, report)
    return network


def load_part(cls, source: str, part: str, device: str, dtype: torch.dtype):
    """One network of a pipeline: its fp16 files for fp16, else the full ones; the other kind where
    that is missing.

    On the meta device by `build_network`.

    Raises:
        UserError: see `check_weights`.
    """
    if device == "meta":
        return build_network(cls, source, dtype, subfolder=part)
    named = {
        "torch_dtype" if hasattr(cls, "load_config") else "dtype": dtype
    }  # diffusers, transformers
    variants = ("fp16", None) if dtype == torch.float16 else (None, "fp16")
    errors = []
    for variant in variants:
        try:
            network, report = cls.from_pretrained(
                **locate_source(source), subfolder=part, variant=variant, **REPORTED, **named
            )
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        check_weights(f"{source}/{part}", report)
        return network
    raise errors[variants.index(None)]


def check_weights(source: str, report: dict):
    """Warn of weights that were not used, by the report of transformers or diffusers (REPORTED).

    Raises:
        UserError: weights that are missing or of another shape, and would be left at random.
    """
    mismatched = [
        f"{key} {list(stored)} instead of {list(wanted)}"
        for key, stored, wanted in report["mismatched_keys"]
    ]
    missing = [
        key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")
    ]  # no weights
    adapted = any(
        part in key for key in report["unexpected_keys"] for part in ("base_layer", "lora")
    )
    cause = (
        "it was saved with an adapter inside: save it again without"
        if adapted
        else "its config and its weights do not belong together"
    )
    for what, keys in (("lacks", missing), ("holds in other shapes", mismatched)):
        require(not keys, f"the checkpoint {what} {list_first(keys)}: {cause}")
    unknown = [
        key for key in report["unexpected_keys"] if not key.endswith("position_ids")
    ]  # a count, no weights
    if unknown:
        print(
            f"warning: '{source}' holds weights that its config does not know, which are not used: "
            f"{list_first(unknown)}",
            file=sys.stderr,
        )


def list_first(keys) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return to_printable(", ".join(sorted(keys)[:3])) + more
