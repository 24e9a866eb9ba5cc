"""Where a class keeps its files under one exp_id: the only place that knows their names."""

import os
from pathlib import Path

from utils import require

MANY = 50  # classes beyond which pages and terminals show less of each


class RunFiles:
    """The files of a class under one exp_id.

    Pictures are in img/<classifier>/<class>/<exp_id>, tokens under pipeline_token/ likewise.
    """

    def __init__(self, images: Path):
        self.images = images
        self.tokens = Path(*images.parts[:-4], "pipeline_token", *images.parts[-3:])
        self.token_file = self.tokens / "learned_embeds.safetensors"
        # a copy of the token file that training started from
        self.start_file = self.tokens / "initializer.safetensors"
        self.config_file = self.tokens / "config.yml"
        self.labels_file = self.tokens / "labels.txt"  # a zero-shot classifier's, as they were
        self.history_file = self.tokens / "history.jsonl"
        self.cost_file = self.tokens / "cost.json"
        self.state_file = self.tokens / "training_state.pt"  # until the token is there
        self.error_file = self.tokens / "error.txt"  # why the class failed last
        self.train_images = images / "train"
        # of some updates, for the film
        self.vectors_file = self.train_images / "vectors.safetensors"
        self.eval_images = images / "eval"
        self.metrics_file = self.eval_images / "metrics.json"
        self.grid_file = self.eval_images / "grid.png"
        self.report_file = images / "report.html"
        self.summary_file = images.parent.parent / f"summary_{images.name}.json"
        self.summary_report = images.parent.parent / f"report_{images.name}.html"
        # what is known of real pictures; it may be deleted
        self.cache = Path(*images.parts[:-4], "cache")


def find_run(path: Path) -> RunFiles:
    """Find the files of a run from its folder under img/ or under pipeline_token/."""
    parts = Path(os.path.abspath(path)).parts
    require(
        parts[-4:-3] in (("img",), ("pipeline_token",)),
        f"'{path}' is not a run's folder, such as img/inet/0283_tiger_cat/demo or "
        "pipeline_token/inet/0283_tiger_cat/demo",
    )
    return RunFiles(Path(*parts[:-4], "img", *parts[-3:]))


def locate_run(path: Path) -> RunFiles:
    """Find the files of a run from the folder of its pictures, which links may lead to or through.

    Tokens are beside the pictures, as the path is written or as it is on disk, whichever exists.
    """
    written = RunFiles(Path(os.path.abspath(path)))
    on_disk = RunFiles(path.resolve())
    return on_disk if on_disk.tokens.exists() and not written.tokens.exists() else written


def check_exported(paths: list[Path], out: Path, card: bool) -> list[RunFiles]:
    """Find the files of every run folder, each once.

    Imports nothing slow, so that a mistake is answered at once.

    Raises:
        UserError: a folder that is no run's, has no token or, for a card, no evaluation; `out` is a
            file.
    """
    require(out.is_dir() or not out.exists(), f"'{out}' is a file: --to takes a folder")
    runs = {run.images: run for run in map(find_run, paths)}
    for run in runs.values():
        require(
            run.token_file.is_file(),
            f"'{run.tokens}' holds no token: give folders such as "
            "img/inet/0283_tiger_cat/demo after `python run.py ... --train True`",
        )
        require(
            not card or run.metrics_file.is_file(),
            f"'{run.images}' holds no evaluation, which --card shows: "
            "run the command that trained it with `--evaluate True`",
        )
    return list(runs.values())
