"""All classes of a run together: the summary file, the tables on the terminal and the page."""

import glob
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from evaluation.accuracy import (
    accuracy_table,
    before_and_after,
    contexts_table,
    list_differences,
    load_metrics,
)
from evaluation.fidelity import CODE, fidelity_table, measure_fidelity
from evaluation.files import RunFiles
from evaluation.images import ARMS, ORACLE, digest_json
from evaluation.report import MANY, write_report
from models.extractors import Extractor
from system.paths import stamp_file
from system.text_files import read_json
from utils import ROOT, UserError, error_message, require, write_json


def write_summary(runs: list[RunFiles], real: list[list[Path]], get_extractor: Callable[[], Extractor],
                  features: list) -> bool:
    """Print and write what the classes of `runs` gave, with distances to the `real` pictures of each class if any.

    `features` describes the extractor. Returns whether anything was to be written: what is there of just these classes'
    files stays as it is.
    """
    summary, report = runs[0].summary_file, runs[0].summary_report if len(runs) > 1 else runs[0].report_file
    for file in (summary, report):
        for half in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            half.unlink()  # of a killed process: only this one may write them now
    metrics = [load_metrics(run.metrics_file) for run in runs]
    sources = digest_json([digest_runs(runs), features, [stamp_file(file) for files in real for file in files], CODE])
    before = read_json(summary, "distribution") if summary.exists() else {}
    is_new = before.get("sources") != sources or not report.exists()
    distances = before.get("distribution")
    found = {"classes": collect_classes(runs[0], metrics), "distribution": distances} if is_new else before
    if is_new:
        write_json(summary, found)  # accuracies are kept whatever becomes of the rest
    print_accuracies(metrics, report, briefly=len(runs) > MANY)
    if any(real):
        distances = find_distances(runs, metrics, real, get_extractor, features, distances)
        print("\n" + fidelity_table(distances).to_text())
    if is_new:
        write_json(summary, {**found, "distribution": distances})  # the page reads it
        write_report(runs, report)
        write_json(summary, {**found, "distribution": distances, "sources": sources})
    if is_new or len(runs) <= MANY:
        print(f"\nreport: {report}\nall classes of run '{runs[0].images.name}': {summary}")
    return is_new


def digest_runs(runs: list[RunFiles]) -> list:
    """What tells that page and summary of `runs` are up to date.

    The content of their files, of the metrics of the run's other classes, and of the code that shows them.
    """
    shown = []
    for run in runs:
        files = (run.metrics_file, run.history_file, run.config_file, run.token_file)
        shown.append([run.images.parts[-3:], [digest_file(file) for file in files]])
    code = [ROOT / "evaluation" / name for name in ("report.html", "report.py", "summary.py")]
    return [shown, [digest_file(file) for file in (*find_metrics(runs[0]), *code)]]


def digest_file(file: Path) -> str | None:
    return sha256(file.read_bytes()).hexdigest() if file.exists() else None


def print_accuracies(metrics: list[dict], report: Path, briefly: bool):
    """The tables of a run; `briefly` all classes together alone, and where the page is."""
    images = metrics[0]["images"]
    if briefly:
        figures = [f"{before_and_after(metrics, role)} by the {role}" for role in metrics[0]["judges"]]
        print(f"{len(metrics)} classes, {images} images each: accuracy {', '.join(figures)}; see {report}")
        return
    print(f"\naccuracy without -> with the token [Wilson 95 % interval], {images} images each, seeds 0 to "
          f"{images - 1}\n{accuracy_table(metrics).to_text()}")
    if metrics[0]["contexts"]:
        print("\nin other prompts\n" + contexts_table(metrics).to_text())


def find_distances(runs: list[RunFiles], metrics: list[dict], real: list[list[Path]],
                   get_extractor: Callable[[], Extractor], features: list, before: dict | None) -> dict:
    """The distances of these pictures to `real` ones: those of `before` where they are of just these already."""
    pictures = {str(found["class_index"]): found["pictures"] for found in metrics}
    stamps = [stamp_file(file) for files in real for file in files]
    digest = digest_json([pictures, features, stamps, CODE, *[ORACLE] * (ORACLE in metrics[0])])
    if before and before.get("digest") == digest:
        return before
    images = metrics[0]["images"]
    arms = {arm: [run.eval_images / arm / f"{seed}.png" for run in runs for seed in range(images)]
            for arm in (*ARMS, ORACLE) if arm in metrics[0]}
    found = measure_fidelity(get_extractor(), arms, real, runs[0].cache)
    return {**found, "pictures": pictures, "digest": digest}


def find_metrics(run: RunFiles) -> list[Path]:
    """metrics.json of every class under a run's exp_id."""
    folders = run.summary_file.parent.glob(f"*/{glob.escape(run.images.name)}")
    files = [RunFiles(folder).metrics_file for folder in folders]
    return sorted(file for file in files if file.exists())


def collect_classes(run: RunFiles, ours: list[dict]) -> list[dict]:
    """The metrics of all classes of a run that were evaluated as `ours`; others may be evaluated again just now."""
    found = {}  # by number: a renamed class counts once
    for file in find_metrics(run):
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
