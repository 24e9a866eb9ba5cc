"""Checkpoints that cannot be opened or downloaded: one line that says what to do."""

import logging
import pickle
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
from system.terminal import print_warning, show_step
from utils import WITHOUT_GPU_OR_NETWORK, UserError, join_lines, require, to_printable

SHOWN = 3  # keys that a message names
NO_REMOTE_CODE = {"trust_remote_code": False}  # left open, transformers asks the user
# what did not arrive is told, not raised
REPORTED = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}


@contextmanager
def opening_checkpoint(name: str, source: str | None = None, instead: str = WITHOUT_GPU_OR_NETWORK):
    """Turn whatever goes wrong in opening a checkpoint into one line that says what to do.

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
    def is_caused_by(*kinds) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    first = _first_line(causes[0])
    if is_caused_by(ImportError):
        return first
    if is_caused_by(pickle.UnpicklingError):  # whose text advises to execute what the file holds
        first = "a file of it holds code or objects besides tensors, which are not loaded"
    source = source.removeprefix("local-dir:")  # timm's
    path = find_path(source)
    if path:
        if path.is_file():
            return f"it is a broken file, or not of the right kind: {first}"
        return f"the folder lacks a file or holds a broken one: {first}"
    if is_caused_by(HFValidationError):
        return NO_SUCH_FOLDER

    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, URLError)
    if is_caused_by(GatedRepoError):
        reason = (
            f"its owner asks for a login: accept the terms at huggingface.co/{source}, then run "
            "`hf auth login`;"
        )
    elif is_caused_by(RepositoryNotFoundError):
        reason = (
            "no such folder here and no such model on the hub; check the spelling, or run "
            "`hf auth login` where it is private;"
        )
    elif set(answers) & {401, 403}:
        reason = (
            "the hub refuses your access: run `hf auth login` with a token that may read gated "
            "repositories;"
        )
    elif answers:
        reason = f"the hub answered with status {answers[0]}; try again later,"
    elif is_caused_by(*offline) or any(_is_transport_error(cause) for cause in causes):
        reason = NOT_DOWNLOADED
    else:
        reason = (
            f"{first} (half downloaded, perhaps: remove it from ~/.cache/huggingface and connect);"
        )
    return f"{reason} {instead}"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, and the next if it ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0].endswith(":") else 1
    return join_lines(" ".join(lines[:count])).rstrip(".")


def _is_transport_error(error: BaseException) -> bool:
    """The hub's HTTP library has changed its name before; its connection errors have not."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def build_network(cls, source: str, dtype: torch.dtype = torch.float32, **where):
    """Build a network from its config alone, on the meta device: shapes but no values."""
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
    """Load a classifier's transformers network in float32; on the meta device `build_network`.

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
    """Load one network of a pipeline: its fp16 files for fp16, else the full ones.

    The other kind if that is missing. On the meta device by `build_network`.

    Raises:
        UserError: see `check_weights`.
    """
    if device == "meta":
        return build_network(cls, source, dtype, subfolder=part)
    # diffusers, transformers
    named = {"torch_dtype" if hasattr(cls, "load_config") else "dtype": dtype}
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
    mismatched = []
    for key, stored, wanted in report["mismatched_keys"]:
        mismatched.append(f"{key} {list(stored)} instead of {list(wanted)}")
    missing = []
    for key in report["missing_keys"]:
        if not key.endswith("num_batches_tracked"):  # a count, no weights
            missing.append(key)
    unexpected = report["unexpected_keys"]
    cause = "its config and its weights do not belong together"
    if any("base_layer" in key or "lora" in key for key in unexpected):
        cause = "it was saved with an adapter inside: save it again without"
    for what, keys in (("lacks", missing), ("holds in other shapes", mismatched)):
        require(not keys, f"the checkpoint {what} {list_first(keys)}: {cause}")
    unknown = [key for key in unexpected if not key.endswith("position_ids")]  # a count, no weights
    if unknown:
        print_warning(
            f"'{source}' holds weights that its config does not describe and that are not used: "
            f"{list_first(unknown)}"
        )


def list_first(keys) -> str:
    """List the first few keys, for a message."""
    shown = to_printable(", ".join(sorted(keys)[:SHOWN]))
    if len(keys) > SHOWN:
        shown += f" and {len(keys) - SHOWN} more"
    return shown
