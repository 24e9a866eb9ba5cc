"""Kill a run with SIGKILL at a random moment, give the same command again, compare with a run that
nothing disturbed.

    python -m tests.kills --kills 100            two classes of the miniature, trained and evaluated

Every other run begins in an empty folder; the rest start a finished one over (--skip_exists False),
are killed and completed without that flag. Compared bit for bit are all files that a run leaves,
but for its seconds (cost.json), the day in its report and the locks. What a kill left must be
readable, and the second command must not repeat what was finished: finished updates' pictures,
evaluation pictures and tokens keep their times of change (seen where the folder was empty).
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import trange

import run
import runs.evaluation  # noqa: F401
import runs.session  # noqa: F401
from command_line import parse_settings
from evaluation.read_image import read_image
from models.classifiers import load_labels
from prompt_datasets import class_names, select_classes
from runs.folders import RunFolder
from system.paths import find_path
from system.tensor_files import read_tensors
from system.text_files import read_json, read_json_lines, read_yaml
from utils import ROOT, require, write_json

SMALL = [
    "--train",
    "True",
    "--evaluate",
    "True",
    "--num_train_epochs",
    "8",
    "--epoch_size",
    "4",
    "--test_size",
    "6",
    "--target_accuracy",
    "1",
    "--real_images",
    "none",
    "--fresh_noise",
    "True",
    "--output_path",
    ".",
]
READERS = {
    ".png": read_image,
    ".safetensors": read_tensors,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".yml": lambda path: read_yaml(str(path), "lr: 0.001"),
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".html": lambda path: path.read_text().rstrip().endswith("</html>"),
}


def run_main(argv: list[str], folder: Path, threads: int):
    """run.py in `folder`; in a process of its own, forked from one that has imported everything
    already.
    """
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.stdout = sys.stderr = open(folder.with_suffix(".log"), "a")  # noqa: SIM115
    sys.exit(run.main(argv))


def start_process(
    argv: list[str], folder: Path, threads: int, kill_after: float | None = None
) -> int:
    """Run to the end, or until SIGKILL after so many seconds; the exit code, which is negative
    where it was killed.
    """
    process = multiprocessing.get_context("fork").Process(
        target=run_main, args=(argv, folder, threads)
    )
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    require(
        process.exitcode <= 0, f"run.py failed: {folder.with_suffix('.log').read_text()[-2000:]}"
    )
    return process.exitcode


def list_classes(argv: list[str], folder: Path) -> list[RunFolder]:
    """Where the run in `folder` keeps its classes."""
    config, _ = parse_settings(argv)
    labels = load_labels(config.classifier)
    return [
        RunFolder(str(folder), config.classifier, target, config.exp_id)
        for target in select_classes(config.class_index, labels, class_names(labels))
    ]


def read_contents(folder: Path) -> dict[str, bytes]:
    """What a run left, without what depends on the clock or the process."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "cost.json" and path.suffix != ".lock"
    }
    return {
        name: re.sub(rb"\d{4}-\d\d-\d\d", b"", data) if name.endswith(".html") else data
        for name, data in found.items()
    }


def find_unreadable(folder: Path) -> list[str]:
    """The files that cannot be read as what their name says; what a writer left under a temporary
    name is no file.
    """
    bad = []
    for path in sorted(path for path in folder.rglob("*.*") if path.suffix in READERS):
        try:
            require(READERS[path.suffix](path), "empty")
        except Exception as error:  # every library has its own kind
            bad.append(f"{path}: {error}")
    return bad


def list_finished(classes: list[RunFolder]) -> dict[Path, int]:
    """Times of change of what must not be made again."""
    done = []
    for files in classes:
        done += [*files.tokens.glob(files.token_file.name), *files.eval_images.rglob("[0-9]*.png")]
        updates = (
            len(READERS[".pt"](files.state_file)["history"]) if files.state_file.exists() else 0
        )
        done += [
            path
            for update in range(updates)
            for path in files.train_images.glob(f"{update:03d}/*.png")
        ]
    return {path: path.stat().st_mtime_ns for path in done}


def name_phase(classes: list[RunFolder]) -> str:
    """Where a killed run was, by the class that it began last."""
    last = ([files for files in classes if files.tokens.exists()] or classes)[-1]
    signs = {
        last.summary_file: "while writing summary and report",
        last.metrics_file: "after an evaluation",
        last.eval_images / "drawn.json": "while drawing",
        last.token_file: "after a training",
        last.state_file: "between the first update and the last",
        last.tokens: "until the first update's end",
    }
    return next((name for sign, name in signs.items() if sign.exists()), "before the first class")


def kill_once(
    argv: list[str],
    folder: Path,
    threads: int,
    draw_moment: Callable[[], float],
    whole: Path | None,
    expected: dict[str, bytes],
) -> dict:
    """Kill at a random moment, complete, and tell what came of it: from an empty folder, or a copy
    of a `whole` run.
    """
    code = 0
    while not code:  # a run that was quicker does not count
        shutil.rmtree(folder, ignore_errors=True)
        if whole:
            shutil.copytree(whole, folder)
        code = start_process(
            [*argv, "--skip_exists", str(not whole)], folder, threads, draw_moment()
        )
    classes = list_classes(argv, folder)
    found = {
        "phase": "while starting over" if whole else name_phase(classes),
        "unreadable": find_unreadable(folder),
    }
    before = {} if whole else list_finished(classes)
    start_process(argv, folder, threads)
    found["repeated"] = [
        str(path)
        for path, changed in before.items()
        if not path.exists() or path.stat().st_mtime_ns != changed
    ]
    after = read_contents(folder)
    found["differ"] = sorted(
        name for name in after.keys() | expected.keys() if after.get(name) != expected.get(name)
    )
    shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/miniature.yml", help="settings of the run (the miniature's)"
    )
    parser.add_argument("--class_index", default="7,13", help="which classes (7,13)")
    parser.add_argument("--kills", type=int, default=100, help="how many (100)")
    parser.add_argument("--threads", type=int, default=1, help="of every run (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/kills.json", help="(docs/kills.json)"
    )
    options = parser.parse_args()
    argv = [
        "--config",
        str(find_path(options.config).resolve()),
        "--class_index",
        options.class_index,
        *SMALL,
    ]
    draw, results = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as work:
        undisturbed, started = Path(work, "undisturbed"), time.monotonic()
        start_process(argv, undisturbed, options.threads)
        seconds, expected = time.monotonic() - started, read_contents(undisturbed)
        for number in trange(options.kills, unit="kill"):
            results.append(
                kill_once(
                    argv,
                    Path(work, str(number)),
                    options.threads,
                    lambda: draw.uniform(0, seconds),
                    undisturbed if number % 2 else None,
                    expected,
                )
            )
    wrong = [
        result
        for result in results
        if result["unreadable"] or result["differ"] or result["repeated"]
    ]
    write_json(
        options.out,
        {
            "kills": len(results),
            "identical": sum(not result["differ"] for result in results),
            "unreadable_files": sum(len(result["unreadable"]) for result in results),
            "finished_work_repeated": sum(bool(result["repeated"]) for result in results),
            "killed": dict(Counter(result["phase"] for result in results).most_common()),
            "files": len(expected),
            "threads": options.threads,
            "seconds_of_an_undisturbed_run": round(seconds, 1),
            "wrong": wrong,
        },
    )
    print(options.out.read_text())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
