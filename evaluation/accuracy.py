"""What classifiers see in folders of PNG: a class's metrics.json, made by `judge_class`, and tables over classes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from evaluation.images import ARMS, MORE_ARMS, ORACLE, digest_json
from evaluation.read_image import load_images, read_image
from evaluation.statistics import Proportion, count_right, mcnemar_test, pool_proportions
from evaluation.tables import Table
from models.batch_size import fit_batch_size
from models.classifiers import Classifier
from prompt_datasets import TargetClass, class_number, class_title, prompt_folder
from system.text_files import read_json
from utils import UserError, broken_file_error, import_function, join_lines, require

ALIKE = ("model", "height", "width", "guidance_scale", "guidance_rescale", "num_inference_steps", "mixed_precision")


@dataclass(frozen=True)
class Judgement:
    """What a judge sees in one arm's pictures of a class."""

    accuracy: Proportion
    top5: Proportion
    mean_target_probability: float
    predicted_instead: dict[str, int]  # class title: pictures, the most frequent first
    right: list[bool]  # in the order of the seeds


def load_metrics(path: Path) -> dict:
    """A class's metrics.json, with all that the tables read; a UserError where it is truncated or not ours."""
    found = read_json(path, "class_index", "label", "classes", "images", "judges", "contexts", "pictures", "evaluation",
                      "film", "held_out", "settings", *ARMS)
    try:
        for pair in (found, *found["contexts"].values()):
            for role in found["judges"]:
                before_and_after([pair], role)
    except (KeyError, TypeError, AttributeError) as error:
        raise broken_file_error(path, f"without {error}") from error
    return found


def list_differences(found: dict, other: dict) -> list[str]:
    """In what two classes' evaluations differ, where they must not to stand in one table."""
    ways = [{"test_size": metrics["images"], "classifier or evaluator": metrics["judges"],
             "eval_prompts": list(metrics["contexts"]),
             "controls or oracle_names": [arm in metrics for arm in MORE_ARMS],
             **{name: metrics["settings"].get(name) for name in ALIKE}} for metrics in (found, other)]
    differences = [name for name in ways[0] if ways[0][name] != ways[1][name]]
    lists = {metrics["list_of_classes"] for metrics in (found, other) if "list_of_classes" in metrics}
    if len(lists) > 1:  # the same numbers are other classes
        differences.append("list of classes")
    return differences


def predict_probabilities(classifier: Classifier, paths: list[Path], batch_size: int) -> torch.Tensor:
    """The classifier's probabilities [N, C] of PNG files, `batch_size` at a time."""
    return torch.cat([classifier(load_images(paths[i:i + batch_size]).to(classifier.device)).softmax(1).cpu()
                      for i in range(0, len(paths), batch_size)])


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], index: int) -> Judgement:
    """Which of these PNG files `classifier` takes for class `index` (from 0), and what it sees instead."""
    probabilities = fit_batch_size(predict_probabilities, None, 32)(classifier, paths)  # 32 at first
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    right = likeliest[:, 0] == index
    others = Counter(class_title(class_number(i), classifier.labels[i]) for i in likeliest[~right, 0].tolist())
    return Judgement(count_right(right.tolist()), count_right((likeliest == index).any(1).tolist()),
                     probabilities[:, index].mean().item(), dict(others.most_common()), right.tolist())


def check_context_judge(context_judge: str):
    """Raise UserError where `context_judge` (module:function) fails of a grey picture: now, not after the drawing."""
    judge = import_function(context_judge, "context_judge")
    try:
        words = judge(Image.new("RGB", (64, 64), "grey"))
    except Exception as error:  # a user's function raises what it raises
        raise UserError(f"context_judge '{context_judge}' fails of a grey picture: {type(error).__name__} "
                        f"{join_lines(error)[:200]}") from error
    require(words is None or isinstance(words, str),
            f"context_judge '{context_judge}' returns {type(words).__name__}, and must return words or None")


def measure_context(context_judge: str, template: str, files: list[Path]) -> Proportion:
    """The share of pictures in which `context_judge` (module:function) sees what `template` asks for."""
    seen = [import_function(context_judge, "context_judge")(read_image(file)) for file in files]
    return count_right(bool(words) and words.lower() in template.lower() for words in seen)


def judge_class(judges: dict[str, Classifier], target: TargetClass, arms: list[str], eval_prompts: list[str],
                context_judge: str | None, folder: Path, images: int, **record) -> dict:
    """What metrics.json says of pictures <arm>/<seed>.png in `folder`: {arm: {role: Judgement}}, and `record`."""
    def list_files(arm: str) -> list[Path]:
        return [folder / arm / f"{seed}.png" for seed in range(images)]

    def judge_arms(arms: Iterable[str], parent: str = "") -> dict:
        seen = {arm: {role: asdict(judge_images(judge, list_files(parent + arm), target.index))
                      for role, judge in judges.items()} for arm in arms}
        return {**seen, "mcnemar_p": {role: mcnemar_test(*(seen[arm][role]["right"] for arm in ARMS))[2]
                                      for role in judges}}

    contexts = {}
    for prompt in eval_prompts:
        parent = f"prompts/{prompt_folder(prompt)}/"
        contexts[prompt] = judge_arms(ARMS, parent)
        if context_judge:
            contexts[prompt]["context_kept"] = {
                arm: asdict(measure_context(context_judge, prompt, list_files(parent + arm))) for arm in ARMS}
    labels = judges["classifier"].labels
    return {"class_index": target.number, "label": target.label, "classes": len(labels),
            "list_of_classes": digest_json(labels)[:16], "images": images,
            "judges": {role: judge.name for role, judge in judges.items()}, "contexts": contexts,
            **record, **judge_arms(arms), "seeds": [0, images - 1]}


def pool_shares(found: list[dict]) -> Proportion:
    """All samples together of shares as metrics.json has them."""
    return pool_proportions(Proportion(share["successes"], share["count"]) for share in found)


def pool_accuracy(pairs: list[dict], arm: str, role: str, measure: str = "accuracy") -> Proportion:
    """All classes' pictures of one arm together."""
    return pool_shares([pair[arm][role][measure] for pair in pairs])


def before_and_after(pairs: list[dict], role: str, measure: str = "accuracy") -> str:
    return " -> ".join(str(pool_accuracy(pairs, arm, role, measure)) for arm in ARMS)


def describe_gain(metrics: dict, role: str) -> str:
    """One class's accuracy without -> with the token."""
    return " -> ".join(f"{metrics[arm][role]['accuracy']['value']:.2f}" for arm in ARMS)


def describe_change(metrics: list[dict], role: str) -> str:
    """How many pictures of all classes the token put right and wrong, and McNemar's test whether that is chance."""
    gained, lost, p = mcnemar_test(*([right for found in metrics for right in found[arm][role]["right"]]
                                     for arm in ARMS))
    return f"{gained} and {lost}, " + (f"p = {p:.2g}" if p > 1e-300 else "p < 1e-300")


def accuracy_table(metrics: list[dict]) -> Table:
    """One row per class, accuracy without -> with by every judge, and all images together last."""
    roles = list(metrics[0]["judges"])
    table = Table(["", "class", *(f"by the {role}" for role in roles),
                   f"without the token also seen as (by the {roles[-1]})"], [], "Accuracy by class")
    for found in metrics:
        instead = list(found["without"][roles[-1]]["predicted_instead"].items())[:2]
        table.rows.append([found["class_index"], found["label"], *(describe_gain(found, role) for role in roles),
                           ", ".join(f"{title}: {n}" for title, n in instead)])
    table.rows.append(["", "all", *(before_and_after(metrics, role) for role in roles), ""])
    if metrics[0]["classes"] > 5:
        table.rows.append(["", "all, in the top 5", *(before_and_after(metrics, role, "top5") for role in roles), ""])
    table.rows.append(["", "put right, put wrong", *(describe_change(metrics, role) for role in roles),
                       "McNemar's test"])
    table.rows.extend(["", "other words (oracle)" if arm == ORACLE else f"{arm} token",
                       *(pool_accuracy(metrics, arm, role) for role in roles), ""]
                      for arm in MORE_ARMS if arm in metrics[0])
    return table


def contexts_table(metrics: list[dict]) -> Table:
    """One row per prompt: accuracy of all classes together, and how often the picture shows what the prompt adds."""
    roles = list(metrics[0]["judges"])
    table = Table(["prompt", *(f"by the {role}" for role in roles), "context kept"], [], "In other prompts")
    for prompt in metrics[0]["contexts"]:
        pairs = [found["contexts"][prompt] for found in metrics]
        kept = [str(pool_shares([pair["context_kept"][arm] for pair in pairs])) for arm in ARMS
                if "context_kept" in pairs[0]]
        table.rows.append([prompt, *(before_and_after(pairs, role) for role in roles), " -> ".join(kept)])
    return table
