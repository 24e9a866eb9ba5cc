"""--report_to: what the trackers' own files hold afterwards, and that a tracker which fails ends no
training.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from run import main
from runs import tracking
from tests.conftest import error_of, flags
from utils import ROOT

BOTH = [
    "--class_index",
    "2,3",
    "--train",
    "True",
    "--classes_at_once",
    "2",
    "--num_train_epochs",
    "3",
]
KEYS = ("loss", "accuracy", "grad_norm", "vector_norm")


def read_histories(folder: Path) -> dict[str, list[dict]]:
    """{classifier/class/exp_id: the lines of history.jsonl} of both classes."""
    files = sorted(folder.glob("pipeline_token/*/*/demo/history.jsonl"))
    assert len(files) == 2
    return {
        "/".join(file.parts[-4:-1]): [json.loads(line) for line in file.read_text().splitlines()]
        for file in files
    }


def check_tensorboard(folder: Path):
    """One run per class, every update's figures and pictures in it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    histories = read_histories(folder)
    found = {
        str(file.parent.relative_to(folder / "tensorboard"))
        for file in folder.rglob("events.out.tfevents.*")
    }
    assert found == histories.keys()
    for title, lines in histories.items():
        run = accumulator.EventAccumulator(str(folder / "tensorboard" / title))
        run.Reload()
        for key in KEYS:
            events = run.Scalars(key)
            assert [event.step for event in events] == [line["update"] for line in lines]
            assert [event.value for event in events] == pytest.approx(
                [line[key] for line in lines], rel=1e-6
            )
        assert [event.step for event in run.Images("pictures")] == [
            line["update"] for line in lines
        ]
        assert (
            "num_train_epochs: 3"
            in run.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
        )


def read_wandb_records(log: Path):
    """What a .wandb file holds: blocks of 32 kB, in them parts of records, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = log.read_bytes(), 7, b""  # after the file's own head
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # a block's padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def check_wandb(folder: Path):
    """One offline run per class: its history in its log, its pictures beside it."""
    histories, found = read_histories(folder), {}
    for log in folder.glob("wandb/offline-run-*/*.wandb"):
        lines, titles = [], set()
        for record in read_wandb_records(log):
            if record.HasField("run"):
                titles.add(record.run.display_name)
            if record.HasField("history"):
                items = {
                    ".".join(item.nested_key) or item.key: item.value_json
                    for item in record.history.item
                }
                lines.append({key: json.loads(value) for key, value in items.items()})
        (title,) = titles
        found[title] = lines
        assert list((log.parent / "files/media/images").glob("*.png"))
    assert found.keys() == histories.keys()
    for title, lines in histories.items():
        for key in KEYS:
            assert [line[key] for line in found[title]] == pytest.approx(
                [line[key] for line in lines]
            )
        assert all(any(key.startswith("pictures") for key in line) for line in found[title])


def check_trackio(folder: Path, home: Path):
    """One run per class in trackio's database, every update with its pictures."""
    (database,) = home.glob("class-tokens*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY step"
        ).fetchall()
    for title, lines in read_histories(folder).items():
        ours = [(step, json.loads(text)) for name, step, text in rows if name == title]
        assert [step for step, _ in ours] == [line["update"] for line in lines]
        for key in KEYS:
            assert [found[key] for _, found in ours] == pytest.approx([line[key] for line in lines])
        assert all("picture 0" in found for _, found in ours)
    assert list(home.rglob("*.png"))


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """An environment in which no tracker asks for a network."""
    pytest.importorskip("trackio")
    pytest.importorskip("wandb")
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **variables}


def test_all_three_trackers_hold_every_update(tiny_config, tmp_path, offline):
    """In a process whose launcher's variables speak of another one, which nobody waits for."""
    argv = [sys.executable, str(ROOT / "run.py"), *flags(tiny_config, *BOTH, "--report_to", "all")]
    launched = {
        **offline,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29512",
    }
    done = subprocess.run(
        argv, cwd=tmp_path, env=launched, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    check_tensorboard(tmp_path)
    check_wandb(tmp_path)
    check_trackio(tmp_path, tmp_path / "trackio")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_launcher_s_processes_have_a_run_per_class(tiny_config, tmp_path, offline, name):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / "run.py"),
        *flags(tiny_config, *BOTH, "--classes_at_once", "1", "--report_to", name),
    ]
    done = subprocess.run(
        launch,
        cwd=tmp_path,
        env={**offline, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "failed and gets no" not in done.stderr, done.stderr
    if name == "tensorboard":
        check_tensorboard(tmp_path)
    elif name == "wandb":
        check_wandb(tmp_path)
    else:
        check_trackio(tmp_path, tmp_path / "trackio")


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning(tiny_config, tmp_path, capsys, monkeypatch, when):
    """Told once; both classes are trained all the same, and another tracker goes on."""

    class Broken:
        def __init__(self, *_):
            assert when != "start", "no network"

        def log_update(self, *_):
            assert when != "log", "no network"

        def finish_run(self):
            assert when != "finish", "no network"

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name != "trackio")
    assert main(flags(tiny_config, *BOTH, "--report_to", "all")) == 0
    assert capsys.readouterr().err.count("report_to wandb failed") == 1
    check_tensorboard(tmp_path)


def test_a_missing_package_is_one_line(capsys, tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name, needed in (("wandb", "wandb"), ("all", "tensorboard or wandb or trackio")):
        message = error_of(
            capsys,
            *flags(tiny_config, class_index=3, train=True, report_to=name),
        )
        assert f"report_to '{name}' needs {needed}, which is not installed" in message
    assert not list(tmp_path.glob("pipeline_token/*"))
