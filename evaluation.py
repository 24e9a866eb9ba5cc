"""Draw the same seeds without and with the token, and measure what classifiers see; both meet in folders of PNG."""

from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from class_token import spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, encode_prompts
from prompt_datasets import TEMPLATES
from training import draw
from utils import load_images, save_images, write_json

ARMS = ("without", "with")


@torch.no_grad()
def generate(config: RunConfig, components: Components, class_name: str, token_id: int, vector: torch.Tensor,
             folder: Path):
    """Write folder/without/<seed>.png and folder/with/<seed>.png for seeds 0 to test_size - 1, by the full sampler."""
    jobs = [(arm, seed) for arm in ARMS for seed in range(config.test_size)]
    phrase = {"without": class_name, "with": f"{config.placeholder_token} {class_name}"}
    with tqdm(total=len(jobs), desc=f"drawing {class_name}", unit="image") as bar:
        for start in range(0, len(jobs), config.batch_size):
            batch = jobs[start:start + config.batch_size]
            with spliced(components.text_encoder, token_id, vector.to(components.device)):
                prompt_embeds = encode_prompts(components, [TEMPLATES[0].format(phrase[arm]) for arm, _ in batch])
            images = draw(config, components, prompt_embeds, [seed for _, seed in batch])
            save_images(images, [folder / arm / f"{seed}.png" for arm, seed in batch])
            bar.update(len(batch))


@torch.no_grad()
def judge_folder(classifier: Classifier, folder: Path, class_index: int, batch_size: int) -> dict:
    """What `classifier` says of the PNG files in `folder`: accuracy, mean target probability, what it saw instead."""
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    device = next(classifier.model.parameters()).device
    probabilities = torch.cat([classifier(load_images(paths[i:i + batch_size]).to(device)).softmax(1).cpu()
                               for i in range(0, len(paths), batch_size)])  # [N, C]
    predicted = probabilities.argmax(1)
    others = Counter(classifier.labels[i] for i in predicted.tolist() if i != class_index)
    return {"accuracy": (predicted == class_index).float().mean().item(),
            "mean_target_probability": probabilities[:, class_index].mean().item(),
            "predicted_instead": dict(others.most_common())}


def evaluate_folder(config: RunConfig, judges: dict[str, Classifier], class_index: int, folder: Path) -> dict:
    """Judge folder/{without,with} by every judge {role: classifier}; write and return metrics.json."""
    classifier = judges["classifier"]
    metrics = {
        "class_index": class_index + 1, "label": classifier.labels[class_index], "images": config.test_size,
        "seeds": [0, config.test_size - 1], "judges": {role: judge.name for role, judge in judges.items()},
        **{arm: {role: judge_folder(judge, folder / arm, class_index, config.batch_size)
                 for role, judge in judges.items()} for arm in ARMS}}
    write_json(folder / "metrics.json", metrics)
    return metrics


def table(all_metrics: list[dict]) -> str:
    """One line a class, accuracy without -> with by every judge, and the mean over the classes last."""
    roles = list(all_metrics[0]["judges"])
    head = ["", "class", *(f"{role} without with".replace("classifier", "guiding") for role in roles), "seen instead"]
    rows = []
    for metrics in all_metrics:
        judge = roles[-1]
        instead = metrics["without"][judge]["predicted_instead"]
        rows.append([str(metrics["class_index"]), metrics["label"],
                     *(f"{metrics['without'][role]['accuracy']:.2f} -> {metrics['with'][role]['accuracy']:.2f}"
                       for role in roles), ", ".join(f"{label} {n}" for label, n in list(instead.items())[:2])])
    means = ["mean" if i == 1 else "" for i in range(2)]
    for role in roles:
        before, after = (sum(m[arm][role]["accuracy"] for m in all_metrics) / len(all_metrics) for arm in ARMS)
        means.append(f"{before:.2f} -> {after:.2f}")
    lines = [head, *rows, [*means, ""]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
