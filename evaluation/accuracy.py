"""Accuracy: what classifiers see in folders of PNG, of one class and over classes."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from evaluation.drawing import BETTER_WORDS, MORE_CONDITIONS, PAIR, digest_json
from evaluation.metrics import ClassMetrics, Conditions, Judgement, PromptMetrics, compare_pair
from evaluation.read_image import load_images, read_image
from evaluation.statistics import Proportion, count_right, mcnemar_test, pool_proportions
from evaluation.tables import Table
from models.batch_size import fit_batch_size
from models.classifiers import Classifier
from prompt_datasets import TargetClass, class_number, class_title, prompt_folder
from utils import UserError, import_function, join_lines, require

JUDGED_AT_ONCE = 32  # pictures, at first
TOP = 5
INSTEAD = 2  # other classes that the table names
# Settings that classes of one table share.
ALIKE = (
    "model",
    "height",
    "width",
    "guidance_scale",
    "guidance_rescale",
    "num_inference_steps",
    "mixed_precision",
)


def list_differences(found: ClassMetrics, other: ClassMetrics) -> list[str]:
    """List how two classes' evaluations differ where they must agree to share a table."""
    way, other_way = describe_way(found), describe_way(other)
    differences = [name for name in way if way[name] != other_way[name]]
    lists = {found.list_of_classes, other.list_of_classes} - {None}
    if len(lists) > 1:  # the same numbers are other classes
        differences.append("list of classes")
    return differences


def describe_way(metrics: ClassMetrics) -> dict:
    """Describe how a class was evaluated, by the settings that affect it."""
    more = [condition for condition in MORE_CONDITIONS if condition in metrics.conditions]
    way = {
        "test_size": metrics.images,
        "classifier or evaluator": metrics.judges,
        "eval_prompts": list(metrics.contexts),
        "controls or oracle_names": more,
    }
    for name in ALIKE:
        way[name] = metrics.settings.get(name)
    return way


def predict_probabilities(
    classifier: Classifier, paths: list[Path], batch_size: int
) -> torch.Tensor:
    """Compute the classifier's probabilities [N, C] of PNG files, `batch_size` at a time."""
    parts = []
    for start in range(0, len(paths), batch_size):
        images = load_images(paths[start : start + batch_size]).to(classifier.device)
        parts.append(classifier(images).softmax(1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], index: int) -> Judgement:
    """Judge which PNG files `classifier` assigns to class `index` (from 0), and the others."""
    predict = fit_batch_size(predict_probabilities, None, JUDGED_AT_ONCE)
    probabilities = predict(classifier, paths)
    likeliest = probabilities.topk(min(TOP, probabilities.shape[1])).indices
    right = likeliest[:, 0] == index
    instead = Counter()
    for i in likeliest[~right, 0].tolist():
        instead[class_title(class_number(i), classifier.labels[i])] += 1
    return Judgement(
        accuracy=count_right(right.tolist()),
        top5=count_right((likeliest == index).any(1).tolist()),
        mean_target_probability=probabilities[:, index].mean().item(),
        predicted_instead=dict(instead.most_common()),
        right=right.tolist(),
    )


def check_context_judge(context_judge: str):
    """Raise UserError where `context_judge` (module:function) fails on a grey picture.

    This is found before drawing, not after.
    """
    judge = import_function(context_judge, "context_judge")
    try:
        words = judge(Image.new("RGB", (64, 64), "grey"))
    except Exception as error:  # a user's function raises what it raises
        reason = f"{type(error).__name__} {join_lines(error)[:200]}"
        raise UserError(
            f"context_judge '{context_judge}' fails on a grey picture: {reason}"
        ) from error
    require(
        words is None or isinstance(words, str),
        f"context_judge '{context_judge}' returns {type(words).__name__}; it must return words or "
        "None",
    )


def measure_context(context_judge: str, template: str, files: list[Path]) -> Proportion:
    """Measure the share of pictures in which `context_judge` (module:function) sees the context."""
    judge = import_function(context_judge, "context_judge")
    kept = []
    for file in files:
        words = judge(read_image(file))
        kept.append(bool(words) and words.lower() in template.lower())
    return count_right(kept)


def judge_conditions(
    judges: dict[str, Classifier],
    target: TargetClass,
    conditions: Iterable[str],
    folder: Path,
    images: int,
) -> Conditions:
    """Return what every judge sees in the pictures <condition>/<seed>.png in `folder`."""
    found: Conditions = {}
    for condition in conditions:
        files = list_files(folder / condition, images)
        found[condition] = {}
        for role, judge in judges.items():
            found[condition][role] = judge_images(judge, files, target.index)
    return found


def list_files(folder: Path, images: int) -> list[Path]:
    """List the pictures of the first `images` seeds."""
    return [folder / f"{seed}.png" for seed in range(images)]


def judge_prompt(
    judges: dict[str, Classifier],
    target: TargetClass,
    prompt: str,
    context_judge: str | None,
    folder: Path,
    images: int,
) -> PromptMetrics:
    """Judge the pictures without and with the token in another prompt."""
    folder = folder / "prompts" / prompt_folder(prompt)
    conditions = judge_conditions(judges, target, PAIR, folder, images)
    kept = {}
    if context_judge:
        for condition in PAIR:
            files = list_files(folder / condition, images)
            kept[condition] = measure_context(context_judge, prompt, files)
    return PromptMetrics(conditions, compare_pair(conditions), kept)


def judge_class(
    judges: dict[str, Classifier],
    target: TargetClass,
    conditions: list[str],
    eval_prompts: list[str],
    context_judge: str | None,
    folder: Path,
    images: int,
    **record,
) -> ClassMetrics:
    """Judge a class's pictures in `folder`; `record` holds the other fields of metrics.json."""
    contexts = {}
    for prompt in eval_prompts:
        contexts[prompt] = judge_prompt(judges, target, prompt, context_judge, folder, images)
    seen = judge_conditions(judges, target, conditions, folder, images)
    labels = judges["classifier"].labels
    return ClassMetrics(
        class_index=target.number,
        label=target.label,
        classes=len(labels),
        images=images,
        judges={role: judge.name for role, judge in judges.items()},
        conditions=seen,
        mcnemar_p=compare_pair(seen),
        contexts=contexts,
        list_of_classes=digest_json(labels)[:16],
        **record,
    )


def pool_accuracy(
    parts: Iterable[Conditions], condition: str, role: str, measure: str = "accuracy"
) -> Proportion:
    """Pool all classes' pictures of one condition; `measure` is 'accuracy' or 'top5'."""
    return pool_proportions(getattr(part[condition][role], measure) for part in parts)


def before_and_after(parts: list[Conditions], role: str, measure: str = "accuracy") -> str:
    """Format the accuracy of all classes' pictures: without -> with the token."""
    return " -> ".join(str(pool_accuracy(parts, condition, role, measure)) for condition in PAIR)


def describe_gain(metrics: ClassMetrics, role: str) -> str:
    """Format one class's accuracy: without -> with the token."""
    values = [metrics.conditions[condition][role].accuracy.value for condition in PAIR]
    return " -> ".join(f"{value:.2f}" for value in values)


def describe_change(parts: list[Conditions], role: str) -> str:
    """Describe how many pictures the token turned right and wrong, and McNemar's test."""
    right = {}
    for condition in PAIR:
        right[condition] = []
        for part in parts:
            right[condition] += part[condition][role].right
    gained, lost, p = mcnemar_test(right["without"], right["with"])
    chance = f"p = {p:.2g}" if p > 1e-300 else "p < 1e-300"
    return f"{gained} and {lost}, {chance}"


def accuracy_table(metrics: list[ClassMetrics]) -> Table:
    """Make a table of accuracies without -> with: a row per class, the pooled row last."""
    first = metrics[0]
    roles = list(first.judges)
    parts = [found.conditions for found in metrics]
    by_roles = [f"by the {role}" for role in roles]
    last_column = f"without the token also seen as (by the {roles[-1]})"
    table = Table(["", "class", *by_roles, last_column], [], "Accuracy by class")
    for found in metrics:
        gains = [describe_gain(found, role) for role in roles]
        instead = found.conditions["without"][roles[-1]].predicted_instead
        named = [f"{title}: {count}" for title, count in list(instead.items())[:INSTEAD]]
        table.rows.append([found.class_index, found.label, *gains, ", ".join(named)])

    def add_row(name: str, cells: list, last: str = ""):
        table.rows.append(["", name, *cells, last])

    add_row("all", [before_and_after(parts, role) for role in roles])
    if first.classes > TOP:
        add_row("all, in the top 5", [before_and_after(parts, role, "top5") for role in roles])
    changes = [describe_change(parts, role) for role in roles]
    add_row("put right, put wrong", changes, "McNemar's test")
    for condition in MORE_CONDITIONS:
        if condition in first.conditions:
            name = "better words" if condition == BETTER_WORDS else f"{condition} token"
            add_row(name, [pool_accuracy(parts, condition, role) for role in roles])
    return table


def contexts_table(metrics: list[ClassMetrics]) -> Table:
    """Make a table: a row per prompt, pooled accuracy, and how often its context shows."""
    roles = list(metrics[0].judges)
    by_roles = [f"by the {role}" for role in roles]
    table = Table(["prompt", *by_roles, "context kept"], [], "In other prompts")
    for prompt in metrics[0].contexts:
        contexts = [found.contexts[prompt] for found in metrics]
        parts = [context.conditions for context in contexts]
        gains = [before_and_after(parts, role) for role in roles]
        kept = []
        if contexts[0].context_kept:
            for condition in PAIR:
                shares = [context.context_kept[condition] for context in contexts]
                kept.append(str(pool_proportions(shares)))
        table.rows.append([prompt, *gains, " -> ".join(kept)])
    return table
