"""A class's metrics.json: what judges see in its pictures; read and written only here."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.drawing import MORE_CONDITIONS, PAIR
from evaluation.statistics import Proportion, mcnemar_test
from system.text_files import read_json
from utils import broken_file_error, write_json


@dataclass(frozen=True)
class Judgement:
    """What a judge sees in a class's pictures of one condition."""

    accuracy: Proportion
    top5: Proportion
    mean_target_probability: float
    predicted_instead: dict[str, int]  # class title: pictures, the most frequent first
    right: list[bool]  # in the order of the seeds


Conditions = dict[str, dict[str, Judgement]]  # by condition, then by role of the judge


@dataclass(frozen=True)
class PromptMetrics:
    """A class's pictures in one prompt."""

    conditions: Conditions
    mcnemar_p: dict[str, float]  # by role
    context_kept: dict[str, Proportion] = field(default_factory=dict)  # by condition


@dataclass(frozen=True)
class ClassMetrics:
    """The evaluation of one class."""

    class_index: int  # its number, from 1
    label: str
    classes: int  # that the classifier knows
    images: int  # of each condition
    judges: dict[str, str]  # role: name
    conditions: Conditions  # in the first prompt
    mcnemar_p: dict[str, float]  # by role
    contexts: dict[str, PromptMetrics]  # by the prompts of --eval_prompts
    film: list[str]  # folders of the pictures over the updates
    held_out: bool  # whether training is known not to have used these seeds
    settings: dict[str, Any]  # of the evaluation
    pictures: str  # digest of all that decides the pictures of PAIR
    evaluation: str  # digest of all that decides this file
    list_of_classes: str | None = None  # digest of the classifier's labels; old files have none
    nearest_words: dict[str, list[str]] | None = None  # before and after training


def compare_pair(conditions: Conditions) -> dict[str, float]:
    """Compute, by role, McNemar's p-value that the token changed nothing."""
    without, with_token = (conditions[condition] for condition in PAIR)
    found = {}
    for role in without:
        _, _, found[role] = mcnemar_test(without[role].right, with_token[role].right)
    return found


def save_metrics(path: Path, metrics: ClassMetrics):
    """Write metrics.json."""
    write_json(path, asdict(metrics))


def load_metrics(path: Path) -> ClassMetrics:
    """Load a class's metrics.json, of this version or an earlier one.

    Raises:
        UserError: a file that is truncated or not ours.
    """
    return parse_metrics(path, read_json(path))


def parse_metrics(path: Path, found: dict) -> ClassMetrics:
    """Parse what the file `path` holds; see `load_metrics`."""
    try:
        roles = list(found["judges"])
        first = parse_prompt(found, roles)
        contexts = {}
        for prompt, of_prompt in found["contexts"].items():
            contexts[prompt] = parse_prompt(of_prompt, roles)
        return ClassMetrics(
            class_index=found["class_index"],
            label=found["label"],
            classes=found["classes"],
            images=found["images"],
            judges=found["judges"],
            conditions=first.conditions,
            mcnemar_p=first.mcnemar_p,
            contexts=contexts,
            film=found["film"],
            held_out=found["held_out"],
            settings=found["settings"],
            pictures=found["pictures"],
            evaluation=found["evaluation"],
            list_of_classes=found.get("list_of_classes"),
            nearest_words=found.get("nearest_words"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise broken_file_error(path, f"without {error}") from error


def parse_prompt(found: dict, roles: Iterable[str]) -> PromptMetrics:
    """Parse one prompt's pictures; older files have the conditions beside the other fields."""
    by_condition = found.get("conditions", found)
    conditions = {}
    for name in (*PAIR, *MORE_CONDITIONS):
        if name in by_condition or name in PAIR:
            seen = by_condition[name]
            conditions[name] = {role: parse_judgement(seen[role]) for role in roles}
    kept = {}
    for name, share in found.get("context_kept", {}).items():
        kept[name] = parse_proportion(share)
    mcnemar_p = found.get("mcnemar_p") or compare_pair(conditions)
    return PromptMetrics(conditions, mcnemar_p, kept)


def parse_judgement(found: dict) -> Judgement:
    """Parse a Judgement from JSON."""
    return Judgement(
        parse_proportion(found["accuracy"]),
        parse_proportion(found["top5"]),
        found["mean_target_probability"],
        found["predicted_instead"],
        found["right"],
    )


def parse_proportion(found: dict) -> Proportion:
    """Parse a Proportion from JSON."""
    return Proportion(found["successes"], found["count"])
