"""All that a GPU must show, in one command, the most important first.

    python -m benchmarks.gpu --out DIR                the whole, about ten minutes on an H100;
        again: what is missing
    python -m benchmarks.gpu --plan                   the stages, their rows and how long each may
        take
    python -m benchmarks.gpu --tiny --out DIR         every stage on a CPU, with tiny networks

DIR/gpu.json and DIR/gpu.md grow by a row at a time. No weights are downloaded: what must be right
is shown on the miniature, what it costs on random weights of the published sizes.
"""

import argparse
import multiprocessing
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from system.terminal import choose_progress
from system.text_files import read_json
from utils import join_lines, require, write_json, write_text

choose_progress(quiet=True)

import diffusers
import torch
import transformers

from benchmarks.gpu_checks import WORK, list_checks, list_miniature_rows
from benchmarks.gpu_costs import list_costs, list_predictions
from evaluation.tables import Table
from system.paths import read_path
from system.terminal import run_script


class Stage(NamedTuple):
    title: str
    # of the folder, the device and `tiny`
    list_rows: Callable[[Path, str, bool], dict[str, Callable[[], dict]]]
    seconds: int  # at most
    expected: int  # seconds on an H100: estimates, which no card has confirmed


STAGES = {
    "right": Stage("Is it right?", list_checks, 180, 120),
    "miniature": Stage("The miniature on the card", list_miniature_rows, 180, 90),
    "cost": Stage("What Stable Diffusion's sizes cost (random weights)", list_costs, 400, 300),
    "thousand": Stage("A thousand classes, predicted", list_predictions, 10, 1),
}
TINY_SECONDS = (
    300  # for a stage at most, however busy the CPU; all take less than a minute together
)


def describe_device(device: str) -> dict[str, str]:
    """Name device and versions; call it in a process that computes on the device."""
    about = {
        "device": device,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if not device.startswith("cuda"):
        return {**about, "threads": str(torch.get_num_threads())}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return {
        **about,
        "device": f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB",
        "driver": driver[0] if driver else "unknown",
        "cuda": str(torch.version.cuda),
    }


def read_results(out: Path) -> dict:
    """Read what DIR/gpu.json holds so far.

    It holds facts about the device, {stage: {row: result}}, and how stages ended.
    """
    file = out / "gpu.json"
    if file.exists():
        return read_json(file, "about", "rows", "ended")
    return {"about": {}, "rows": {}, "ended": {}}


def write_results(out: Path, results: dict):
    """Write gpu.json, and gpu.md with a table for every stage."""
    write_json(out / "gpu.json", results)
    about = [f"{key} {value}" for key, value in results["about"].items()]
    parts = [f"# On a GPU\n\n{', '.join(about)}\n"]
    for name, stage in STAGES.items():
        parts.append(f"## {stage.title}\n")
        rows = results["rows"].get(name, {})
        if rows:
            parts.append(make_table(rows).to_markdown() + "\n")
        parts.append(results["ended"].get(name, "not run") + "\n")
    write_text(out / "gpu.md", "\n".join(parts))


def make_table(rows: dict[str, dict]) -> Table:
    """Make a table with a row per measurement and a column for every quantity measured."""
    header: dict[str, None] = {}
    for found in rows.values():
        header |= dict.fromkeys(found)
    table = Table(["", *header], [])
    for name, found in rows.items():
        cells = [show_value(found.get(key, "")) for key in header]
        table.rows.append([name, *cells])
    return table


def show_value(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def find_missing(name: str, out: Path, device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """List the rows of a stage that are missing or failed."""
    done = read_results(out)["rows"].get(name, {})
    return {
        row: measure
        for row, measure in STAGES[name].list_rows(out, device, tiny).items()
        if "failed" in done.get(row, {"failed": ""})
    }


def run_stage(name: str, out: Path, device: str, tiny: bool):
    """Measure the missing rows and write each one when it is done; a failure is a row too."""
    warnings.simplefilter("ignore", FutureWarning)
    diffusers.utils.logging.set_verbosity_error()
    shutil.rmtree(out / WORK, ignore_errors=True)  # of a run that was cut off
    results = read_results(out)
    results["about"] = results["about"] or describe_device(device)
    done = results["rows"].setdefault(name, {})
    for row, measure in find_missing(name, out, device, tiny).items():
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # whatever a card raises, the other rows go on
            found = {"passed": "no", "failed": f"{type(error).__name__}: {join_lines(error)[:300]}"}
        done[row] = {**found, "took s": round(time.monotonic() - started, 1)}
        print(
            f"{name}, {row}: "
            f"{', '.join(f'{key} {show_value(value)}' for key, value in done[row].items())}",
            flush=True,
        )
        write_results(out, results)
    shutil.rmtree(out / WORK, ignore_errors=True)


def run_stages(out: Path, device: str, tiny: bool, seconds: float):
    """Run every stage in a process of its own, within its budget and the whole's `seconds`."""
    end = time.monotonic() + seconds
    for name, stage in STAGES.items():
        budget = min(TINY_SECONDS if tiny else stage.seconds, end - time.monotonic())
        if budget <= 0 or not find_missing(name, out, device, tiny):
            continue
        process = multiprocessing.get_context("fork").Process(
            target=run_stage, args=(name, out, device, tiny)
        )
        process.start()
        process.join(budget)
        is_late = process.is_alive()
        process.kill()
        process.join()
        missing, results = find_missing(name, out, device, tiny), read_results(out)
        if is_late:
            ended = f"cut off after {budget:.0f} s"
        elif process.exitcode:
            ended = f"its process ended with code {process.exitcode}"
        elif missing:
            ended = f"missing: {'; '.join(missing)}"
        else:
            ended = "complete"
        results["ended"][name] = ended
        write_results(out, results)


def print_plan(out: Path, device: str):
    """Print what a run would do, in order."""
    for name, stage in STAGES.items():
        rows = stage.list_rows(out, device, False)
        print(
            f"{name}: {stage.title} About {stage.expected} s on an H100 (an estimate), "
            f"{stage.seconds} s at most."
        )
        print("\n".join(f"    {row}" for row in rows))
    print(f"about {sum(stage.expected for stage in STAGES.values()) / 60:.0f} minutes in all")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=read_path, default=Path("img/gpu"), help="where results go (img/gpu)"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1 (cuda)")
    parser.add_argument(
        "--seconds", type=float, default=600, help="for the whole; what is done by then stays (600)"
    )
    parser.add_argument("--plan", action="store_true", help="only print the stages")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on a CPU")
    options = parser.parse_args(argv)
    device = "cpu" if options.tiny else options.device
    if options.plan:
        print_plan(options.out, device)
    else:
        require(
            options.tiny or shutil.which("nvidia-smi"),
            "no NVIDIA GPU is here (no nvidia-smi was found): --tiny "
            "runs every stage on a CPU, --plan lists them",
        )
        run_stages(options.out, device, options.tiny, options.seconds)
        report_results(options.out)


def report_results(out: Path):
    """Print where the results are; raise UserError if something failed or is missing."""
    results = read_results(out)
    failed = []
    for stage, rows in results["rows"].items():
        for row, found in rows.items():
            if found.get("passed") == "no":
                failed.append(f"{stage}, {row}")
    missing = [name for name in STAGES if results["ended"].get(name) != "complete"]
    print(f"results: {out / 'gpu.md'}")
    require(not failed, f"not passed: {'; '.join(failed)}")
    require(not missing, f"not complete: {', '.join(missing)}; the same command continues")


if __name__ == "__main__":
    run_script(main)
