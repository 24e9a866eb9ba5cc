"""All classes of a run together: the summary file, the tables on the terminal and the page."""

import glob
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from evaluation.accuracy import accuracy_table, before_and_after, contexts_table, list_differences
from evaluation.drawing import BETTER_WORDS, PAIR, digest_json
from evaluation.fidelity import CODE, fidelity_table, measure_fidelity
from evaluation.files import MANY, RunFiles
from evaluation.metrics import ClassMetrics, load_metrics
from evaluation.report import write_report
from models.extractors import Extractor
from system.paths import stamp_file
from system.terminal import print_warning
from system.text_files import read_json
from utils import UserError, error_message, require, write_json

PAGE_VERSION = 1  # raise it where pages and summaries of the same files look different


def write_summary(
    runs: list[RunFiles],
    real: list[list[Path]],
    get_extractor: Callable[[], Extractor],
    features: list,
) -> bool:
    """Print and write the results of the classes of `runs`.

    With distances to the `real` pictures of each class, if any; `features` describes the extractor.
    Returns whether anything had to be written: a summary of exactly these files is kept as it is.
    """
    summary = runs[0].summary_file
    report = runs[0].summary_report if len(runs) > 1 else runs[0].report_file
    delete_halves(summary, report)
    metrics = [load_metrics(run.metrics_file) for run in runs]
    has_real = any(real)
    stamps = [stamp_file(file) for files in real for file in files]
    sources = digest_json([digest_runs(runs), features, stamps, CODE, PAGE_VERSION])
    before = read_json(summary, "distribution") if summary.exists() else {}
    is_new = before.get("sources") != sources or not report.exists()
    distances = before.get("distribution")
    found = before
    if is_new:
        found = {"classes": collect_classes(runs[0], metrics), "distribution": distances}
        write_json(summary, found)  # accuracies are kept whatever becomes of the rest
    briefly = len(runs) > MANY
    print_accuracies(metrics, report, briefly)
    if has_real:
        distances = find_distances(runs, metrics, real, get_extractor, features, distances)
        print("\n" + fidelity_table(distances).to_text())
    if is_new:
        found = {**found, "distribution": distances}
        write_json(summary, found)  # the page reads it
        write_report(runs, report)
        write_json(summary, {**found, "sources": sources})
    if is_new or not briefly:
        name = runs[0].images.name
        print(f"\nreport: {report}\nall classes of run '{name}': {summary}")
    return is_new


def delete_halves(*files: Path):
    """Remove temporary files that a killed process left: only this process writes them now."""
    for file in files:
        for half in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            half.unlink()


def digest_runs(runs: list[RunFiles]) -> list:
    """Compute a digest that tells whether page and summary of `runs` are up to date.

    It covers the content of their files, and the metrics of the run's other classes.
    """
    shown = []
    for run in runs:
        files = (run.metrics_file, run.history_file, run.config_file, run.token_file)
        shown.append([run.images.parts[-3:], [digest_file(file) for file in files]])
    others = [digest_file(file) for file in find_metrics(runs[0])]
    return [shown, others]


def digest_file(file: Path) -> str | None:
    """Compute a digest of a file's content; None without the file."""
    return sha256(file.read_bytes()).hexdigest() if file.exists() else None


def print_accuracies(metrics: list[ClassMetrics], report: Path, briefly: bool):
    """Print the tables of a run; `briefly` only the pooled accuracy and where the page is."""
    images = metrics[0].images
    if briefly:
        parts = [found.conditions for found in metrics]
        figures = []
        for role in metrics[0].judges:
            figures.append(f"{before_and_after(parts, role)} by the {role}")
        accuracies = ", ".join(figures)
        print(f"{len(metrics)} classes, {images} images each: accuracy {accuracies}; see {report}")
        return
    print(
        f"\naccuracy without -> with the token [Wilson 95 % interval], {images} images each, "
        f"seeds 0 to {images - 1}\n{accuracy_table(metrics).to_text()}"
    )
    if metrics[0].contexts:
        print("\nin other prompts\n" + contexts_table(metrics).to_text())


def find_distances(
    runs: list[RunFiles],
    metrics: list[ClassMetrics],
    real: list[list[Path]],
    get_extractor: Callable[[], Extractor],
    features: list,
    before: dict | None,
) -> dict:
    """Return the distances of these pictures to `real` ones; `before` if it is of exactly these."""
    pictures = {str(found.class_index): found.pictures for found in metrics}
    stamps = [stamp_file(file) for files in real for file in files]
    conditions = list(PAIR)
    if BETTER_WORDS in metrics[0].conditions:
        conditions.append(BETTER_WORDS)
    digest = digest_json([pictures, features, stamps, CODE, conditions])
    if before and before.get("digest") == digest:
        return before
    files = {}
    for condition in conditions:
        files[condition] = []
        for run in runs:
            folder = run.eval_images / condition
            files[condition] += [folder / f"{seed}.png" for seed in range(metrics[0].images)]
    found = measure_fidelity(get_extractor(), files, real, runs[0].cache)
    return {**found, "pictures": pictures, "digest": digest}


def find_metrics(run: RunFiles) -> list[Path]:
    """Find the metrics.json of every class under a run's exp_id."""
    folders = run.summary_file.parent.glob(f"*/{glob.escape(run.images.name)}")
    files = [RunFiles(folder).metrics_file for folder in folders]
    return sorted(file for file in files if file.exists())


def collect_classes(run: RunFiles, ours: list[ClassMetrics]) -> list[dict]:
    """Collect, as JSON, the metrics of all classes of a run that were evaluated like `ours`.

    Another process may be evaluating others right now.
    """
    found = {}  # by number: a renamed class counts once
    for file in find_metrics(run):
        try:
            metrics = load_metrics(file)
            others = list_differences(metrics, ours[0])
            require(not others, f"'{file}' was evaluated with another {', '.join(others)}")
        except FileNotFoundError:
            continue
        except UserError as error:
            print_warning(f"left out of the summary: {error_message(error)}")
            continue
        found[metrics.class_index] = metrics
    for metrics in ours:
        found[metrics.class_index] = metrics
    return [asdict(metrics) for metrics in found.values()]
