"""The benchmarks compare like with like: the plain loop takes our steps, and every figure is of the
right calls.
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from benchmarks import cost, stages, updates
from system.terminal import run_script
from utils import write_json


def write_settings(config, path):
    settings = asdict(replace(config, train=False, train_timesteps=[999, 600], epoch_size=3))
    path.write_text(
        yaml.safe_dump({key: value for key, value in settings.items() if value is not None})
    )


def test_cost_table(tiny_config, tmp_path):
    write_settings(replace(tiny_config, class_index=""), tmp_path / "tiny.yml")
    write_json(tmp_path / "updates.json", {"settings": {"[999, 600] 3": {"median": 4}}})
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.cost",
            "--config",
            tmp_path / "tiny.yml",
            "--updates",
            "1",
            "--rounds",
            "1",
            "--out",
            tmp_path / "cost",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "cost.json").read_text())["rows"]}
    plain, ours, eight = (rows[name] for name in rows if "short trajectory, 3 images" in name)
    paper, single = (
        rows["ours, paper's trajectory, 5 images"],
        rows["ours, paper's trajectory, 5 images, batches of 1"],
    )
    assert (plain["unet_images"], ours["unet_images"], eight["unet_images"]) == (12, 12, 12)
    # PNDM makes four steps of three, and memory for both graphs is at hand
    assert paper["unet_images"] == 5 * 2 * 4
    assert single["unet_images"] == 5 * (2 * 4 + 1)  # the last step's graph is made again
    assert ours["floor_seconds"] == eight["floor_seconds"] < paper["floor_seconds"]
    assert ours["bytes_per_class"] < 20_000 < plain["bytes_per_class"]
    (line,) = [
        line
        for line in (tmp_path / "cost.md").read_text().splitlines()
        if line.startswith(f"| {ours['name']} |")
    ]
    assert line.endswith(f"| 4 | {4 * ours['seconds_per_update']:.3g} | 12 |")


def test_the_peer_learns_from_real_pictures_of_a_class(tiny_config):
    """Drawn by its label, which the miniature's world knows and not every word."""
    config = replace(
        tiny_config, real_images="miniature.world:draw", classifier="miniature", labels=None
    )
    found = cost.measure_peer(config, 1)
    assert found["unet_images"] == 4 and found["seconds_per_update"] > 0


@pytest.fixture
def run_updates(tiny_config, tmp_path):
    """Runs the command for classes 1 and 2 of the tiny checkpoint and returns its JSON file."""

    def run_main():
        write_settings(tiny_config, tmp_path / "tiny.yml")
        run_script(
            lambda: updates.main(
                [
                    "--config",
                    str(tmp_path / "tiny.yml"),
                    "--class_index",
                    "1-2",
                    "--work",
                    str(tmp_path / "work"),
                    "--out",
                    str(tmp_path / "updates.json"),
                ]
            )
        )
        return json.loads((tmp_path / "updates.json").read_text())

    return run_main


def test_updates_to_accuracy(run_updates, tmp_path):
    found = run_updates()
    assert set(found["settings"]) == {"[999, 600] 3", "paper 5"}
    assert found["settings"]["paper 5"]["updates"] == [updates.AT_MOST] * 2
    written = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.*") if file.is_file()
    }
    assert run_updates() == found
    assert written == {file: file.stat().st_mtime_ns for file in written}  # nothing was made again


def test_the_median_is_in_words_where_most_classes_fail():
    assert updates.summarise_classes([4, None, 2]) == {"median": 4, "classes": [4, None, 2]}
    assert updates.summarise_classes([None, 2, None])["median"] == "not reached"


def test_nine_of_ten_are_nine_tenths():
    assert updates.count_updates({0: 8, 3: 9}, lambda vectors: vectors / 10) == 3
    assert updates.count_updates({0: 8, 3: 8}, lambda vectors: vectors / 10) is None


def test_stages_are_all_of_an_update(tiny_config, tmp_path, capsys):
    write_settings(replace(tiny_config, class_index=""), tmp_path / "tiny.yml")
    stages.main(["--config", str(tmp_path / "tiny.yml")])
    paper, own = capsys.readouterr().out.split("[999, 600] 3 images")
    ways = {
        "UNet": ("without a graph", "with a graph", "back"),
        "VAE": ("with a graph", "back"),
        "classifier": ("with a graph", "back"),
        "text encoder": ("with a graph", "back"),
    }
    for part, found in ways.items():
        assert all(f"| {part}, {way} |" in own and f"| {part}, {way} |" in paper for way in found)
    rows = [line.split(" | ") for line in own.splitlines() if " % |" in line]
    assert abs(sum(float(row[1]) for row in rows) - float(own.split()[1])) < 0.01
