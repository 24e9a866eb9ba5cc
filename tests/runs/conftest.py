"""What a process sees of a run's classes."""

from types import SimpleNamespace

from config import RunConfig
from prompt_datasets import class_name, target_class
from runs.folders import RunFolder
from runs.sweep import Sweep
from tests.conftest import LABELS


def sweep_over(tmp_path, start_over=False, is_finished=None, classifier="vit") -> Sweep:
    """What a process that starts now sees of three classes."""
    targets = [target_class(i, class_name(LABELS[i]), LABELS[i]) for i in range(3)]
    folders = {target: RunFolder(str(tmp_path), classifier, target, "demo") for target in targets}
    config = RunConfig(skip_exists=not start_over)
    sweep = Sweep(SimpleNamespace(folders=folders, config=config))
    if is_finished:
        sweep.is_finished = is_finished
    return sweep
