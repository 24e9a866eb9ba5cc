"""Curves and pictures in TensorBoard, Weights & Biases or Trackio.

Each process writes the classes that it trains: no tracker joins a launcher's process group.
"""

import contextlib
import contextvars
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from PIL import Image

from method.class_training import HISTORY_KEYS, ClassTraining
from runs.folders import RunFolder
from system.terminal import print_warning
from utils import join_lines, require

PROJECT = "class-tokens"
SHOWN = 8  # pictures per update


class TrackedRun(Protocol):
    """One class in one tracker.

    Made with its title (classifier/class/exp_id), the output folder and the settings.
    """

    def log_update(self, values: dict[str, float], images: np.ndarray, step: int):
        """Log one update's figures and its first pictures, uint8 [N, H, W, 3]."""

    def finish_run(self):
        """End the run: the class is trained, or failed."""


class TensorBoardRun:
    """Event files in <output>/tensorboard/<title>."""

    def __init__(self, title: str, output: Path, settings: dict):
        from torch.utils.tensorboard import SummaryWriter  # here: the package is optional

        self.writer = SummaryWriter(str(output / "tensorboard" / title))
        self.writer.add_text("settings", f"```\n{yaml.safe_dump(settings, sort_keys=False)}```")

    def log_update(self, values: dict[str, float], images: np.ndarray, step: int):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.add_images("pictures", images, step, dataformats="NHWC")

    def finish_run(self):
        self.writer.close()


class WandbRun:
    """A run of the project, its local files in <output>/wandb."""

    def __init__(self, title: str, output: Path, settings: dict):
        import wandb

        self.make_image = wandb.Image
        self.run = wandb.init(
            project=PROJECT, name=title, config=settings, dir=str(output), reinit="create_new"
        )

    def log_update(self, values: dict[str, float], images: np.ndarray, step: int):
        pictures = [self.make_image(pixels) for pixels in images]
        self.run.log({**values, "pictures": pictures}, step=step)

    def finish_run(self):
        self.run.finish()


class TrackioRun:
    """A run of the project in Trackio's own folder."""

    def __init__(self, title: str, output: Path, settings: dict):
        import trackio

        self.make_image = trackio.Image
        # in a context of its own: trackio ends the run before, and other classes may be learning
        self.run = contextvars.Context().run(trackio.init, PROJECT, name=title, config=settings)

    def log_update(self, values: dict[str, float], images: np.ndarray, step: int):
        pictures = {f"picture {i}": self.make_image(pixels) for i, pixels in enumerate(images)}
        self.run.log({**values, **pictures}, step=step)

    def finish_run(self):
        with contextlib.redirect_stdout(io.StringIO()):  # it asks to wait, for every class
            self.run.finish()


TRACKERS: dict[str, Callable[[str, Path, dict], TrackedRun]] = {
    "tensorboard": TensorBoardRun,
    "wandb": WandbRun,
    "trackio": TrackioRun,
}


class RunTrackers:
    """The trackers of the classes in training, with one run each.

    A tracker that fails is left out from then on.
    """

    def __init__(self, report_to: str, output_path: str, settings: dict):
        """Open trackers; `report_to` is one of TRACKERS, or 'all' that are installed.

        Raises:
            UserError: a package that is missing.
        """
        wanted = TRACKERS if report_to == "all" else (report_to,)
        self.names = [name for name in wanted if importlib.util.find_spec(name)]
        require(
            self.names,
            f"report_to '{report_to}' needs {' or '.join(wanted)}, which is not installed: pip "
            "install -r requirements-trackers.txt",
        )
        self.output, self.settings = Path(output_path), make_plain(settings)
        self.running: dict[tuple[RunFolder, str], TrackedRun] = {}

    def log_update(self, folder: RunFolder, training: ClassTraining, is_end: bool):
        """Log the last update of a class: HISTORY_KEYS and its first pictures.

        With the last one the run ends.
        """
        line = training.history[-1]
        step = line["update"]
        values = {key: line[key] for key in HISTORY_KEYS[1:] if line[key] is not None}
        files = sorted((training.image_folder / f"{step:03d}").glob("*.png"))[:SHOWN]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        for name in list(self.names):
            try:
                run = self.running.get((folder, name)) or self.start_run(folder, name)
                run.log_update(values, images, step)
                if is_end:
                    self.running.pop((folder, name)).finish_run()
            except Exception as error:  # of its own kinds, and no reason to end a training
                self.names.remove(name)
                reason = f"{type(error).__name__} {join_lines(error)[:200]}"
                print_warning(f"report_to {name} failed and gets no more data: {reason}")

    def start_run(self, folder: RunFolder, name: str) -> TrackedRun:
        title = "/".join(folder.images.parts[-3:])  # classifier, class, exp_id
        run = TRACKERS[name](title, self.output, self.settings)
        self.running[folder, name] = run
        return run


def make_plain(settings: dict) -> dict:
    """Convert settings into what every tracker takes: lists and None as text."""
    return {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in settings.items()
    }
