"""Sweeps: many processes share the classes, each once; what was killed is done by the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import class_token
from learner import update
from run import main
from sweep import join
from tests.conftest import LABELS
from tests.test_run import error_of, flags
from utils import UserError

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
SETTINGS = ["--class_index", "1-3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "3", "--lr", "0.05",
            "--train_timesteps", "999", "600", "--fresh_noise", "True", "--skip_exists", "True",
            "--number_of_prompts", "1"]


def tokens(folder):
    return {path.parent.parent.name: class_token.load(path)[1] for path in folder.rglob("learned_embeds.safetensors")}


@pytest.fixture
def alone(tiny_config, tmp_path):
    """The three classes by one process."""
    assert main(flags(replace(tiny_config, output_path=str(tmp_path / "alone")), *SETTINGS)) == 0
    return tokens(tmp_path / "alone")


def test_two_processes_do_what_one_does(tiny_config, tmp_path, alone):
    command = [*LAUNCH, *flags(replace(tiny_config, output_path=str(tmp_path / "two")), *SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = tokens(tmp_path / "two")
    assert together.keys() == alone.keys() and len(alone) == 3
    assert all((together[name] - alone[name]).abs().max() < 1e-4 for name in alone)
    assert done.stdout.count("token: ") == 3 and done.stdout.count("all classes of run") == 1
    assert all(done.stdout.count(f"class {i} ({LABELS[i - 1]}): begins") == 1 for i in (1, 2, 3))
    summary = json.loads(next((tmp_path / "two").rglob("summary_demo.json")).read_text())
    assert [metrics["class_index"] for metrics in summary["classes"]] == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_process_leaves_its_class_to_the_next_start(tiny_config, tmp_path, alone):
    folder = tmp_path / "killed"
    command = [*LAUNCH, *flags(replace(tiny_config, output_path=str(folder)), *SETTINGS)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sweep:
        children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
        while not list(folder.rglob("training_state.safetensors")):  # in the middle of a class
            time.sleep(0.05)
            assert sweep.poll() is None
        victim = int(children.read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        assert sweep.wait(120) != 0
    before = tokens(folder)
    assert len(before) < 3
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    after = tokens(folder)
    assert all((after[name] - alone[name]).abs().max() < 1e-4 for name in alone)
    assert done.stdout.count("token: ") == 3 - len(before)
    assert "goes on where its training stopped" in done.stdout
    assert not list(folder.rglob("training_state.safetensors")) and not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_launched_sweep_stops_cleanly_and_goes_on(tiny_config, tmp_path):
    """Ctrl-C in a terminal reaches the launcher and its processes, and the launcher passes it on besides."""
    command = [*LAUNCH, *flags(replace(tiny_config, output_path=str(tmp_path / "stopped")), *SETTINGS, "--epoch_size",
                               "200", "--batch_size", "2")]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.rglob("training_state.safetensors")):
        time.sleep(0.05)
        assert sweep.poll() is None
    os.killpg(sweep.pid, signal.SIGINT)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode != 0 and err.count("stopped by SIGINT: nothing that was finished is lost") == 2
    states = [len(load_file(path)["vectors"]) for path in tmp_path.rglob("training_state.safetensors")]
    assert states and all(updates >= 1 for updates in states) and not list(tmp_path.rglob("*.tmp"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("goes on where its training stopped") == len(states)


def test_another_setting_is_another_run(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "2", "--skip_exists",
                 "True")
    assert main(argv) == 0
    before = tokens(tmp_path)
    assert main([*argv, "--device", "cpu", "--batch_size", "2"]) == 0  # what changes no result
    line = error_of(capsys, *argv, "--lr", "0.1")
    assert "was trained with lr 0.00125, now 0.1: another setting is another run" in line
    assert torch.equal(tokens(tmp_path)["0003_tiger_cat"], before["0003_tiger_cat"])
    assert main([*argv, "--lr", "0.1", "--skip_exists", "False"]) == 0
    config = yaml.safe_load(next(tmp_path.rglob("config.yml")).read_text())
    assert config["lr"] == 0.1


def test_a_class_that_fails_does_not_stop_the_others(tiny_config, tmp_path, capsys, monkeypatch):
    def diverging(config, learner, loss, accuracy):
        return update(config, learner, float("inf") if learner.job.class_index == 1 else loss, accuracy)

    monkeypatch.setattr("training.update", diverging)
    capsys.readouterr()
    assert main(flags(tiny_config, *SETTINGS, "--classes_at_once", "2")) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\x1b[A", "").splitlines()  # how bars move, where they had time to show
             if "class" in line and "%" not in line]
    assert lines[0].startswith("class 2 (crane, machine) failed: update 2 of class 2 (crane, machine) gave no number "
                               "as its loss, the last 3 updates neither: ")
    assert lines[-1] == "error: 1 of 3 classes failed, as said above: 2 (crane, machine)"
    assert tokens(tmp_path).keys() == {"0001_crane", "0003_tiger_cat"}
    summary = json.loads(next(tmp_path.rglob("summary_demo.json")).read_text())
    assert [metrics["class_index"] for metrics in summary["classes"]] == [1, 3]


@pytest.mark.slow
def test_compiled_networks_learn_the_same_tokens(tiny_config, tmp_path, alone, monkeypatch):
    """Traced and split into forward and backward as for any backend; inductor's minutes of C++ are left out."""
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self: (compiled.append(type(self).__name__), original(self, backend="aot_eager")))
    assert main(flags(replace(tiny_config, output_path=str(tmp_path / "compiled")), *SETTINGS, "--torch_compile",
                      "True")) == 0
    assert compiled == ["UNet2DConditionModel", "Decoder"]
    learned = tokens(tmp_path / "compiled")
    assert len(alone) == 3 and all((learned[name] - alone[name]).abs().max() < 1e-4 for name in alone)


@pytest.mark.parametrize("device, processes, gpus, expected", [
    ("cuda:1", 2, 2, "would put all processes on one GPU"), ("cuda", 2, 1, "no GPU for process 2 of this machine"),
    ("cpu", 2, 1, None), ("cuda:1", 1, 2, None), ("cuda", 2, 2, None)])
def test_one_process_a_gpu(monkeypatch, device, processes, gpus, expected):
    state = SimpleNamespace(is_main_process=True, num_processes=processes, local_process_index=processes - 1)
    monkeypatch.setattr("sweep.PartialState", lambda **_: state)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    taken = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    if expected:
        with pytest.raises(UserError, match=expected):
            join(device)
    else:
        join(device)
    assert taken == ([1] if device == "cuda" and not expected else [])
