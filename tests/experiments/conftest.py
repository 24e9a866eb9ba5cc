"""Experiments on the miniature, cut down to a smoke test: their command runs, and its results are
read back.
"""

import importlib
import json

import pytest
import yaml
from PIL import Image

from experiments.study import open_study, parse_options
from utils import ROOT

SMALL = {"num_train_epochs": 2, "epoch_size": 4, "test_size": 2, "num_inference_steps": 3}


@pytest.fixture
def write_settings(tmp_path):
    """Writes the miniature's settings with changes to a file, and returns its path."""

    def write_file(**changes) -> str:
        values = yaml.safe_load((ROOT / "configs/miniature_guided.yml").read_text())
        (tmp_path / "small.yml").write_text(yaml.safe_dump({**values, **SMALL, **changes}))
        return str(tmp_path / "small.yml")

    return write_file


@pytest.fixture
def settings(write_settings) -> str:
    return write_settings()


@pytest.fixture
def run_experiment(tmp_path):
    """Runs a command's quick form and returns its JSON file, checked against its pages."""

    def run_main(name: str, *flags: str, **parameters) -> dict:
        out = tmp_path / "out"
        importlib.import_module(f"experiments.{name}").main(
            ["--quick", "--work", str(tmp_path / "work"), "--out", str(out), *flags], **parameters
        )
        result = json.loads((out / f"{name}.json").read_text())
        assert Image.open(out / result["figure"]).width > 100
        page = (out / f"{name}.md").read_text()
        assert result["found"] in page and result["command"] in page
        assert all(comparison in page for comparison in result["tests"])
        assert result["command"].startswith(f"python -m experiments.{name} --quick")
        assert f"[{name}]({name}.md)" in (out / "README.md").read_text()
        assert result["kind"] in ("tested", "exploratory", "shown")
        assert result["config"]["model"] == "miniature/weights/generator"
        return result

    return run_main


@pytest.fixture
def study(settings, tmp_path):
    return open_study(
        parse_options(
            "", ["--config", settings, "--class_index", "7", "--work", str(tmp_path)], "7"
        )
    )
