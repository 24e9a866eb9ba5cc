"""Draw the same seeds without and with the token, and measure what classifiers see; both meet in folders of PNG."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from class_token import spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, encode_prompts, generate_images
from metrics import Proportion, mcnemar, wilson
from prompt_datasets import TEMPLATES, class_title
from utils import load_images, save_images, write_json

ARMS = ("without", "with")


@torch.no_grad()
def generate(config: RunConfig, components: Components, class_index: int, class_name: str, token_id: int,
             vector: torch.Tensor, folder: Path) -> int:
    """Write folder/without/<seed>.png and folder/with/<seed>.png for seeds 0 to test_size - 1, by the full sampler.

    Pictures that are there already, drawn with the same settings and token, are kept; returns how many were drawn.
    """
    prompts = {"without": TEMPLATES[0].format(class_name),
               "with": TEMPLATES[0].format(f"{config.placeholder_token} {class_name}")}
    forget_other_settings(config, prompts, vector, folder)
    jobs = [(arm, seed) for arm in ARMS for seed in range(config.test_size)
            if not (folder / arm / f"{seed}.png").exists()]
    with tqdm(total=len(jobs), desc=f"drawing {class_title(class_index, class_name)}", unit="image",
              disable=not jobs) as bar:
        for start in range(0, len(jobs), config.batch_size):
            batch = jobs[start:start + config.batch_size]
            with spliced(components.text_encoder, token_id, vector.to(components.device)):
                prompt_embeds = encode_prompts(components, [prompts[arm] for arm, _ in batch])
            images = generate_images(components, prompt_embeds, [seed for _, seed in batch], config.height,
                                     config.width, config.guidance_scale, config.num_inference_steps)
            save_images(images, [folder / arm / f"{seed}.png" for arm, seed in batch])
            bar.update(len(batch))
    return len(jobs)


def forget_other_settings(config: RunConfig, prompts: dict[str, str], vector: torch.Tensor, folder: Path):
    """Delete an arm's pictures unless folder/drawn.json says that they were drawn as they would be now."""
    record = folder / "drawn.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    decisive = ("model", "height", "width", "guidance_scale", "num_inference_steps", "mixed_precision")
    token = hashlib.sha256(vector.float().cpu().numpy().tobytes()).hexdigest()
    now = {arm: {"prompt": prompts[arm], "token": token if arm == "with" else None,
                 **{name: getattr(config, name) for name in decisive}} for arm in ARMS}
    for arm in ARMS:
        if before.get(arm) != now[arm]:
            shutil.rmtree(folder / arm, ignore_errors=True)
    write_json(record, now)


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], class_index: int, batch_size: int) -> dict:
    """What `classifier` says of these PNG files: which are right, how sure it is of the target, what it saw instead.

    Accuracy and top-5 come with Wilson 95 % intervals; 'right' has one true or false a file, in their order.
    """
    device = next(classifier.model.parameters()).device
    probabilities = torch.cat([classifier(load_images(paths[i:i + batch_size]).to(device)).softmax(1).cpu()
                               for i in range(0, len(paths), batch_size)])  # [N, C]
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    right = likeliest[:, 0] == class_index
    others = Counter(classifier.labels[i] for i in likeliest[~right, 0].tolist())
    return {"accuracy": wilson(int(right.sum()), len(right))._asdict(),
            "top5": wilson(int((likeliest == class_index).any(1).sum()), len(right))._asdict(),
            "mean_target_probability": probabilities[:, class_index].mean().item(),
            "predicted_instead": dict(others.most_common()), "right": right.tolist()}


def evaluate_folder(config: RunConfig, judges: dict[str, Classifier], class_index: int, folder: Path) -> dict:
    """Judge folder/{without,with} by every judge {role: classifier}; write and return metrics.json.

    The paired test asks whether the token changes what is right on the same seeds (McNemar, exact, two-sided).
    """
    labels = judges["classifier"].labels
    names = [f"{seed}.png" for seed in range(config.test_size)]
    metrics = {
        "class_index": class_index + 1, "label": labels[class_index], "images": config.test_size,
        "seeds": [0, config.test_size - 1], "judges": {role: judge.name for role, judge in judges.items()},
        **{arm: {role: judge_images(judge, [folder / arm / name for name in names], class_index, config.batch_size)
                 for role, judge in judges.items()} for arm in ARMS}}
    metrics["mcnemar_p"] = {role: mcnemar(*(torch.tensor(metrics[arm][role]["right"]) for arm in ARMS))
                            for role in judges}
    write_json(folder / "metrics.json", metrics)
    return metrics


def pooled(all_metrics: list[dict], arm: str, role: str) -> Proportion:
    """The accuracy of all classes' images together, with its interval."""
    right = [right for metrics in all_metrics for right in metrics[arm][role]["right"]]
    return wilson(sum(right), len(right))


def table(all_metrics: list[dict]) -> str:
    """One line a class, accuracy without -> with by every judge, and all images together last."""
    roles = list(all_metrics[0]["judges"])
    lines = [["", "class", *(f"by the {role}" for role in roles), "without the token also seen as"]]
    for metrics in all_metrics:
        instead = metrics["without"][roles[-1]]["predicted_instead"]
        lines.append([str(metrics["class_index"]), metrics["label"],
                      *(" -> ".join(f"{metrics[arm][role]['accuracy']['value']:.2f}" for arm in ARMS)
                        for role in roles), ", ".join(f"{label} {n}" for label, n in list(instead.items())[:2])])
    lines.append(["", "all", *(" -> ".join("{:.2f} [{:.2f}, {:.2f}]".format(*pooled(all_metrics, arm, role))
                                           for arm in ARMS) for role in roles), ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
