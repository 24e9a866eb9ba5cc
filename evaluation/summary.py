"""All classes of a run together: the summary file, the tables on the terminal and the page."""

import glob
import sys
from collections.abc import Callable
from pathlib import Path

from evaluation.accuracy import accuracy_table, contexts_table, list_differences, load_metrics
from evaluation.fidelity import CODE, fidelity_table, measure_fidelity
from evaluation.files import RunFiles
from evaluation.images import ARMS, ORACLE, digest_json
from evaluation.report import write_report
from models.extractors import Extractor
from utils import UserError, error_message, read_json, require, stamp_file, write_json


def write_summary(runs: list[RunFiles], real: list[list[Path]], get_extractor: Callable[[], Extractor], features: list):
    """Print and write what the classes of `runs` gave, with distances to the `real` pictures of each class if any.

    `features` describes the extractor.
    """
    summary, report = runs[0].summary_file, runs[0].summary_report if len(runs) > 1 else runs[0].report_file
    for file in (summary, report):
        for half in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            half.unlink()  # of a killed process: only this one may write them now
    metrics = [load_metrics(run.metrics_file) for run in runs]
    classes, images = collect_classes(runs[0], metrics), metrics[0]["images"]
    distances = read_json(summary, "distribution")["distribution"] if summary.exists() else None
    write_json(summary, {"classes": classes, "distribution": distances})
    print(f"\naccuracy without -> with the token [Wilson 95 % interval], {images} images each, seeds 0 to "
          f"{images - 1}\n{accuracy_table(metrics).to_text()}")
    if metrics[0]["contexts"]:
        print("\nin other prompts\n" + contexts_table(metrics).to_text())
    if any(real):
        pictures = {str(found["class_index"]): found["pictures"] for found in metrics}
        stamps = [stamp_file(file) for files in real for file in files]
        digest = digest_json([pictures, features, stamps, CODE, *[ORACLE] * (ORACLE in metrics[0])])
        if not distances or distances.get("digest") != digest:  # else the summary holds just these already
            arms = {arm: [run.eval_images / arm / f"{seed}.png" for run in runs for seed in range(images)]
                    for arm in (*ARMS, ORACLE) if arm in metrics[0]}
            found = measure_fidelity(get_extractor(), arms, real, runs[0].cache)
            distances = {**found, "pictures": pictures, "digest": digest}
            write_json(summary, {"classes": classes, "distribution": distances})
        print("\n" + fidelity_table(distances).to_text())
    write_report(runs, report)
    print(f"\nreport: {report}\nall classes of run '{runs[0].images.name}': {summary}")


def collect_classes(run: RunFiles, ours: list[dict]) -> list[dict]:
    """The metrics of all classes of a run that were evaluated as `ours`; others may be evaluated again just now."""
    found = {}  # by number: a renamed class counts once
    for folder in sorted(run.summary_file.parent.glob(f"*/{glob.escape(run.images.name)}")):
        file = RunFiles(folder).metrics_file
        try:
            metrics = load_metrics(file)
            others = list_differences(metrics, ours[0])
            require(not others, f"'{file}' was evaluated with another {', '.join(others)}")
            found[metrics["class_index"]] = metrics
        except FileNotFoundError:
            continue
        except UserError as error:
            print(f"warning: left out of the summary: {error_message(error)}", file=sys.stderr)
    return list((found | {metrics["class_index"]: metrics for metrics in ours}).values())
