"""Checks before torch is imported: whether checkpoints can be had."""

import os
import sys
from dataclasses import replace
from typing import NamedTuple

from config import RunConfig
from models.hub import answers_within, explain_missing, find_cached_file
from models.labels import list_alternatives, resolve_name
from system.paths import find_path
from utils import WITHOUT_GPU_OR_NETWORK, require

HUB_SECONDS = 3.0  # without an answer for so long, the hub cannot be reached
OFFLINE = "HF_HUB_OFFLINE"  # where it is set, no library asks the hub


class HubCheckpoint(NamedTuple):
    """A setting's value and the hub id that it stands for."""

    name: str
    source: str
    file: str | None  # one that every copy has; None where only timm knows the hub id
    instead: str  # what to give where it cannot be had


def check_checkpoints(config: RunConfig):
    """Where the hub does not answer, tell so to all libraries, which would ask it again and again.

    Raises:
        UserError: a checkpoint that is neither on this disk nor to be downloaded.
    """
    wanted = list_hub_checkpoints(config)
    if not wanted or hub_answers():
        return
    is_asked_for = is_offline()
    os.environ[OFFLINE] = "1"
    for checkpoint in wanted:
        name, source = checkpoint.name, checkpoint.source
        called = f"'{name}'" if name == source else f"'{name}' ({source})"
        require(
            checkpoint.file is None or find_cached_file(source, checkpoint.file),
            f"cannot open {called}: {explain_missing(source)} {checkpoint.instead}",
        )
    if not is_asked_for:
        print("the hub does not answer: checkpoints are taken from this disk", file=sys.stderr)


def list_hub_checkpoints(config: RunConfig) -> list[HubCheckpoint]:
    """The checkpoints that this command opens and that are no path on this disk."""
    found = []
    draws = config.train or config.evaluate or config.estimate
    if draws and not find_path(config.model):
        found.append(
            HubCheckpoint(config.model, config.model, "model_index.json", WITHOUT_GPU_OR_NETWORK)
        )
    classifiers = [config.classifier]
    if config.evaluate and config.evaluator:
        classifiers.append(config.evaluator)
    if config.evaluate and config.real_images and not config.features.startswith("inception"):
        classifiers.append(config.features)
    for name in classifiers:
        kind, source = resolve_name(name)
        if source.startswith("local-dir:"):
            continue
        file = None if kind == "timm" and not source.startswith("hf-hub:") else "config.json"
        source = source.removeprefix("hf-hub:")
        if file is None or not find_path(source):
            found.append(HubCheckpoint(name, source, file, list_alternatives(name)))
    return found


def pin_checkpoints(config: RunConfig) -> RunConfig:
    """The settings with the commit of every hub checkpoint: someone/model@1a2b..."""
    from models.pins import pin_checkpoint  # here: it imports torch

    pinned = {
        "model": pin_checkpoint(config.model),
        "classifier": pin_checkpoint(config.classifier),
    }
    if config.evaluate and config.evaluator:
        pinned["evaluator"] = pin_checkpoint(config.evaluator)
    if config.evaluate and config.real_images and not config.features.startswith("inception"):
        pinned["features"] = pin_checkpoint(config.features)
    return replace(config, **pinned)


def is_offline() -> bool:
    """Whether the user has told the hub's library not to ask."""
    return os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def hub_answers() -> bool:
    if is_offline():
        return False
    return answers_within(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), HUB_SECONDS)
