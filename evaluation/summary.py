"""All classes of a run together: the summary file, the tables on the terminal and the page."""

import glob
import sys
from collections.abc import Callable
from pathlib import Path

from evaluation.accuracy import accuracy_table, contexts_table, load_metrics
from evaluation.fidelity import Extractor, fidelity_table, measure_fidelity
from evaluation.images import ARMS, digest_json
from evaluation.report import write_report
from prompt_datasets import TargetClass
from utils import UserError, error_message, read_json, write_json


def write_summary(summary: Path, report: Path, evaluated: dict[TargetClass, Path],
                  real: dict[TargetClass, list[Path]] | None, get_extractor: Callable[[], Extractor], features: str):
    """Print and write what the classes in `evaluated` {class: eval folder} gave, beside all classes of the same run.

    Distances to the pictures in `real` are measured over `evaluated`, unless `summary` holds just these already;
    `features` names the extractor's setting.
    """
    for half in (*summary.parent.glob(f".{glob.escape(summary.name)}.*.tmp"),
                 *report.parent.glob(f".{glob.escape(report.name)}.*.tmp")):
        half.unlink()  # of a killed process: only this one may write them now
    metrics = [load_metrics(folder / "metrics.json") for folder in evaluated.values()]
    run = next(iter(evaluated.values())).parent.name
    classes = collect_classes(summary.parent, run, [folder / "metrics.json" for folder in evaluated.values()])
    before = read_json(summary, "distribution")["distribution"] if summary.exists() else None
    write_json(summary, {"classes": classes, "distribution": before})
    images = metrics[0].images
    print(f"\naccuracy without -> with the token [Wilson 95 % interval], {images} images each, seeds 0 to "
          f"{images - 1}\n{accuracy_table(metrics).to_text()}")
    if metrics[0].contexts:
        print("\nin other prompts\n" + contexts_table(metrics).to_text())
    if real:
        pictures = {str(found.class_index): found.pictures for found in metrics}
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns]
                  for target in evaluated for file in real[target]]
        digest = digest_json([pictures, features, stamps])
        if not before or before.get("digest") != digest:
            arms = {arm: [folder / arm / f"{seed}.png" for folder in evaluated.values() for seed in range(images)]
                    for arm in ARMS}
            before = {**measure_fidelity(get_extractor(), arms, [real[target] for target in evaluated]),
                      "pictures": pictures, "digest": digest}
            write_json(summary, {"classes": classes, "distribution": before})
        print("\n" + fidelity_table(before).to_text())
    write_report([folder.parent for folder in evaluated.values()], report)
    print(f"\nreport: {report}\nall classes of run '{run}': {summary}")


def collect_classes(folder: Path, run: str, ours: list[Path]) -> list[dict]:
    """The metrics of all classes of a run, `ours` last; others may be evaluated again just now."""
    found = {}  # by number: a renamed class counts once
    for file in [*sorted(folder.glob(f"*/{glob.escape(run)}/eval/metrics.json")), *ours]:
        try:
            metrics = read_json(file, "class_index")
            found[metrics["class_index"]] = metrics
        except FileNotFoundError:
            continue
        except UserError as error:
            print(f"warning: left out of the summary: {error_message(error)}", file=sys.stderr)
    return list(found.values())
