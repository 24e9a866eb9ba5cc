"""How many updates a token takes until its pictures of seeds it never saw are right: a machine's speed plays no part.

    python -m benchmarks.updates            the miniature's classes, in the paper's trajectory and in their own

A plain loop takes the same steps (tests/benchmarks), so these counts times the seconds per update of
benchmarks/cost.py are the seconds to accuracy of both. So are the steps of the peer: textual inversion by the recipe of
diffusers' script, whose word stands alone in the prompt, where the config has real pictures. Finished classes are kept
in --work (img/updates): several calls may run beside each other, each for classes of its own, before one for all.
"""

import json
import math
import statistics
from pathlib import Path

import torch

from benchmarks.cost import FOREVER, PAPER, PEER, PICTURES, name_setting, new_trainer, write_table
from experiments import common
from experiments.textual_inversion import invert_pictures
from method.losses import cross_entropy
from method.update import train_tokens
from prompt_datasets import TargetClass
from system.tensor_files import read_tensors, write_tensors
from utils import ROOT, UserError, write_json

ENOUGH, HELD_OUT = 0.9, 10  # share of so many pictures of a class, of seeds from 0
EVERY, AT_MOST = 3, 16  # judge every third update, of so many
STEPS = 5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200  # of textual inversion, judged


def train_classes(lab: common.Lab) -> dict[TargetClass, torch.Tensor]:
    """The vectors [updates, K, D] that every class's images were drawn with; a UserError where one diverges."""
    generator, folder = lab.get_generator(), lab.work / common.digest_training(lab.config)
    files = {target: folder / str(target.number) / "vectors.safetensors" for target in lab.targets}
    trainers = (new_trainer(lab.config, generator, target, file.parent) for target, file in files.items()
                if not file.exists())
    _, sampling = common.method_settings(lab.config)
    for trainer, end in train_tokens(generator, cross_entropy(lab.get_guide()), trainers, 8, sampling,
                                     lab.config.batch_size):
        if isinstance(end, UserError):
            raise end
        if end:
            write_tensors(files[trainer.target], {"vectors": end.every_update.cpu()})
    return {target: read_tensors(file)[0]["vectors"] for target, file in files.items()}


def count_updates(lab: common.Lab, target: TargetClass, learned: dict[int, torch.Tensor],
                  phrase: str | None = None) -> int | None:
    """The first of the updates {update: vectors} whose vectors' pictures are right; None where there is none."""
    return next((update for update, vectors in learned.items() if common.measure_accuracy(
        lab, common.draw_sets(lab, {target: vectors}, HELD_OUT, phrase=phrase)).value >= ENOUGH), None)


def count_steps(lab: common.Lab) -> dict:
    """Steps that textual inversion takes for every class."""
    real = {target: files[:PICTURES] for target, files in common.load_real_images(lab, PICTURES).items()}
    learned, _ = invert_pictures(lab, real, list(STEPS))
    return summarise_classes([count_updates(lab, target, {step: learned[step][target] for step in STEPS},
                                            lab.config.placeholder_token) for target in lab.targets])


def summarise_classes(reached: list[int | None]) -> dict:
    """Updates to 0.9 of every class, None where they did not suffice; their median, in words where there is none."""
    median = statistics.median([math.inf if updates is None else updates for updates in reached])
    return {"median": median if median < math.inf else "not reached", "classes": reached}


def main(argv: list[str] | None = None):
    options, results = common.parse_options(__doc__, argv, "all"), {}
    options.work, out = options.work or Path("img/updates"), options.out or ROOT / "docs/updates.json"
    for changes in ({}, PAPER):
        lab = common.open_lab(options, num_train_epochs=AT_MOST, **FOREVER, **changes)
        trained = train_classes(lab)
        reached = [count_updates(lab, target, {i: vectors[i] for i in range(0, len(vectors), EVERY)})
                   for target, vectors in trained.items()]
        results[name_setting(lab.config)] = {**summarise_classes(reached), "updates": list(map(len, trained.values()))}
    if lab.config.real_images:
        results[PEER] = {**count_steps(lab), "judged": STEPS}
    write_json(out, {"target": ENOUGH, "held_out_seeds": HELD_OUT, "every": EVERY, "updates_at_most": AT_MOST,
                     "settings": results})
    print(json.dumps(results, indent=2))
    if out.with_name("cost.json").exists():
        print(write_table(out.with_name("cost")))


if __name__ == "__main__":
    common.run_script(main)
