"""Draw the same seeds without and with the token, and measure what classifiers see; both meet in folders of PNG."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from class_token import spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, encode_prompts, generate_images
from memory import WITHOUT_GRAPH, first_batch, fitting
from metrics import Proportion, mcnemar, wilson
from prompt_datasets import TEMPLATES, class_title, prompt_folder
from stopping import heed, in_flight
from utils import ImageWriter, files_of, imported, load_images, read_image, read_json, require, write_json

ARMS = ("without", "with")
CONTROLS = ("untrained", "random")
DRAWN_BY = ("model", "height", "width", "guidance_scale", "num_inference_steps", "mixed_precision")
DRAWN_AT_ONCE = 64  # at first; less where memory does not suffice
JUDGED_AT_ONCE = 32
FRAMES = 10  # of the film of one picture over the updates


class Arm(NamedTuple):
    """A set of pictures of a class: its folder under eval/, its prompt, what the token stands for, how many seeds."""

    folder: str
    prompt: str
    vector: torch.Tensor | None
    images: int


def arms_of(config: RunConfig, class_index: int, class_name: str, vector: torch.Tensor) -> list[Arm]:
    """Without and with the token, in the paper's prompt and in every --eval_prompts; then the negative controls.

    The controls stand in the token's place: the word whose embedding training started from, and a random direction
    of the trained vector's norm. What they gain is not the training's.
    """
    token = f"{config.placeholder_token} {class_name}"
    arms = []
    for template in (TEMPLATES[0], *config.eval_prompts):
        folder = "" if template == TEMPLATES[0] else f"prompts/{prompt_folder(template)}/"
        arms += [Arm(f"{folder}without", template.format(class_name), None, config.test_size),
                 Arm(f"{folder}with", template.format(token), vector, config.test_size)]
    if config.controls:
        direction = torch.randn(len(vector), generator=torch.Generator().manual_seed(class_index))
        random = direction * vector.norm().cpu() / direction.norm()
        untrained = TEMPLATES[0].format(f"{config.initializer_token} {class_name}")
        arms += [Arm("untrained", untrained, None, config.test_size),
                 Arm("random", TEMPLATES[0].format(token), random, config.test_size)]
    return arms


def frames_of(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """{update: vector} of some of a training's `vectors` [updates, D], evenly spaced, in half precision."""
    chosen = dict.fromkeys(torch.linspace(0, len(vectors) - 1, FRAMES).round().int().tolist())
    return {f"{update:03d}": vectors[update].half().cpu() for update in chosen}


def film_of(config: RunConfig, class_name: str, frames: dict[str, torch.Tensor]) -> list[Arm]:
    """The first seed's picture by each of `frames_of` a training, in their order.

    Raises:
        UserError: names that are no numbers, and so none of ours: they become folders.
    """
    strange = [name for name, vector in frames.items() if not re.fullmatch("[0-9]{3,6}", name) or vector.dim() != 1]
    require(not strange, f"the vectors of the training hold {strange[:1]}, which is no vector of an update")
    prompt = TEMPLATES[0].format(f"{config.placeholder_token} {class_name}")
    return [Arm(f"updates/{update}", prompt, frames[update].float(), 1) for update in sorted(frames)]


@torch.no_grad()
def generate(config: RunConfig, generator: Callable[[], tuple[Components, int]], title: str, arms: list[Arm],
             folder: Path, draw_batch: Callable) -> int:
    """Write folder/<arm>/<seed>.png for seeds 0 to images - 1 of every arm, by the full sampler.

    Pictures that are there already, drawn with the same settings and token, are kept, and where all are, the
    `generator` (components and placeholder's number) is not called; returns how many were drawn. `draw_batch` is
    that of `drawing`, the same for all classes.

    Raises:
        UserError: a vector of another text encoder's width, a picture that is not a number.
        Stopped: a signal came; what is drawn is on the disk.
    """
    stale, record = drawn_otherwise(config, arms, folder)
    jobs = [(arm.folder, seed) for arm in arms for seed in range(arm.images)]
    missing = {(arm, seed) for arm, seed in jobs if arm in stale or not (folder / arm / f"{seed}.png").exists()}
    if not missing:
        return 0
    components, token_id = generator()
    embeds = {arm.folder: embed(components, token_id, arm) for arm in arms}
    forget(folder.parent)
    for arm in stale:
        require(not (folder / arm).is_symlink(), f"'{folder / arm}' is a link, and its pictures are drawn anew: remove "
                                                 "it")
        if (folder / arm).exists():
            shutil.rmtree(folder / arm)
    write_json(folder / "drawn.json", record)
    with tqdm(total=len(missing), desc=f"drawing {title}", unit="image") as bar, ImageWriter() as writer:
        while jobs:
            with in_flight("this batch of pictures"):
                batch, images = draw_batch(config, components, embeds, jobs, missing)
                lacking = [i for i, job in enumerate(batch) if job in missing]
                if lacking:
                    require(images.isfinite().all(), f"a picture of {title} is not a number: try --mixed_precision "
                                                     "bf16 or no")
                    writer.write(images[lacking], [folder / arm / f"{seed}.png" for arm, seed in
                                                   (batch[i] for i in lacking)])
                jobs = jobs[len(batch):]
                bar.update(len(lacking))
            heed()
    return len(missing)


def drawing(config: RunConfig) -> Callable:
    """`draw_missing` with as many pictures as fit, which it finds out once."""
    given = config.batch_size and WITHOUT_GRAPH * config.batch_size
    return fitting(draw_missing, given, first_batch(DRAWN_AT_ONCE, config.device, config.height, config.width))


def draw_missing(batch_size: int, config: RunConfig, components: Components, embeds: dict[str, torch.Tensor],
                 jobs: list[tuple[str, int]], missing: set[tuple[str, int]]):
    """The first `batch_size` jobs (an arm's folder, a seed) and their pictures; None where none of them is missing.

    Whole batches alone: what a killed drawing draws again is then the same to the last bit.
    """
    batch = jobs[:batch_size]
    return batch, None if missing.isdisjoint(batch) else draw_some(config, components, embeds, batch)


def draw_some(config: RunConfig, components: Components, embeds: dict[str, torch.Tensor],
              jobs: list[tuple[str, int]]) -> torch.Tensor:
    """The pictures [B, 3, H, W] of these jobs, an arm's folder and a seed each."""
    prompt_embeds = torch.cat([embeds[arm] for arm, _ in jobs])
    return generate_images(components, prompt_embeds, [seed for _, seed in jobs], config.height, config.width,
                           config.guidance_scale, config.num_inference_steps)


def embed(components: Components, token_id: int, arm: Arm) -> torch.Tensor:
    """The arm's prompt_embeds [1, L, D]."""
    if arm.vector is None:
        return encode_prompts(components, [arm.prompt])
    width = components.text_encoder.config.hidden_size
    require(len(arm.vector) == width, f"the token has {len(arm.vector)} numbers and this model's text encoder reads "
                                      f"{width}: it was trained for another --model")
    with spliced(components.text_encoder, token_id, arm.vector.to(components.device)):
        return encode_prompts(components, [arm.prompt])


def drawn_otherwise(config: RunConfig, arms: list[Arm], folder: Path) -> tuple[list[str], dict]:
    """The arms whose pictures folder/drawn.json does not say to be drawn as they would be now; its new content."""
    file = folder / "drawn.json"
    before = read_json(file) if file.exists() else {}
    settings = {"weights": files_of(config.model), **{name: getattr(config, name) for name in DRAWN_BY}}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    now = {arm.folder: {"prompt": arm.prompt, "token": fingerprint(arm.vector), "settings": digest} for arm in arms}
    return [arm for arm in now if before.get(arm) != now[arm]], before | now


def forget(run: Path):
    """Remove what tells of pictures that are drawn anew: a class's measurements, its pages and those of all classes."""
    everything = run.parent.parent
    for file in (run / "eval/metrics.json", run / "eval/grid.png", run / "report.html",
                 everything / f"summary_{run.name}.json", everything / f"report_{run.name}.html"):
        file.unlink(missing_ok=True)


def pictures_of(folder: Path) -> str:
    """A fingerprint of how the pictures in folder/without and folder/with were drawn."""
    drawn = read_json(folder / "drawn.json", *ARMS)
    return hashlib.sha256(json.dumps([drawn[arm] for arm in ARMS], sort_keys=True).encode()).hexdigest()


def fingerprint(vector: torch.Tensor | None) -> str | None:
    return None if vector is None else hashlib.sha256(vector.float().cpu().numpy().tobytes()).hexdigest()


def probabilities_of(batch_size: int, classifier: Classifier, paths: list[Path]) -> torch.Tensor:
    """What the classifier makes of these PNG files, [N, C], `batch_size` at a time."""
    device = next(classifier.model.parameters()).device
    return torch.cat([classifier(load_images(paths[i:i + batch_size]).to(device)).softmax(1).cpu()
                      for i in range(0, len(paths), batch_size)])


@torch.no_grad()
def judge_images(classifier: Classifier, paths: list[Path], class_index: int) -> dict:
    """What `classifier` says of these PNG files: which are right, how sure it is of the target, what it saw instead.

    Accuracy and top-5 come with Wilson 95 % intervals; 'right' has one true or false a file, in their order.
    """
    probabilities = fitting(probabilities_of, None, JUDGED_AT_ONCE)(classifier, paths)
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    right = likeliest[:, 0] == class_index
    others = Counter(class_title(i, classifier.labels[i]) for i in likeliest[~right, 0].tolist())
    return {"accuracy": wilson(int(right.sum()), len(right))._asdict(),
            "top5": wilson(int((likeliest == class_index).any(1).sum()), len(right))._asdict(),
            "mean_target_probability": probabilities[:, class_index].mean().item(),
            "predicted_instead": dict(others.most_common()), "right": right.tolist()}


def evaluate_folder(config: RunConfig, judges: dict[str, Classifier], class_index: int, arms: list[Arm], folder: Path,
                    **sources) -> dict:
    """Judge every arm's pictures under `folder` by every judge {role: classifier}; write and return metrics.json.

    'without' and 'with' (and the controls) hold the paper's prompt; 'contexts' holds one such pair for each of
    --eval_prompts; `sources` says what else a report needs to find. 'mcnemar_p' asks whether the token changes what
    is right on the same seeds.
    """
    labels = judges["classifier"].labels
    names = [f"{seed}.png" for seed in range(config.test_size)]
    judged = {arm.folder: {role: judge_images(judge, [folder / arm.folder / name for name in names],
                                              class_index) for role, judge in judges.items()} for arm in arms}
    metrics = {
        "class_index": class_index + 1, "label": labels[class_index], "classes": len(labels),
        "images": config.test_size, "pictures": pictures_of(folder),
        "seeds": [0, config.test_size - 1], "judges": {role: judge.name for role, judge in judges.items()}, **sources,
        **{arm: judged[arm] for arm in (*ARMS, *CONTROLS) if arm in judged},
        "mcnemar_p": paired(*(judged[arm] for arm in ARMS)), "contexts": {}}
    for template in config.eval_prompts:
        pair = {arm: judged[f"prompts/{prompt_folder(template)}/{arm}"] for arm in ARMS}
        metrics["contexts"][template] = {**pair, "mcnemar_p": paired(*pair.values())}
        if config.context_judge:
            metrics["contexts"][template]["context_kept"] = {
                arm: context_kept(config.context_judge, template, [folder / "prompts" / prompt_folder(template) / arm
                                                                   / name for name in names]) for arm in ARMS}
    write_json(folder / "metrics.json", metrics)
    return metrics


def context_kept(judge: str, template: str, files: list[Path]) -> dict:
    """The share of pictures, with its interval, in which `judge` sees what `template` asks for."""
    seen = [imported(judge, "context_judge")(read_image(file)) for file in files]
    return wilson(sum(bool(words) and words.lower() in template.lower() for words in seen), len(seen))._asdict()


def paired(before: dict, after: dict) -> dict[str, float]:
    """McNemar's exact two-sided p-value by every judge."""
    return {role: mcnemar(*(torch.tensor(arm[role]["right"]) for arm in (before, after))) for role in before}


def pooled(arms: list[dict], role: str, measure: str = "accuracy") -> Proportion:
    """The accuracy (or 'top5') of all classes' images together, with its interval; one judged arm a class."""
    counts = [len(arm[role]["right"]) for arm in arms]
    return wilson(sum(round(arm[role][measure]["value"] * count) for arm, count in zip(arms, counts, strict=True)),
                  sum(counts))


def same_seeds(all_metrics: list[dict], role: str) -> str:
    """How many pictures of all classes the token put right and wrong, and McNemar's test whether that is chance."""
    before, after = (torch.tensor([right for metrics in all_metrics for right in metrics[arm][role]["right"]])
                     for arm in ARMS)
    chance = mcnemar(before, after)
    return (f"{(after & ~before).sum()} and {(before & ~after).sum()}, "
            + (f"p = {chance:.2g}" if chance > 1e-300 else "p < 1e-300"))


def interval(share: Proportion) -> str:
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


def before_and_after(all_metrics: list[dict], role: str, measure: str = "accuracy") -> str:
    return " -> ".join(interval(pooled([metrics[arm] for metrics in all_metrics], role, measure)) for arm in ARMS)


def table_lines(all_metrics: list[dict]) -> list[list[str]]:
    """One line a class, accuracy without -> with by every judge, and all images together last."""
    roles = list(all_metrics[0]["judges"])
    lines = [["", "class", *(f"by the {role}" for role in roles),
              f"without the token also seen as (by the {roles[-1]})"]]
    for metrics in all_metrics:
        instead = metrics["without"][roles[-1]]["predicted_instead"]
        lines.append([str(metrics["class_index"]), metrics["label"],
                      *(" -> ".join(f"{metrics[arm][role]['accuracy']['value']:.2f}" for arm in ARMS)
                        for role in roles), ", ".join(f"{title}: {n}" for title, n in list(instead.items())[:2])])
    lines.append(["", "all", *(before_and_after(all_metrics, role) for role in roles), ""])
    if all_metrics[0]["classes"] > 5:
        lines.append(["", "all, in the top 5", *(before_and_after(all_metrics, role, "top5") for role in roles), ""])
    lines.append(["", "put right, put wrong", *(same_seeds(all_metrics, role) for role in roles), "McNemar's test"])
    for control in CONTROLS:
        if control in all_metrics[0]:
            arms = [metrics[control] for metrics in all_metrics]
            lines.append(["", f"{control} token", *(interval(pooled(arms, role)) for role in roles), ""])
    return lines


def contexts_table_lines(all_metrics: list[dict]) -> list[list[str]]:
    """One line a prompt: accuracy of all classes together, and how often the picture shows what the prompt adds."""
    roles = list(all_metrics[0]["judges"])
    lines = [["prompt", *(f"by the {role}" for role in roles), "context kept"]]
    for template in all_metrics[0]["contexts"]:
        contexts = [metrics["contexts"][template] for metrics in all_metrics]
        kept = [wilson(sum(round(context["context_kept"][arm]["value"] * metrics["images"])
                           for context, metrics in zip(contexts, all_metrics, strict=True)),
                       sum(metrics["images"] for metrics in all_metrics))
                for arm in ARMS if "context_kept" in contexts[0]]
        lines.append([template, *(before_and_after(contexts, role) for role in roles),
                      " -> ".join(map(interval, kept))])
    return lines


def aligned(lines: list[list[str]]) -> str:
    """Table lines as text with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
