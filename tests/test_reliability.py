"""Nothing lost: kills, signals, a full disk, two runs at once, broken files; always the same command again."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

import report
import run
import training
from benchmarks.kills import contents
from config import RunConfig
from run import main
from stopping import Stopped
from tests.test_run import error_of, flags

ROOT = Path(__file__).parent.parent
LONG = ["--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "40", "--lr", "0.01",
        "--early_stopping", "40", "--train_timesteps", "999", "600", "--fresh_noise", "True", "--test_size", "30",
        "--seed", "100", "--batch_size", "1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs happen in folders below, and write to '.', so that what they leave can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def argv(tiny_model, tiny_classifier):
    """A command that trains and evaluates for a while."""
    config = RunConfig(model=tiny_model, classifier=tiny_classifier)
    return [sys.executable, str(ROOT / "run.py"), *flags(config, *LONG)]


@pytest.fixture(scope="module")
def undisturbed(work, argv):
    """What that command leaves."""
    assert finished(work / "undisturbed", argv)[0] == 0
    return contents(work / "undisturbed")


def in_folder(folder, argv, **options):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(folder, argv, **options) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and the lines on stderr but for those of bars."""
    process = in_folder(folder, argv, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, [line for line in err.splitlines() if line.strip() and "it/s" not in line
                                     and "%|" not in line]


def wait_for(folder, pattern, process):
    """Until a file of this name is there, while the process works."""
    until = time.monotonic() + 120
    while not list(folder.rglob(pattern)):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


def test_killed_anywhere_it_goes_on_to_the_last_bit(tiny_config, tmp_path):
    """The short form of docs/reliability.md's hundred."""
    names = ("model", "classifier", "device", "mixed_precision", "height", "width", "num_inference_steps")
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump({name: asdict(tiny_config)[name] for name in names}))
    done = subprocess.run([sys.executable, "-m", "benchmarks.kills", "--config", tmp_path / "tiny.yml", "--class_index",
                           "3,1", "--kills", "6", "--out", tmp_path / "kills.json"], capture_output=True, text=True,
                          timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == found["same_to_the_last_bit"] == 6 and found["unreadable_files"] == 0
    assert found["files"] > 60


@pytest.mark.parametrize("number, code, moment", [(signal.SIGINT, 130, "training_state.safetensors"),
                                                  (signal.SIGTERM, 143, "drawn.json")])
def test_a_signal_stops_cleanly(work, argv, undisturbed, number, code, moment):
    folder = work / f"stopped by {code}"
    process = in_folder(folder, argv)
    wait_for(folder, moment, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert err.strip().splitlines()[-1] == (f"stopped by {signal.Signals(number).name}: nothing that was finished is "
                                            "lost, and the same command goes on from here")
    code, out, _ = finished(folder, argv)
    assert code == 0 and ("has its token" if moment == "drawn.json" else "goes on where its training stopped") in out
    assert contents(folder) == undisturbed


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_libraries_load(work, argv, number, code):
    process = in_folder(work / f"at start {code}", argv)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code and (out, err.strip()) == ("", f"stopped by {signal.Signals(number).name}")
    assert not contents(work / f"at start {code}")


def test_a_second_signal_does_not_wait(work, argv):
    process = in_folder(work / "at once", [*argv, "--epoch_size", "3000"])
    wait_for(work / "at once", "config.yml", process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # as a launcher passes it on: the same request
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "SIGINT: stopping after this update; once more to stop at once" in err


@pytest.mark.parametrize("size", [1000, 6000])
def test_a_full_disk_is_one_line(work, argv, undisturbed, size):
    """The system refuses to write files beyond a size, as it does on a full disk; the rest is as it was."""
    folder = work / f"full {size}"
    code, _, lines = finished(folder, argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: '") and "': File too large; make room: what is on the disk is whole" in lines[0]
    assert not list(folder.rglob("*.tmp"))
    assert finished(folder, argv)[0] == 0
    assert contents(folder) == undisturbed
    code, _, _ = finished(folder, argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    assert code == 2 and contents(folder) == undisturbed  # to train anew there must be room first


def test_two_runs_do_not_write_one_folder(work, argv):
    folder, argv = work / "both", [*argv, "--num_train_epochs", "400", "--early_stopping", "400"]
    first = in_folder(folder, argv)
    wait_for(folder, "training_state.safetensors", first)
    before = contents(folder).keys()
    code, _, lines = finished(folder, argv)
    assert code == 2 and lines == [
        f"error: class 3 of run 'demo' is being written by process {first.pid} on {os.uname().nodename[:60]}: wait for "
        "it, or give another --exp_id"]
    assert before <= contents(folder).keys()
    assert finished(folder, [*argv, "--class_index", "1", "--num_train_epochs", "1", "--evaluate", "False"])[0] == 0
    first.kill()
    first.communicate()
    code, out, _ = finished(folder, [*argv, "--num_train_epochs", "1", "--evaluate", "False"])
    assert code == 0 and "begins its training" in out  # a crash leaves no lock


def test_what_another_run_finished_meanwhile_stays(tiny_config, tmp_path, monkeypatch, capsys):
    """It began and ended between this one's first look and its lock."""
    argv = flags(tiny_config, *LONG[:6], "--num_train_epochs", "2", "--skip_exists", "True")
    load = run.load_generator

    def later(*arguments):
        monkeypatch.setattr("run.load_generator", load)
        assert main(argv) == 0
        return load(*arguments)

    monkeypatch.setattr("run.load_generator", later)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("begins its training") == 1 and out.count("has its token already") == 1


def test_a_state_that_an_ended_run_left_is_not_gone_on_with(tiny_config, tmp_path, capsys):
    """The kill came after the run had ended well, and before it had cleared up."""
    argv = flags(tiny_config, *LONG[:4], "--num_train_epochs", "2")
    assert main(argv) == 0
    state = next(tmp_path.rglob("config.yml")).with_name("training_state.safetensors")
    state.write_bytes(b"left")
    capsys.readouterr()
    assert main(argv) == 0 and "begins its training" in capsys.readouterr().out
    assert not state.exists() and not list(tmp_path.rglob("*.unfinished"))


def test_looking_at_some_classes_does_not_end_a_run(tiny_config, tmp_path, monkeypatch):
    argv = flags(tiny_config, *LONG[:1], "1-2", *LONG[2:4], "--num_train_epochs", "2")
    update = training.update

    def stopping_at_the_second(config, learner, *measured):
        if learner.job.class_index == 1:
            raise Stopped(signal.SIGTERM)
        return update(config, learner, *measured)

    with monkeypatch.context() as once:
        once.setattr("training.update", stopping_at_the_second)
        assert main(argv) == 143
    token, = tmp_path.rglob("learned_embeds.safetensors")
    changed = token.stat().st_mtime_ns
    assert main(flags(tiny_config, "--class_index", "1", "--evaluate", "True")) == 0
    assert main(argv) == 0 and token.stat().st_mtime_ns == changed


def test_pictures_that_cannot_be_removed_are_not_taken_for_new_ones(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, *LONG[:6], "--num_train_epochs", "1")
    assert main(argv) == 0
    pictures = next(tmp_path.rglob("with"))
    pictures.rename(tmp_path / "elsewhere")
    pictures.symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([*argv, "--train", "False", "--guidance_scale", "2"]) == 2
    assert f"'{pictures}' is a link, and its pictures are drawn anew" in capsys.readouterr().err
    pictures.unlink()
    assert main([*argv, "--train", "False", "--guidance_scale", "2"]) == 0
    assert (pictures / "0.png").read_bytes() != (tmp_path / "elsewhere/0.png").read_bytes()


def test_strange_files_beside_a_run_do_no_harm(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, *LONG[:6], "--num_train_epochs", "1")
    assert main(argv) == 0
    images = next(tmp_path.rglob("summary_demo.json")).parent
    for name in (".foo.tmp", ".summary_demo.json.99999999999999999999.1.tmp", ".report.1.1.tmp"):
        (images / name).write_text("")
    (images / "0001_crane/demo/eval").mkdir(parents=True)
    (images / "0001_crane/demo/eval/metrics.json").write_text("{")
    capsys.readouterr()
    assert main([*argv, "--train", "False"]) == 0
    assert "warning: left out of the summary: " in capsys.readouterr().err


def test_a_clock_that_goes_backwards(tiny_config, tmp_path, monkeypatch):
    def vectors(name):
        argv = flags(replace(tiny_config, output_path=str(tmp_path / name)), *LONG[:4], "--num_train_epochs", "3")
        assert main(argv) == 0
        return [path.read_bytes() for path in (tmp_path / name).rglob("learned_embeds.safetensors")]

    expected, now = vectors("forwards"), [2e9]

    def backwards():
        now[0] -= 1000
        return now[0]

    monkeypatch.setattr("time.time", backwards)
    assert vectors("backwards") == expected and len(expected) == 1


def test_only_what_failed_is_done_again(tiny_config, tmp_path, monkeypatch, capsys):
    argv = flags(tiny_config, *LONG[:1], "1-3", *LONG[2:6], "--num_train_epochs", "2")
    accumulate = training.accumulate_gradients

    def failing(*arguments):
        return [(float("nan") if learner.job.class_index == 1 else loss, right) for learner, (loss, right)
                in zip(arguments[5], accumulate(*arguments), strict=True)]

    with monkeypatch.context() as once:
        once.setattr("training.accumulate_gradients", failing)
        assert main(argv) == 2
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("learned_embeds.safetensors")}
    capsys.readouterr()
    assert main(argv) == 0
    assert "2 (crane, machine): begins" in capsys.readouterr().out
    assert len(first) == 2 and all(path.stat().st_mtime_ns == changed for path, changed in first.items())
    assert main(argv) == 0  # all is well: the same command trains anew
    assert all(path.stat().st_mtime_ns != changed for path, changed in first.items())


@pytest.fixture(scope="module")
def evaluated(tiny_model, tiny_classifier, tmp_path_factory):
    """A finished run, its settings, and the state of its training as a kill would have left it."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = RunConfig(model=tiny_model, classifier=tiny_classifier, output_path=str(folder))
    argv = flags(config, *LONG[:6], "--num_train_epochs", "3", "--fresh_noise", "True")
    kept, write = {}, training.update

    def keep(*arguments):
        end = write(*arguments)
        kept.update({path: path.read_bytes() for path in folder.rglob("training_state.safetensors")})
        return end

    training.update = keep
    try:
        assert main(argv) == 0
    finally:
        training.update = write
    for path, data in kept.items():
        path.write_bytes(data)
    return folder, argv


@pytest.mark.parametrize("how", ["truncated", "foreign", "empty"])
@pytest.mark.parametrize("pattern, train", [
    ("training_state.safetensors", True), ("history.jsonl", True), ("config.yml", True),
    ("learned_embeds.safetensors", False), ("drawn.json", False), ("with/0.png", False), ("without/1.png", False),
    ("summary_demo.json", False), ("vectors.safetensors", False), ("config.yml", False)])
def test_a_broken_file_is_one_line(capsys, evaluated, tmp_path, how, pattern, train):
    """It names the file and says what to do; token and pictures are not touched."""
    folder, argv = evaluated
    shutil.copytree(folder, tmp_path / "copy")
    file, = (path for path in (tmp_path / "copy").rglob(pattern.split("/")[-1])
             if path.as_posix().endswith(f"eval/{pattern}" if "/" in pattern else pattern))
    if train:
        next((tmp_path / "copy").rglob("learned_embeds.safetensors")).unlink()
    else:
        next((tmp_path / "copy").rglob("training_state.safetensors")).unlink()
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:len(data) // 2], "foreign": b"\x89\xfe\x00 not ours {" * 9, "empty": b""}[how])
    before = {name: data for name, data in contents(tmp_path / "copy").items()
              if not name.endswith(("metrics.json", "grid.png"))}
    line = error_of(capsys, *argv, "--output_path", tmp_path / "copy", "--train", train, "--evaluate", "True")
    assert file.name in line or (train and file.parent.as_posix() in line)
    assert before.items() <= contents(tmp_path / "copy").items()


@pytest.mark.parametrize("content", [b"{}", b"[1, 2]", b"{\"class_index\": 3}", b"\xff\xfe"])
def test_a_report_over_foreign_files(evaluated, tmp_path, capsys, content):
    shutil.copytree(evaluated[0], tmp_path / "copy")
    file, = (tmp_path / "copy").rglob("metrics.json")
    file.write_bytes(content)
    capsys.readouterr()
    assert report.main([str(file.parent.parent), "--out", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(file) in err
    assert not (tmp_path / "report.html").exists()
