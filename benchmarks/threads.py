"""How torch's CPU threads should wait: on a machine that does nothing else, and on a busy one.

    python -m benchmarks.threads            about seventeen minutes on two cores; 8 GB of memory

One thread, all of them as OpenMP leaves them (they spin for a while), and all of them as we set
them (they sleep: OMP_WAIT_POLICY=PASSIVE, in utils.py). Each figure is measured in processes of its
own, beside one process per core that only counts where the machine is busy. An update is the
miniature's, with its own networks at 256 x 256 too; 512 x 512 is one call of Stable Diffusion 1.4's
UNet with random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from benchmarks.cost import FOREVER
from benchmarks.random_weights import build_generator
from benchmarks.stages import time_stages
from command_line import parse_settings
from evaluation.tables import Table
from system.terminal import run_script

IMAGES = {64: 16, 256: 1}  # of an update, by the side of a picture
LARGE = 512
ROUNDS = 3
# libgomp's own default
WAYS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all, spinning": {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "300000",
    },
    "all, sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
}
COUNTING = [sys.executable, "-c", "while True: pass"]


def measure_update(side: int) -> float:
    """Time an update of the miniature with pictures of `side` x `side`, in seconds."""
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    config = replace(config, **FOREVER, height=side, width=side, epoch_size=IMAGES[side])
    return sum(time_stages(config).values())


@torch.no_grad()
def measure_large_unet() -> float:
    """Time one call of SD 1.4's UNet for one 512 x 512 picture, after one to warm up."""
    generator, _ = build_generator("sd14", "cpu")
    unet = generator.denoiser
    inputs = torch.randn(1, 4, 64, 64), torch.tensor(500), torch.randn(1, 77, 768)
    unet(*inputs)
    start = time.perf_counter()
    unet(*inputs)
    return time.perf_counter() - start


def measure_apart(side: int, settings: dict[str, str]) -> float:
    """Time `side` in a new process with only these OpenMP variables."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.threads", "--side", str(side)],
        check=True,
        env={**environment, **settings},
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_row(side: int, is_busy: bool) -> list[float]:
    """Measure the median seconds of `side` in each of WAYS, taken in turns."""
    others = [subprocess.Popen(COUNTING) for _ in range(os.cpu_count() if is_busy else 0)]
    try:
        rounds = []
        for _ in range(1 if side == LARGE else ROUNDS):
            rounds.append([measure_apart(side, settings) for settings in WAYS.values()])
    finally:
        for process in others:
            process.kill()
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side", type=int, choices=[*IMAGES, LARGE], help="only print this side's seconds"
    )
    side = parser.parse_args().side
    if side:
        print(measure_large_unet() if side == LARGE else measure_update(side))
        return
    table = Table([f"seconds, {os.cpu_count()} cores", *WAYS], [])
    for side in (*IMAGES, LARGE):
        for is_busy in (False, True):
            seconds = measure_row(side, is_busy)
            row = [
                f"{side} x {side}, {'busy' if is_busy else 'idle'}",
                *(f"{one:.2f}" for one in seconds),
            ]
            print(*row, file=sys.stderr, flush=True)
            table.rows.append(row)
    print(table.to_markdown())


if __name__ == "__main__":
    run_script(main)
