"""What classifiers see in folders of PNG: a class's metrics.json, and the tables over classes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from evaluation.images import ARMS, CONTROLS
from evaluation.statistics import Proportion, count_right, mcnemar_test, pool_proportions
from evaluation.tables import Table
from models.batch_size import fit_batch_size
from models.classifiers import Classifier
from prompt_datasets import TargetClass, class_title, prompt_folder
from utils import broken_file_error, import_function, load_images, read_image, read_json, write_json

JUDGED_AT_ONCE = 32


@dataclass(frozen=True)
class Judgement:
    """What a judge sees in one arm's pictures of a class."""

    accuracy: Proportion
    top5: Proportion
    mean_target_probability: float
    predicted_instead: dict[str, int]  # class title: pictures, the most frequent first
    right: list[bool]  # in the order of the seeds


Pair = dict[str, dict[str, Judgement]]  # {arm: {role of the judge: what it sees}}


@dataclass
class ClassMetrics:
    """The measurements of one class, as metrics.json has them."""

    class_index: int  # from 1
    label: str
    classes: int  # that the classifier knows
    images: int  # per arm
    judges: dict[str, str]  # {role: name}
    arms: Pair
    contexts: dict[str, Pair]  # by prompt
    context_kept: dict[str, dict[str, Proportion]]  # {prompt: {arm: share of pictures that show what it adds}}
    pictures: str  # digest of how the pictures without and with were drawn
    evaluation: str  # digest of all that decides these measurements
    film: list[str]
    held_out: bool  # the token's file says which seeds training used
    settings: dict

    def save_metrics(self, path: Path):
        found = asdict(self)
        arms, kept = found.pop("arms"), found.pop("context_kept")
        for prompt, pair in found["contexts"].items():
            pair |= {"mcnemar_p": paired_p_values(self.contexts[prompt])}
            pair |= {"context_kept": kept[prompt]} if prompt in kept else {}
        write_json(path, {**found, **arms, "mcnemar_p": paired_p_values(self.arms), "seeds": [0, self.images - 1]})


def load_metrics(path: Path) -> ClassMetrics:
    """What `save_metrics` wrote.

    Raises:
        UserError: truncated, or not ours.
    """
    found = read_json(path, "class_index", "judges", "contexts", *ARMS)
    try:
        found["arms"] = read_pair(found)
        found["context_kept"] = {
            prompt: {arm: read_proportion(share) for arm, share in pair["context_kept"].items()}
            for prompt, pair in found["contexts"].items() if "context_kept" in pair}
        found["contexts"] = {prompt: read_pair(pair) for prompt, pair in found["contexts"].items()}
        return ClassMetrics(**{entry.name: found[entry.name] for entry in fields(ClassMetrics)})
    except (KeyError, TypeError, AttributeError) as error:
        raise broken_file_error(path, f"without {error}") from error


def read_proportion(found: dict) -> Proportion:
    return Proportion(found["successes"], found["count"])


def read_pair(found: dict) -> Pair:
    return {arm: {role: Judgement(**{**seen, "accuracy": read_proportion(seen["accuracy"]),
                                     "top5": read_proportion(seen["top5"])}) for role, seen in found[arm].items()}
            for arm in (*ARMS, *CONTROLS) if arm in found}


def paired_p_values(pair: Pair) -> dict[str, float]:
    """By role of the judge: McNemar's p-value that the token changes nothing on the same seeds."""
    before, after = (pair[arm] for arm in ARMS)
    return {role: mcnemar_test(before[role].right, after[role].right)[2] for role in before}


def predict_probabilities(classifier: Classifier, paths: list[Path], batch_size: int) -> torch.Tensor:
    """The classifier's probabilities [N, C] of PNG files, `batch_size` at a time."""
    return torch.cat([classifier(load_images(paths[i:i + batch_size]).to(classifier.device)).softmax(1).cpu()
                      for i in range(0, len(paths), batch_size)])


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], index: int) -> Judgement:
    """Which of these PNG files `classifier` takes for class `index` (from 0), and what it sees instead."""
    probabilities = fit_batch_size(predict_probabilities, None, JUDGED_AT_ONCE)(classifier, paths)
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    right = likeliest[:, 0] == index
    others = Counter(class_title(i, classifier.labels[i]) for i in likeliest[~right, 0].tolist())
    return Judgement(count_right(right.tolist()), count_right((likeliest == index).any(1).tolist()),
                     probabilities[:, index].mean().item(), dict(others.most_common()), right.tolist())


def measure_context(context_judge: str, template: str, files: list[Path]) -> Proportion:
    """The share of pictures in which `context_judge` (module:function) sees what `template` asks for."""
    seen = [import_function(context_judge, "context_judge")(read_image(file)) for file in files]
    return count_right(bool(words) and words.lower() in template.lower() for words in seen)


def judge_class(judges: dict[str, Classifier], target: TargetClass, arms: list[str], eval_prompts: list[str],
                context_judge: str | None, folder: Path, images: int, **record) -> ClassMetrics:
    """Judge the pictures of every arm's folder under `folder` by every judge {role: classifier}.

    `record` fills the remaining fields of ClassMetrics.
    """
    def list_files(arm: str) -> list[Path]:
        return [folder / arm / f"{seed}.png" for seed in range(images)]

    judged = {arm: {role: judge_images(judge, list_files(arm), target.index) for role, judge in judges.items()}
              for arm in arms}
    prompts = {prompt: {arm: f"prompts/{prompt_folder(prompt)}/{arm}" for arm in ARMS} for prompt in eval_prompts}
    kept = {prompt: {arm: measure_context(context_judge, prompt, list_files(path)) for arm, path in folders.items()}
            for prompt, folders in prompts.items()} if context_judge else {}
    return ClassMetrics(
        target.number, target.label, len(judges["classifier"].labels), images,
        {role: judge.name for role, judge in judges.items()},
        {arm: judged[arm] for arm in (*ARMS, *CONTROLS) if arm in judged},
        {prompt: {arm: judged[path] for arm, path in folders.items()} for prompt, folders in prompts.items()},
        kept, **record)


def pool_accuracy(judged: Iterable[dict[str, Judgement]], role: str, top5: bool = False) -> Proportion:
    """All classes' pictures of one arm together."""
    return pool_proportions(by_role[role].top5 if top5 else by_role[role].accuracy for by_role in judged)


def before_and_after(pairs: list[Pair], role: str, top5: bool = False) -> str:
    return " -> ".join(str(pool_accuracy((pair[arm] for pair in pairs), role, top5)) for arm in ARMS)


def describe_change(metrics: list[ClassMetrics], role: str) -> str:
    """How many pictures of all classes the token put right and wrong, and McNemar's test whether that is chance."""
    gained, lost, p = mcnemar_test(*([right for found in metrics for right in found.arms[arm][role].right]
                                     for arm in ARMS))
    return f"{gained} and {lost}, " + (f"p = {p:.2g}" if p > 1e-300 else "p < 1e-300")


def accuracy_table(metrics: list[ClassMetrics]) -> Table:
    """One row per class, accuracy without -> with by every judge, and all images together last."""
    roles = list(metrics[0].judges)
    table = Table(["", "class", *(f"by the {role}" for role in roles),
                   f"without the token also seen as (by the {roles[-1]})"], [], "Accuracy by class")
    for found in metrics:
        instead = list(found.arms["without"][roles[-1]].predicted_instead.items())[:2]
        shares = [" -> ".join(f"{found.arms[arm][role].accuracy.value:.2f}" for arm in ARMS) for role in roles]
        table.rows.append([found.class_index, found.label, *shares, ", ".join(f"{title}: {n}" for title, n in instead)])
    pairs = [found.arms for found in metrics]
    table.rows.append(["", "all", *(before_and_after(pairs, role) for role in roles), ""])
    if metrics[0].classes > 5:
        table.rows.append(["", "all, in the top 5", *(before_and_after(pairs, role, top5=True) for role in roles), ""])
    table.rows.append(["", "put right, put wrong", *(describe_change(metrics, role) for role in roles),
                       "McNemar's test"])
    for control in CONTROLS:
        if control in pairs[0]:
            table.rows.append(["", f"{control} token",
                               *(pool_accuracy((pair[control] for pair in pairs), role) for role in roles), ""])
    return table


def contexts_table(metrics: list[ClassMetrics]) -> Table:
    """One row per prompt: accuracy of all classes together, and how often the picture shows what the prompt adds."""
    roles = list(metrics[0].judges)
    table = Table(["prompt", *(f"by the {role}" for role in roles), "context kept"], [], "In other prompts")
    for prompt in metrics[0].contexts:
        kept = [str(pool_proportions(found.context_kept[prompt][arm] for found in metrics)) for arm in ARMS
                if prompt in metrics[0].context_kept]
        table.rows.append([prompt, *(before_and_after([found.contexts[prompt] for found in metrics], role)
                                     for role in roles), " -> ".join(kept)])
    return table
