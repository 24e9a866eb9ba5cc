"""Draw the same seeds without and with the token, and measure what classifiers see; both meet in folders of PNG."""

from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from class_token import spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, encode_prompts, generate_images
from prompt_datasets import TEMPLATES, class_title
from utils import load_images, save_images, write_json

ARMS = ("without", "with")


@torch.no_grad()
def generate(config: RunConfig, components: Components, class_index: int, class_name: str, token_id: int,
             vector: torch.Tensor, folder: Path):
    """Write folder/without/<seed>.png and folder/with/<seed>.png for seeds 0 to test_size - 1, by the full sampler."""
    jobs = [(arm, seed) for arm in ARMS for seed in range(config.test_size)]
    phrase = {"without": class_name, "with": f"{config.placeholder_token} {class_name}"}
    with tqdm(total=len(jobs), desc=f"drawing {class_title(class_index, class_name)}", unit="image") as bar:
        for start in range(0, len(jobs), config.batch_size):
            batch = jobs[start:start + config.batch_size]
            with spliced(components.text_encoder, token_id, vector.to(components.device)):
                prompt_embeds = encode_prompts(components, [TEMPLATES[0].format(phrase[arm]) for arm, _ in batch])
            images = generate_images(components, prompt_embeds, [seed for _, seed in batch], config.height,
                                     config.width, config.guidance_scale, config.num_inference_steps)
            save_images(images, [folder / arm / f"{seed}.png" for arm, seed in batch])
            bar.update(len(batch))


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], class_index: int, batch_size: int) -> dict:
    """What `classifier` says of these PNG files: accuracy, mean target probability, what it saw instead."""
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
    labels = judges["classifier"].labels
    names = [f"{seed}.png" for seed in range(config.test_size)]
    metrics = {
        "class_index": class_index + 1, "label": labels[class_index], "images": config.test_size,
        "seeds": [0, config.test_size - 1], "judges": {role: judge.name for role, judge in judges.items()},
        **{arm: {role: judge_images(judge, [folder / arm / name for name in names], class_index, config.batch_size)
                 for role, judge in judges.items()} for arm in ARMS}}
    write_json(folder / "metrics.json", metrics)
    return metrics


def table(all_metrics: list[dict]) -> str:
    """One line a class, accuracy without -> with by every judge, and the mean over the classes last."""
    roles = list(all_metrics[0]["judges"])
    head = ["", "class", *(f"by the {role}" for role in roles), "without the token also seen as"]
    rows = []
    for metrics in all_metrics:
        instead = metrics["without"][roles[-1]]["predicted_instead"]
        rows.append([str(metrics["class_index"]), metrics["label"],
                     *(f"{metrics['without'][role]['accuracy']:.2f} -> {metrics['with'][role]['accuracy']:.2f}"
                       for role in roles), ", ".join(f"{label} {n}" for label, n in list(instead.items())[:2])])
    means = ["", "mean"]
    for role in roles:
        before, after = (sum(m[arm][role]["accuracy"] for m in all_metrics) / len(all_metrics) for arm in ARMS)
        means.append(f"{before:.2f} -> {after:.2f}")
    lines = [head, *rows, [*means, ""]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
