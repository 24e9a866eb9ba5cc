"""How many updates a token takes until its held-out pictures are right.

    python -m benchmarks.updates            the miniature's classes, in the paper's trajectory and
        in their own

A plain loop takes the same steps (tests/method/test_plain_loop.py), so these counts times the
seconds per update of benchmarks/cost.py are the seconds to accuracy of both. So are the steps of
the peer: textual inversion by the recipe of diffusers' script, whose word stands alone in the
prompt, where the config has real pictures. Finished classes are kept in --work (img/updates):
several calls may run beside each other, each for classes of its own, before one for all.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost import FOREVER, PAPER, PEER, PICTURES, name_setting, new_training, write_table
from command_line import parse_settings
from config import RunConfig, names_deciding
from evaluation.accuracy import judge_images
from evaluation.drawing import Condition, digest_json
from evaluation.read_image import load_squares
from evaluation.real_images import draw_missing_images, find_real_images
from method.textual_inversion import embed_first_word, learn_vectors
from method.update import compute_gradients
from prompt_datasets import TEMPLATES, TargetClass
from runs.session import Session
from system.paths import read_path
from system.tensor_files import read_tensors, write_tensors
from system.terminal import run_script
from utils import ROOT, write_json

ENOUGH, HELD_OUT = 0.9, 10  # share of so many pictures of a class, of seeds from 0
EVERY, AT_MOST = 3, 16  # judge every third update, of so many
STEPS = (5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200)  # of textual inversion, judged
AT_ONCE = 8  # classes that learn together


def open_session(config: RunConfig, class_index: str, work: Path, **changes) -> Session:
    """Open the session of a setting, with the classes `class_index`."""
    settings = {"class_index": class_index, "train": True, "output_path": str(work)}
    return Session(replace(config, **settings, num_train_epochs=AT_MOST, **FOREVER, **changes))


def train_classes(session: Session) -> dict[TargetClass, torch.Tensor]:
    """Train every class; return the vectors [updates, K, D] with which its images were drawn.

    Raises:
        UserError: a class that diverges.
    """
    config = session.config
    decisive = config.pick_settings(names_deciding("token"))
    folder = Path(config.output_path, digest_json(decisive)[:12])
    files = {}
    for target in session.targets:
        files[target] = folder / str(target.number) / "vectors.safetensors"
    waiting = [target for target, file in files.items() if not file.exists()]
    while waiting:
        together, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
        running = []
        for target in together:
            home = files[target].parent
            running.append(new_training(config, session.generator, target, home))
        while running:
            figures = compute_gradients(
                running,
                session.generator,
                session.loss,
                session.training_sampling,
                session.fitted_gradient,
            )
            for training, measured in zip(list(running), figures, strict=True):
                if training.finish_update(measured).stop:
                    vectors = torch.stack(training.past).cpu()
                    write_tensors(files[training.target], {"vectors": vectors})
                    running.remove(training)
    return {target: read_tensors(file)[0]["vectors"] for target, file in files.items()}


def measure_share(
    session: Session, target: TargetClass, vectors: torch.Tensor, phrase: str
) -> float:
    """Measure the accuracy of held-out pictures drawn with these vectors."""
    prompt = TEMPLATES[0].format(phrase)
    condition = Condition("", prompt, vectors, HELD_OUT)
    condition = condition._replace(
        folder=digest_json(session.drawer.describe_conditions([condition]))[:12]
    )
    folder = Path(session.config.output_path, "pictures", target.folder)
    session.drawer.draw_conditions([condition], folder, target.title)
    files = [folder / condition.folder / f"{seed}.png" for seed in range(HELD_OUT)]
    return judge_images(session.judge, files, target.index).accuracy.value


def count_updates(
    learned: dict[int, torch.Tensor], measure: Callable[[torch.Tensor], float]
) -> int | None:
    """Return the first of the updates {update: vectors} that reaches ENOUGH, or None."""
    for update, vectors in learned.items():
        if measure(vectors) >= ENOUGH:
            return update
    return None


def count_steps(session: Session) -> list[int | None]:
    """Count the steps that textual inversion takes for every class."""
    config, generator = session.config, session.generator
    file = Path(config.output_path, "inversion.safetensors")
    if not file.exists():
        pictures = [load_real_images(session, target) for target in session.targets]
        initializer = config.initializer_token
        start = [
            embed_first_word(generator, target.name, initializer) for target in session.targets
        ]
        learned = learn_vectors(
            generator,
            pictures,
            torch.stack(start),
            config.placeholder_token,
            list(STEPS),
            config.weight_decay,
        )
        write_tensors(file, {str(step): vectors for step, vectors in learned.items()})
    learned, _ = read_tensors(file)
    reached = []
    for i, target in enumerate(session.targets):
        of_class = {step: learned[str(step)][i] for step in STEPS}
        measure = partial(measure_share, session, target, phrase=config.placeholder_token)
        reached.append(count_updates(of_class, measure))
    return reached


def load_real_images(session: Session, target: TargetClass) -> torch.Tensor:
    """Load PICTURES real pictures [N, 3, H, W] of a class."""
    config = session.config
    work = Path(config.output_path)
    folders = {target: work / "real" / target.folder}
    source = config.real_images
    found = find_real_images(source, session.every_class(), folders, PICTURES, work / "cache")
    files = draw_missing_images(source, target, found[target][:PICTURES])
    return load_squares(files, config.height, config.width)


def summarise_classes(reached: list[int | None]) -> dict:
    """Return every class's updates to 0.9, None where it was not reached, and their median.

    The median is in words where there is none.
    """
    counts = [math.inf if updates is None else updates for updates in reached]
    median = statistics.median(counts)
    return {"median": median if median < math.inf else "not reached", "classes": reached}


def measure_setting(session: Session) -> dict:
    """Count how many updates the classes of a session take."""
    config = session.config
    reached, updates = [], []
    for target, vectors in train_classes(session).items():
        judged = {update: vectors[update] for update in range(0, len(vectors), EVERY)}
        phrase = f"{config.placeholder_token} {target.name}"
        measure = partial(measure_share, session, target, phrase=phrase)
        reached.append(count_updates(judged, measure))
        updates.append(len(vectors))
    return {**summarise_classes(reached), "updates": updates}


def main(argv: list[str] | None = None):
    """Count the updates of both trajectories and the steps of the peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/miniature.yml", help="settings (the miniature's)"
    )
    parser.add_argument("--class_index", default="all", help="which classes, as for run.py (all)")
    parser.add_argument(
        "--work",
        type=read_path,
        default=Path("img/updates"),
        help="keeps what is made for the next call (img/updates)",
    )
    parser.add_argument(
        "--out",
        type=read_path,
        default=ROOT / "docs/updates.json",
        help="where the result goes (docs/updates.json)",
    )
    options = parser.parse_args(argv)
    config, _ = parse_settings(["--config", options.config])
    results = {}
    for changes in ({}, PAPER):
        session = open_session(config, options.class_index, options.work, **changes)
        results[name_setting(session.config)] = measure_setting(session)
    if config.real_images:
        results[PEER] = {**summarise_classes(count_steps(session)), "judged": STEPS}
    about = {
        "target": ENOUGH,
        "held_out_seeds": HELD_OUT,
        "every": EVERY,
        "updates_at_most": AT_MOST,
    }
    write_json(options.out, {**about, "settings": results})
    print(json.dumps(results, indent=2))
    if options.out.with_name("cost.json").exists():
        print(write_table(options.out.with_name("cost")))


if __name__ == "__main__":
    run_script(main)
