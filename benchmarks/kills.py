"""Kill a run with SIGKILL at a random moment, give the same command again, compare with a run that nothing disturbed.

    python -m benchmarks.kills --kills 100            two classes of the miniature, trained and evaluated

Every other run begins in an empty folder, the others where the same run has ended before and is to be done anew.
Compared to the last bit are all files that a run leaves, but for its seconds (cost.json), the day in its report and the
lock. What a kill left must be readable, and the second command must not do again what was finished: finished updates'
pictures, evaluation pictures and tokens keep their times of change (seen where the folder was empty).
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

import run
from class_token import TOKEN_FILE
from learner import STATE_FILE
from outputs import COST_FILE
from utils import ROOT, find_path, read_yaml_mapping, require, write_json

SMALL = ["--train", "True", "--evaluate", "True", "--num_train_epochs", "8", "--epoch_size", "4", "--test_size", "6",
         "--target_accuracy", "1", "--real_images", "none", "--fresh_noise", "True", "--output_path", "."]


def begin(argv: list[str], folder: Path) -> int:
    """Start run.py in `folder`, in a process of its own that has imported everything already; its number.

    One thread: a fork carries none of the others along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    os.chdir(folder)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(run.main(argv))


def finish(argv: list[str], folder: Path):
    """Run to the end, which must be a good one."""
    _, status = os.waitpid(begin(argv, folder), 0)
    require(status == 0, f"run.py {' '.join(argv)} failed, see {folder.with_suffix('.log')}")


def killed(argv: list[str], folder: Path, after: float) -> bool:
    """Run and kill after so many seconds; False where the run was quicker than that."""
    child = begin(argv, folder)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """What a run left, without what depends on the clock or the process."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
             and path.name != COST_FILE and path.suffix != ".lock"}
    return {name: re.sub(rb"\d{4}-\d\d-\d\d", b"", data) if name.endswith(".html") else data
            for name, data in found.items()}


def unreadable(folder: Path) -> list[str]:
    """The files that cannot be read as what their name says; what a writer left under a temporary name is no file."""
    bad = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"):
        try:
            read(path)
        except Exception as error:  # every library has its own kind
            bad.append(f"{path}: {error}")
    return bad


def read(path: Path):
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    elif path.suffix == ".jsonl":
        [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".yml":
        require(read_yaml_mapping(str(path), ""), "no settings")
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".html":
        require(path.read_text().rstrip().endswith("</html>"), "no end")


def finished(folder: Path) -> dict[Path, int]:
    """Times of change of what must not be done again."""
    done = [*folder.rglob(TOKEN_FILE), *folder.glob("img/*/*/*/eval/**/[0-9]*.png")]
    for tokens in folder.glob("pipeline_token/*/*/*"):
        images, updates = folder / "img" / tokens.relative_to(folder / "pipeline_token") / "train", 0
        if (tokens / STATE_FILE).exists():
            with safe_open(tokens / STATE_FILE, "pt") as state:
                updates = len(state.get_slice("vectors")[:])
        done += [file for update in range(updates) for file in images.glob(f"{update:03d}/*.png")]
    return {path: path.stat().st_mtime_ns for path in done}


def phase(folder: Path) -> str:
    """Where a killed run was, by the class that it began last."""
    begun = sorted(folder.glob("pipeline_token/*/*/*"))
    if list(folder.glob("img/*/summary_*.json")):
        return "while writing summary and report"
    if not begun:
        return "before the first class"
    images = folder / "img" / begun[-1].relative_to(folder / "pipeline_token")
    names = {path.name for each in (begun[-1], images) for path in each.rglob("*")}
    signs = {"metrics.json": "after an evaluation", "drawn.json": "while drawing", TOKEN_FILE: "after a training",
             STATE_FILE: "between the first update and the last"}
    return next((name for sign, name in signs.items() if sign in names), "until the first update's end")


def kill_one(argv: list[str], folder: Path, draw: random.Random, seconds: float, whole: Path | None,
             expected: dict[str, bytes]) -> dict:
    """Kill at a random moment, resume, and say what came of it: from an empty folder, or a copy of a `whole` run."""
    while True:
        if whole:
            shutil.copytree(whole, folder)
        if killed(argv, folder, draw.uniform(0, seconds)):
            break
        shutil.rmtree(folder)
    found = {"phase": "of a run done anew" if whole else phase(folder), "unreadable": unreadable(folder)}
    before = {} if whole else finished(folder)
    finish(argv, folder)
    found["done_again"] = [str(path) for path, changed in before.items()
                           if not path.exists() or path.stat().st_mtime_ns != changed]
    after = contents(folder)
    found["differ"] = sorted(name for name in after.keys() | expected.keys() if after.get(name) != expected.get(name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yml", help="settings of the run (the miniature's)")
    parser.add_argument("--class_index", default="7,13", help="which classes (7,13)")
    parser.add_argument("--kills", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/kills.json", help="(docs/kills.json)")
    arguments = parser.parse_args()
    argv = ["--config", str(find_path(arguments.config)), "--class_index", arguments.class_index, *SMALL]
    draw, results = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        finish(argv, Path(work, "undisturbed"))
        seconds, expected = time.monotonic() - started, contents(Path(work, "undisturbed"))
        with tqdm(total=arguments.kills, unit="kill") as bar:
            for number in range(arguments.kills):
                whole = Path(work, "undisturbed") if number % 2 else None
                results.append(kill_one(argv, Path(work, "killed", str(number)), draw, seconds, whole, expected))
                shutil.rmtree(Path(work, "killed", str(number)))
                bar.update()
    wrong = [result for result in results if result["unreadable"] or result["differ"] or result["done_again"]]
    write_json(arguments.out, {
        "kills": len(results), "same_to_the_last_bit": sum(not result["differ"] for result in results),
        "unreadable_files": sum(len(result["unreadable"]) for result in results),
        "finished_work_done_again": sum(bool(result["done_again"]) for result in results),
        "killed": dict(Counter(result["phase"] for result in results).most_common()), "files": len(expected),
        "seconds_of_an_undisturbed_run": round(seconds, 1), "wrong": wrong})
    print(arguments.out.read_text())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
