"""How many updates a token takes until its pictures of seeds it never saw are right: a machine's speed plays no part.

    python -m benchmarks.updates            the miniature's classes, in the paper's trajectory and in their own

A plain loop takes the same steps (tests/test_benchmarks.py), so these counts times the seconds an update of
benchmarks/cost.py are the seconds to accuracy of both. Nothing stops a training early here. Finished classes are kept
in --work: several calls may run beside each other, each for classes of its own, before one for all.
"""

import argparse
import hashlib
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import class_token
from benchmarks.cost import FOREVER, PAPER, setting_of, write_table
from classifiers import load_classifier
from config import DECISIVE, RunConfig, as_typed, parse
from diffusion import load_components
from evaluation import Arm, draw_some, embed
from learner import Job
from prompt_datasets import TEMPLATES, class_names, select_classes
from run import DTYPES
from training import train_tokens
from utils import ROOT, files_of, write_json, write_tensors


def train(config: RunConfig, models, jobs: list[Job]):
    """Leave the vectors of every update of every class in its folder."""
    components, token_id, guide, _ = models
    todo = [job for job in jobs if not (job.tokens / "vectors.safetensors").exists()]
    for job, trained in train_tokens(config, components, token_id, guide, iter(todo)):
        write_tensors(job.tokens / "vectors.safetensors", {"vectors": trained.vectors.cpu()})


def judge(config: RunConfig, models, job: Job, every: int, bar: tqdm):
    """Note how many of test_size held-out pictures are right by every so manieth vector, until nine in ten are."""
    vectors = load_file(job.tokens / "vectors.safetensors")["vectors"]
    accuracies = {}
    for update in range(0, len(vectors), every):
        accuracies[update] = accuracy(config, models, job, vectors[update])
        bar.set_postfix(update=update, accuracy=accuracies[update])
        if accuracies[update] >= 0.9:
            break
    write_json(job.tokens / "accuracy.json", {"updates": len(vectors), "accuracies": accuracies})


@torch.no_grad()
def accuracy(config: RunConfig, models, job: Job, vector: torch.Tensor) -> float:
    components, token_id, _, evaluator = models
    arm = Arm("with", TEMPLATES[0].format(f"{config.placeholder_token} {job.class_name}"), vector, config.test_size)
    pictures = draw_some(config, components, {"with": embed(components, token_id, arm)},
                         [("with", seed) for seed in range(config.test_size)])
    return (evaluator(pictures).argmax(1) == job.class_index).sum().item() / config.test_size


def summary(jobs: list[Job]) -> dict:
    """Updates to 0.9 of every class, None where they did not suffice; their median, in words where there is none."""
    found = [json.loads((job.tokens / "accuracy.json").read_text()) for job in jobs]
    reached = [next((int(update) for update, share in each["accuracies"].items() if share >= 0.9), None)
               for each in found]
    median = statistics.median([float("inf") if updates is None else updates for updates in reached])
    return {"median": median if median < float("inf") else "not reached", "classes": reached,
            "updates": [each["updates"] for each in found]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yml", help="settings of the run (the miniature's)")
    parser.add_argument("--class_index", default="all", help="which classes (all)")
    parser.add_argument("--every", type=int, default=3, help="judge every so manieth update (3)")
    parser.add_argument("--updates", type=int, default=16, help="updates at most (16)")
    parser.add_argument("--work", type=Path, default=Path("img/updates"), help="for what is finished (img/updates)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/updates.json", help="(docs/updates.json)")
    arguments = parser.parse_args()
    config = replace(parse(["--config", arguments.config])[0], test_size=10, num_train_epochs=arguments.updates,
                     classes_at_once=8, **FOREVER)
    guide, evaluator = (load_classifier(name, config.device) for name in (config.classifier, config.evaluator))
    names = class_names(guide.labels, config.class_names)
    components = load_components(config.model, config.device, DTYPES[config.mixed_precision])
    models = components, class_token.add_placeholder(components.tokenizer, config.placeholder_token), guide, evaluator
    results = {}
    for each in (config, replace(config, **PAPER)):
        folder = arguments.work / f"{setting_of(each)} {digest(each)}"
        jobs = [Job(index, names[index], folder / f"{index + 1}", folder / f"{index + 1}/images")
                for index in select_classes(arguments.class_index, guide.labels, names)]
        train(each, models, jobs)
        with tqdm([job for job in jobs if not (job.tokens / "accuracy.json").exists()], desc="judging",
                  unit="class") as bar:
            for job in bar:
                judge(each, models, job, arguments.every, bar)
        results[setting_of(each)] = summary(jobs)
    write_json(arguments.out, {"target": 0.9, "held_out_seeds": config.test_size, "every": arguments.every,
                               "updates_at_most": arguments.updates, "settings": results})
    print(json.dumps(results, indent=2))
    if arguments.out.with_name("cost.json").exists():
        print("\n".join(write_table(arguments.out.with_name("cost"))))


def digest(config: RunConfig) -> str:
    """Of what decides the vectors: another setting or other weights are kept apart."""
    settings = as_typed(config)
    decisive = {name: settings[name] for name in DECISIVE}
    return hashlib.sha256(json.dumps([decisive, files_of(config.model)], sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
