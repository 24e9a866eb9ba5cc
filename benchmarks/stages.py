"""Where the seconds of an update go: which network, with a graph or without, and back.

    python -m benchmarks.stages                     the miniature, in the paper's trajectory and in
        its own

A stage lasts until the next network starts, so the scheduler's steps count with the UNet's, the
loss with the classifier's.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benchmarks.cost import FOREVER, PAPER, TARGET, name_setting, new_training, open_session
from command_line import parse_settings
from config import RunConfig
from evaluation.tables import Table
from method.losses import cross_entropy
from method.update import GRAPHS, join_batches, token_gradient
from models.costs import watched_networks
from system.terminal import run_script

UPDATES = 4


def time_stages(config: RunConfig) -> dict[str, float]:
    """Time {stage: seconds} of an update of one class: mean of UPDATES, one to warm up."""
    session = open_session(config)
    generator, classifier = session.generator, session.classifier
    seconds, running = Counter(), ["", time.perf_counter()]

    def start_part(part: str, has_graph: bool, images: int):
        now = time.perf_counter()
        seconds[running[0]] += now - running[1]
        way = "back" if not images else "with a graph" if has_graph else "without a graph"
        running[:] = f"{part}, {way}", now

    with tempfile.TemporaryDirectory() as path:
        batch, vectors = join_batches(
            [new_training(config, generator, TARGET, Path(path))], generator.device
        )
        sampling, size = session.training_sampling, GRAPHS * len(batch.seeds)
        token_gradient(generator, cross_entropy(classifier), vectors, batch, sampling, size)
        with watched_networks(generator, classifier.model, start_part, lambda part, images: None):
            running[:] = "", time.perf_counter()
            for _ in range(UPDATES):
                token_gradient(generator, cross_entropy(classifier), vectors, batch, sampling, size)
            start_part("", False, 0)
    return {stage: total / UPDATES for stage, total in seconds.items() if stage}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/miniature.yml", help="settings of the run (the miniature's)"
    )
    config = replace(parse_settings(["--config", parser.parse_args(argv).config])[0], **FOREVER)
    for found in (replace(config, **PAPER), config):
        stages = time_stages(found)
        total = sum(stages.values())
        print(f"\n{name_setting(found)} images: {total:.3f} s per update\n")
        print(
            Table(
                ["stage", "s", "share"],
                [
                    [stage, f"{seconds:.3f}", f"{100 * seconds / total:.0f} %"]
                    for stage, seconds in stages.items()
                ],
            ).to_markdown()
        )


if __name__ == "__main__":
    run_script(main)
