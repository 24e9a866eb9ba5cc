"""How many updates a token takes until its pictures of seeds it never saw are right: a machine's speed plays no part.

    python -m benchmarks.updates            the miniature's classes, in the paper's trajectory and in their own
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.updates           by two processes

A plain loop takes the same steps (tests/test_benchmarks.py), so these counts times the seconds an update of
benchmarks/cost.py are the seconds to accuracy of both. Finished classes are kept in --work.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import class_token
from benchmarks.cost import PAPER, setting_of, write_table
from classifiers import load_classifier
from config import RunConfig, parse
from diffusion import load_components
from evaluation import Arm, draw_some, embed
from learner import Job
from prompt_datasets import TEMPLATES, class_names, select_classes
from run import DTYPES
from sweep import join, shared, wait_for_all
from training import train_tokens
from utils import ROOT, replacing, write_json


def train(config: RunConfig, models, jobs: list[Job]):
    """Leave the vectors of every update of every class in its folder."""
    components, token_id, guide, _ = models
    todo = [job for job in jobs if not (job.tokens / "vectors.safetensors").exists()]
    for job, trained in train_tokens(config, components, token_id, guide, shared(todo, f"train {setting_of(config)}")):
        with replacing(job.tokens / "vectors.safetensors") as temporary:
            save_file({"vectors": trained.vectors.cpu()}, temporary)


def judge(config: RunConfig, models, job: Job, every: int, bar: tqdm):
    """Note how many of test_size held-out pictures are right by every so manieth vector, until nine in ten are."""
    file = job.tokens / "accuracy.json"
    vectors = load_file(job.tokens / "vectors.safetensors")["vectors"]
    accuracies = {}
    for update in range(0, len(vectors), every):
        accuracies[update] = accuracy(config, models, job, vectors[update])
        bar.set_postfix(update=update, accuracy=accuracies[update])
        if accuracies[update] >= 0.9:
            break
    write_json(file, {"updates": len(vectors), "accuracies": accuracies})


@torch.no_grad()
def accuracy(config: RunConfig, models, job: Job, vector: torch.Tensor) -> float:
    components, token_id, _, evaluator = models
    arm = Arm("with", TEMPLATES[0].format(f"{config.placeholder_token} {job.class_name}"), vector, config.test_size)
    pictures = draw_some(config.test_size, config, components, {"with": embed(components, token_id, arm)},
                         [(arm, seed) for seed in range(config.test_size)])
    return (evaluator(pictures).argmax(1) == job.class_index).float().mean().item()


def summary(jobs: list[Job]) -> dict:
    """Updates to 0.9 of every class, None where training stopped before; their median, in words where there is none."""
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
    parser.add_argument("--every", type=int, default=2, help="judge every so manieth update (2)")
    parser.add_argument("--updates", type=int, default=30, help="updates at most (30)")
    parser.add_argument("--work", type=Path, default=Path("img/updates"), help="for what is finished (img/updates)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/updates.json", help="(docs/updates.json)")
    arguments = parser.parse_args()
    processes = join()
    config = replace(parse(["--config", arguments.config])[0], test_size=10, num_train_epochs=arguments.updates,
                     classes_at_once=4)
    guide, evaluator = (load_classifier(name, config.device) for name in (config.classifier, config.evaluator))
    names = class_names(guide.labels, config.class_names)
    components = load_components(config.model, config.device, DTYPES[config.mixed_precision])
    models = components, class_token.add_placeholder(components.tokenizer, config.placeholder_token), guide, evaluator
    settings = {}
    for each in (config, replace(config, **PAPER)):
        folder = arguments.work / setting_of(each)
        jobs = [Job(index, names[index], folder / f"{index + 1}", folder / f"{index + 1}/images")
                for index in select_classes(arguments.class_index, guide.labels, names)]
        train(each, models, jobs)
        todo = [job for job in jobs if not (job.tokens / "accuracy.json").exists()]
        settings[setting_of(each)] = jobs
        with tqdm(shared(todo, f"judge {setting_of(each)}"), desc="judging", unit="class") as bar:
            for job in bar:
                judge(each, models, job, arguments.every, bar)
    wait_for_all(tqdm(total=0, disable=True))
    if processes.is_main_process:
        results = {name: summary(jobs) for name, jobs in settings.items()}
        write_json(arguments.out, {"target": 0.9, "held_out_seeds": 10, "every": arguments.every,
                                   "updates_at_most": arguments.updates, "settings": results})
        print(json.dumps(results, indent=2))
        if arguments.out.with_name("cost.json").exists():
            print("\n".join(write_table(arguments.out.with_name("cost"))))


if __name__ == "__main__":
    main()
