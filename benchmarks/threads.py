"""One CPU thread against all of them, on a machine that does nothing else and on a busy one.

    python -m benchmarks.threads            about six minutes on two cores; 8 GB of memory

Each figure is measured in a process of its own, the busy ones beside a process per core that only counts. An update is
the miniature's, with its own networks at other sizes too; 512 x 512 is one call of Stable Diffusion 1.4's UNet with
random weights.
"""

import argparse
import json
import os
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
from experiments.common import run_script

IMAGES = {64: 16, 128: 4, 256: 1}  # of an update, by the side of a picture
LARGE = 512
COUNTING = [sys.executable, "-c", "while True: pass"]


def measure_update(side: int) -> float:
    """Seconds of an update of the miniature with pictures of `side` x `side`."""
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    config = replace(config, **FOREVER, height=side, width=side, epoch_size=IMAGES[side])
    return sum(time_stages(config).values())


@torch.no_grad()
def measure_large_unet() -> float:
    """Seconds of one call of Stable Diffusion 1.4's UNet for one picture of 512 x 512, after one to warm up."""
    generator, _ = build_generator("sd14", "cpu")
    unet = generator.denoiser
    inputs = torch.randn(1, 4, 64, 64), torch.tensor(500), torch.randn(1, 77, 768)
    unet(*inputs)
    start = time.perf_counter()
    unet(*inputs)
    return time.perf_counter() - start


def measure_apart(side: int, threads: int, is_busy: bool) -> float:
    """The seconds of `side` in a new process on so many threads, beside one busy process per core or none."""
    others = [subprocess.Popen(COUNTING) for _ in range(os.cpu_count() if is_busy else 0)]
    try:
        done = subprocess.run([sys.executable, "-m", "benchmarks.threads", "--side", str(side)], check=True,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    finally:
        for process in others:
            process.kill()
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, choices=[*IMAGES, LARGE], help="only print this side's seconds")
    side = parser.parse_args().side
    if side:
        print(measure_large_unet() if side == LARGE else measure_update(side))
        return
    cores = os.cpu_count()
    table = Table(["picture", "machine", "one thread, s", f"{cores} threads, s", "one / all"], [])
    for side in (*IMAGES, LARGE):
        for is_busy in (False, True):
            one, every = (measure_apart(side, threads, is_busy) for threads in (1, cores))
            table.rows.append([f"{side} x {side}", "busy" if is_busy else "idle", f"{one:.2f}", f"{every:.2f}",
                               f"{one / every:.2f}"])
            print(table.to_text().splitlines()[-1], flush=True)
    print(table.to_markdown())


if __name__ == "__main__":
    run_script(main)
