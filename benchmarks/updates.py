"""How many updates a token takes until its pictures of seeds it never saw are right: a machine's speed plays no part.

    python -m benchmarks.updates            the miniature's classes, in the paper's trajectory and in their own

A plain loop takes the same steps (tests/benchmarks), so these counts times the seconds per update of
benchmarks/cost.py are the seconds to accuracy of both. Nothing stops a training early here. Finished classes are kept
in --work: several calls may run beside each other, each for classes of its own, before one for all.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cost import FOREVER, PAPER, name_setting, split_settings, write_table
from config import RunConfig, names_deciding, parse_settings
from evaluation.images import digest_json
from method.losses import classifier_loss
from method.trainer import Trainer
from method.training import train_tokens
from models.classifiers import load_classifier
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, class_names, select_classes
from utils import ROOT, list_checkpoint_files, read_json, read_tensors, write_json, write_tensors

HELD_OUT = 10  # pictures of a class, of seeds from 0


def train_classes(config: RunConfig, generator: Generator, loss_fn, folders: dict[TargetClass, Path]):
    """Leave the vectors of every update of every class in its folder."""
    settings, sampling = split_settings(config)
    trainers = (Trainer(target, generator.initial_vectors(config.initializer_token), settings, generator.dtype,
                        folder / "history.jsonl", folder / "training_state.pt", folder / "images")
                for target, folder in folders.items() if not (folder / "vectors.safetensors").exists())
    for trainer, trained in train_tokens(generator, loss_fn, trainers, 8, sampling, config.batch_size):
        write_tensors(folders[trainer.target] / "vectors.safetensors", {"vectors": trained.every_update.cpu()})


@torch.no_grad()
def judge_updates(generator: Generator, evaluator, prompt: str, index: int, sampling: SamplingSettings,
                  vectors: torch.Tensor, every: int) -> dict[int, float]:
    """{update: share of the held-out pictures that `evaluator` takes for class `index` (from 0)}, until it is 0.9."""
    accuracies = {}
    for update in range(0, len(vectors), every):
        cond = generator.encode([prompt], vectors[update, None].to(generator.device)).repeat_interleave(HELD_OUT, 0)
        images = generator.decode(generator.sample(cond, range(HELD_OUT), sampling))
        accuracies[update] = (evaluator(images).argmax(1) == index).sum().item() / HELD_OUT
        if accuracies[update] >= 0.9:
            break
    return accuracies


def summarise_classes(folders: list[Path]) -> dict:
    """Updates to 0.9 of every class, None where they did not suffice; their median, in words where there is none."""
    found = [read_json(folder / "accuracy.json") for folder in folders]
    reached = [next((int(update) for update, share in measured["accuracies"].items() if share >= 0.9), None)
               for measured in found]
    median = statistics.median([float("inf") if updates is None else updates for updates in reached])
    return {"median": median if median < float("inf") else "not reached", "classes": reached,
            "updates": [measured["updates"] for measured in found]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yml", help="settings of the run (the miniature's)")
    parser.add_argument("--class_index", default="all", help="which classes (all)")
    parser.add_argument("--every", type=int, default=3, help="judge after every so many updates (3)")
    parser.add_argument("--updates", type=int, default=16, help="updates at most (16)")
    parser.add_argument("--work", type=Path, default=Path("img/updates"), help="for what is finished (img/updates)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/updates.json", help="(docs/updates.json)")
    options, results = parser.parse_args(), {}
    base = replace(parse_settings(["--config", options.config])[0], num_train_epochs=options.updates, **FOREVER)
    guide, evaluator = (load_classifier(name, base.device) for name in (base.classifier, base.evaluator))
    targets = select_classes(options.class_index, guide.labels, class_names(guide.labels, base.class_names))
    generator = load_generator(base.model, base.device, PRECISIONS[base.mixed_precision])
    generator.set_placeholder(base.placeholder_token)
    for config in (base, replace(base, **PAPER)):
        decisive = [getattr(config, name) for name in names_deciding("token")], list_checkpoint_files(config.model)
        work = options.work / f"{name_setting(config)} {digest_json(decisive)[:8]}"  # other weights, another folder
        folders = {target: work / str(target.number) for target in targets}
        train_classes(config, generator, classifier_loss(guide), folders)
        for target, folder in tqdm(folders.items(), desc="judging", unit="class"):
            if not (folder / "accuracy.json").exists():
                prompt = TEMPLATES[0].format(f"{config.placeholder_token} {target.name}")
                vectors = read_tensors(folder / "vectors.safetensors")[0]["vectors"]
                write_json(folder / "accuracy.json", {"updates": len(vectors), "accuracies": judge_updates(
                    generator, evaluator, prompt, target.index, split_settings(config)[1]._replace(timesteps=None),
                    vectors, options.every)})
        results[name_setting(config)] = summarise_classes(list(folders.values()))
    write_json(options.out, {"target": 0.9, "held_out_seeds": HELD_OUT, "every": options.every,
                             "updates_at_most": options.updates, "settings": results})
    print(json.dumps(results, indent=2))
    if options.out.with_name("cost.json").exists():
        print(write_table(options.out.with_name("cost")))


if __name__ == "__main__":
    main()
