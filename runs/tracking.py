"""Curves and pictures of every class in TensorBoard, Weights & Biases or Trackio, by Accelerate's trackers."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from method.trainer import HISTORY_KEYS, Trainer
from runs.folders import RunFolder
from utils import require

PACKAGES = ("tensorboard", "wandb", "trackio")
PROJECT = "class-tokens"
SHOWN = 8  # pictures per update


class TensorBoardOfEveryProcess(TensorBoardTracker):
    """Of a launcher's processes each writes the classes that it trains."""

    main_process_only = False


class RunTrackers:
    """The trackers of the classes that are being trained, one run each."""

    def __init__(self, report_to: str, output_path: str, settings: dict):
        """`report_to` is one of PACKAGES, or 'all' for those that are installed.

        Raises:
            UserError: a package that is missing.
        """
        wanted = PACKAGES if report_to == "all" else (report_to,)
        self.names = [name for name in wanted if importlib.util.find_spec(name)]
        require(self.names, f"report_to '{report_to}' needs {' or '.join(wanted)}, which is not installed: pip install "
                            "-r requirements-trackers.txt")
        self.folder, self.settings = Path(output_path, "tensorboard"), settings
        self.running: dict[RunFolder, list[GeneralTracker]] = {}
        PartialState()  # Accelerate's trackers want it

    def log_update(self, folder: RunFolder, trainer: Trainer, is_end: bool):
        """Log the last update of a class: HISTORY_KEYS and its first pictures; with the last one the run ends."""
        if folder not in self.running:
            self.running[folder] = [self.start_tracker(name, folder) for name in self.names]
        line = trainer.history[-1]
        files = sorted((trainer.image_folder / f"{line['update']:03d}").glob("*.png"))[:SHOWN]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        for tracker in self.running[folder]:
            tracker.log({key: line[key] for key in HISTORY_KEYS[1:] if line[key] is not None}, step=line["update"])
            log_images(tracker, images, line["update"])
            if is_end:
                tracker.finish()
        if is_end:
            del self.running[folder]

    def start_tracker(self, name: str, folder: RunFolder) -> GeneralTracker:
        """One class's run, with its settings."""
        title = "/".join(folder.images.parts[-3:])  # classifier, class, exp_id
        tracker = {"tensorboard": lambda: TensorBoardOfEveryProcess(title, self.folder),
                   "wandb": lambda: WandBTracker(PROJECT, name=title, reinit="create_new"),
                   "trackio": lambda: TrackioTracker(PROJECT, name=title)}[name]()
        tracker.start()
        tracker.store_init_configuration({key: value if isinstance(value, (bool, int, float, str)) else str(value)
                                          for key, value in self.settings.items()})
        return tracker


def log_images(tracker: GeneralTracker, images: np.ndarray, step: int):
    """Pictures uint8 [N, H, W, 3] of one update."""
    if tracker.name == "trackio":
        image = importlib.import_module("trackio").Image
        tracker.log({"pictures": [image(pixels) for pixels in images]}, step=step)
    elif tracker.name == "wandb":
        tracker.log_images({"pictures": list(images)}, step=step)
    else:
        tracker.log_images({"pictures": images}, step=step, dataformats="NHWC")
