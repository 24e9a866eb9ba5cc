"""Nothing is lost: kills, signals, a full disk, two runs at once, broken files; always the same
command again.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from config import RunConfig
from evaluation import report
from prompt_datasets import target_class
from run import main
from runs.folders import RunFolder
from tests.conftest import error_of, file_times, flags
from tests.kills import read_contents
from tests.runs.processes import Process, finish_run
from tokens.class_token import load_token
from utils import ROOT, write_yaml

TRAIN = ["--class_index", "3", "--train", "True", "--evaluate", "True"]
LONG = [
    *TRAIN,
    "--num_train_epochs",
    "8",
    "--lr",
    "0.01",
    "--epoch_size",
    "2",
    "--target_accuracy",
    "1",
    "--train_timesteps",
    "999",
    "600",
    "--fresh_noise",
    "True",
    "--test_size",
    "8",
    "--seed",
    "100",
    "--batch_size",
    "1",
]


@pytest.fixture(scope="module")
def argv(tiny_model, tiny_classifier):
    """A command that trains and evaluates for a while, and writes to the folder where it is
    started.
    """
    return flags(RunConfig(model=tiny_model, classifier=tiny_classifier), *LONG)


@pytest.fixture(scope="module")
def state(argv, tmp_path_factory) -> Path:
    """A folder with a half-trained token, as a kill left it."""
    folder = tmp_path_factory.mktemp("killed")
    process = Process(argv, folder)
    process.wait_for(folder, "training_state.pt")
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory) -> dict[str, bytes]:
    """What that command leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish_run(argv, folder)[0] == 0
    return read_contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_killed_anywhere_it_resumes_bit_for_bit(tiny_config, tmp_path, threads):
    """The short form of docs/reliability.md's hundred."""
    names = (
        "model",
        "classifier",
        "device",
        "mixed_precision",
        "height",
        "width",
        "num_inference_steps",
    )
    write_yaml(tmp_path / "tiny.yml", {name: asdict(tiny_config)[name] for name in names})
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kills",
            "--config",
            tmp_path / "tiny.yml",
            "--class_index",
            "3,1",
            "--kills",
            "6",
            "--threads",
            threads,
            "--out",
            tmp_path / "kills.json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == found["identical"] == 6 and found["unreadable_files"] == 0
    assert found["files"] > 60 and found["finished_work_repeated"] == 0


def test_half_trained_it_resumes_bit_for_bit(argv, state, undisturbed, tmp_path):
    shutil.copytree(state, tmp_path, dirs_exist_ok=True)
    before = file_times(tmp_path)
    code, out, _ = finish_run(argv, tmp_path)
    assert code == 0 and "training resumed" in out
    assert read_contents(tmp_path) == undisturbed
    finished = {path: changed for path, changed in before.items() if "000" in path.parts}
    # pictures of updates that were done
    assert finished and finished.items() <= file_times(tmp_path).items()


def stopped_line(number: int) -> str:
    return (
        f"stopped by {signal.Signals(number).name}: the same command resumes, or starts over where"
        " --skip_exists is False"
    )


@pytest.mark.parametrize(
    "number, code, moment",
    [(signal.SIGINT, 130, "training_state.pt"), (signal.SIGTERM, 143, "drawn.json")],
)
def test_a_signal_ends_a_run_and_the_same_command_resumes(
    argv, undisturbed, tmp_path, number, code, moment
):
    process = Process(argv, tmp_path)
    process.wait_for(tmp_path, moment)
    process.send_signal(number)
    sent = time.monotonic()
    found, _, lines = process.finish()
    assert found == code and lines == [stopped_line(number)]
    assert time.monotonic() - sent < 10
    found, out, _ = finish_run(argv, tmp_path)
    assert (
        found == 0 and ("trained already" if moment == "drawn.json" else "training resumed") in out
    )
    assert read_contents(tmp_path) == undisturbed


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_libraries_load(argv, tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *argv],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert err.strip() == stopped_line(number)
    assert not read_contents(tmp_path)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_a_call_that_returns_late(number, code):
    """Python runs its handlers between its own steps: one call of a library can keep them waiting
    for minutes.
    """
    program = (
        "import hashlib, system.signals as s; s.end_on_signals(); print(flush=True); "
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=5)
    assert process.returncode == code and err.strip() == stopped_line(number)


def test_a_signal_for_a_child_does_not_end_its_parent():
    """A library may fork workers and end them."""
    program = (
        "import multiprocessing as m, time, system.signals as s; s.end_on_signals(); child ="
        " m.get_context('fork').Process(target=time.sleep, args=(60,)); child.start();"
        " time.sleep(0.2); child.terminate(); child.join(); time.sleep(0.2); print(child.exitcode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout.strip()) == (0, "143")


def test_a_notebook_s_kernel_keeps_its_handlers():
    """`%run run.py` runs it inside the kernel's process."""
    program = (
        "import runpy, signal, sys\nimport IPython\nsys.argv = ['run.py', '--help']\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "try:\n    runpy.run_path('run.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print(signal.getsignal(signal.SIGINT) is before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("size", [1000, 6000])
def test_a_full_disk_is_one_line(argv, undisturbed, tmp_path, size):
    """The system refuses to write files beyond a size, as it does on a full disk; the rest is as it
    was.
    """
    code, _, lines = finish_run(argv, tmp_path, largest_file=size)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: '") and "': File too large" in lines[0]
    assert not list(tmp_path.rglob("*.tmp"))
    assert finish_run(argv, tmp_path)[0] == 0
    assert read_contents(tmp_path) == undisturbed


@pytest.mark.parametrize("more", [[], ["--lr", "0.02"], ["--evaluate", "False"]])
def test_a_start_that_fails_loses_nothing(argv, evaluated, tmp_path, more):
    """The disk is full before the first file of the new training is written."""
    shutil.copytree(evaluated, tmp_path / "copy")
    before = read_contents(tmp_path / "copy")
    code, _, lines = finish_run(
        [*argv, "--skip_exists", "False", *more], tmp_path / "copy", largest_file=500
    )
    assert code == 2 and "config.yml" in lines[0] and "File too large" in lines[0]
    assert "resumes" not in lines[0]
    after = read_contents(tmp_path / "copy")
    # beside its token: of a kill
    left = {name for name in before if name.endswith("training_state.pt")}
    assert before.keys() - left == after.keys() and after.items() <= before.items()
    assert finish_run(argv, tmp_path / "copy")[0] == 0 and read_contents(tmp_path / "copy") == after


def test_a_class_that_another_process_holds_is_left_to_it(argv, tmp_path, capsys):
    first = Process([*argv, "--num_train_epochs", "400", "--early_stopping", "400"], tmp_path)
    first.wait_for(tmp_path, "training_state.pt")
    code, out, lines = finish_run(
        [*argv, "--num_train_epochs", "400", "--early_stopping", "400"], tmp_path
    )
    assert code == 0 and not lines
    assert out == "not finished here, since other processes hold them: 3 (tiger cat)\n"
    assert (
        finish_run(
            [*argv, "--class_index", "1", "--num_train_epochs", "1", "--evaluate", "False"],
            tmp_path,
        )[0]
        == 0
    )
    first.send_signal(signal.SIGKILL)
    first.finish()
    code, out, _ = finish_run(
        [*argv, "--num_train_epochs", "1", "--skip_exists", "False"], tmp_path
    )
    # a dead process holds no lock
    assert code == 0 and " updates in " in out and "resumed" not in out


def test_other_settings_do_not_resume_a_half_trained_token(argv, state, tmp_path, capsys):
    shutil.copytree(state, tmp_path, dirs_exist_ok=True)
    before = read_contents(tmp_path)
    argv = [*argv, "--output_path", str(tmp_path)]
    line = error_of(capsys, *argv, "--lr", "0.02")
    assert (
        "the half-trained token in" in line
        and "lr 0.01, now 0.02: another setting is another run" in line
    )
    assert read_contents(tmp_path) == before
    capsys.readouterr()
    assert (
        main([*argv, "--num_train_epochs", "1", "--evaluate", "False", "--skip_exists", "False"])
        == 0
    )
    assert " updates in " in (out := capsys.readouterr().out) and "resumed" not in out


def old_run(config: RunConfig, folder: Path) -> RunFolder:
    """What the version before training_state.pt left of a class: a token [D], its settings and its
    history.
    """
    files = RunFolder(
        str(folder), config.classifier, target_class(2, "tiger cat", "tiger cat"), config.exp_id
    )
    write_yaml(files.config_file, {**asdict(config), "class_index": "3", "skip_exists": False})
    files.history_file.write_text(
        json.dumps(
            {"update": 0, "loss": 3.5, "accuracy": 0.0, "grad_norm": 0.2, "vector_norm": 0.4}
        )
        + "\n"
    )
    return files


def test_a_token_of_the_earlier_version_is_read_and_kept(tiny_config, tmp_path, capsys):
    files = old_run(tiny_config, tmp_path)
    vector = torch.randn(32)
    save_file(
        {"newclas": vector},
        files.token_file,
        {
            "format": "pt",
            "class_index": "3",
            "class_name": "tiger cat",
            "label": "tiger cat",
            "updates": "1",
            "classifier": tiny_config.classifier,
            "base_model": tiny_config.model,
            "seed": "35",
            "loss": "3.5000",
        },
    )
    before = files.token_file.read_bytes()
    argv = flags(tiny_config, *TRAIN, "--num_train_epochs", "3", "--target_accuracy", "1")
    assert main(argv) == 0
    assert "trained already" in capsys.readouterr().out and files.token_file.read_bytes() == before
    assert torch.equal(load_token(files.token_file).vectors, vector[None])
    assert len(list(files.eval_images.rglob("with/*.png"))) == 2 and files.report_file.exists()


def test_a_half_trained_token_of_the_earlier_version_is_refused(tiny_config, tmp_path, capsys):
    files = old_run(tiny_config, tmp_path)
    save_file({"vectors": torch.zeros(1, 32)}, files.tokens / "training_state.safetensors")
    argv = flags(tiny_config, *TRAIN, "--num_train_epochs", "3", "--target_accuracy", "1")
    line = error_of(capsys, *argv)
    assert (
        "training_state.safetensors' was written by an earlier version" in line
        and "--skip_exists False starts over" in line
    )
    assert main([*argv, "--skip_exists", "False"]) == 0
    assert files.token_file.exists() and not (files.tokens / "training_state.safetensors").exists()


def test_pictures_that_cannot_be_removed_are_not_taken_for_new_ones(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, *TRAIN, "--num_train_epochs", "1")
    assert main(argv) == 0
    pictures = next(tmp_path.rglob("with"))
    pictures.rename(tmp_path / "elsewhere")
    pictures.symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([*argv, "--train", "False", "--guidance_scale", "2"]) == 2
    assert f"'{pictures}' is a link, but its pictures" in capsys.readouterr().err
    pictures.unlink()
    assert main([*argv, "--train", "False", "--guidance_scale", "2"]) == 0
    assert (pictures / "0.png").read_bytes() != (tmp_path / "elsewhere/0.png").read_bytes()


def test_strange_files_beside_a_run_do_no_harm(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, *TRAIN, "--num_train_epochs", "1")
    assert main(argv) == 0
    images = next(tmp_path.rglob("summary_demo.json")).parent
    for name in (".foo.tmp", ".summary_demo.json.99999999999999999999.1.tmp", ".report.1.1.tmp"):
        (images / name).write_text("")
    (images / "0001_crane/demo/eval").mkdir(parents=True)
    (images / "0001_crane/demo/eval/metrics.json").write_text("{")
    capsys.readouterr()
    assert main([*argv, "--train", "False"]) == 0
    assert "warning: left out of the summary: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluated(argv, undisturbed, state, tmp_path_factory) -> Path:
    """A finished run, beside the state of its training as a kill left it."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, data in undisturbed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (left,) = state.rglob("training_state.pt")
    shutil.copy(left, folder / left.relative_to(state))
    return folder


BROKEN = [
    (pattern, train, how)
    for pattern, train in (
        ("training_state.pt", True),
        ("config.yml", True),
        ("history.jsonl", False),
        ("learned_embeds.safetensors", False),
        ("drawn.json", False),
        ("with/0.png", False),
        ("without/1.png", False),
        ("summary_demo.json", False),
        ("vectors.safetensors", False),
        ("config.yml", False),
    )
    for how in ("truncated", "foreign", "empty")
]
BROKEN.remove(("history.jsonl", False, "empty"))  # a training without updates


@pytest.mark.parametrize("pattern, train, how", BROKEN)
def test_a_broken_file_is_one_line(capsys, argv, evaluated, tmp_path, pattern, train, how):
    """It names the file and says what to do; token and pictures are not touched."""
    shutil.copytree(evaluated, tmp_path / "copy")
    (file,) = (
        path
        for path in (tmp_path / "copy").rglob(pattern.split("/")[-1])
        if path.as_posix().endswith(f"eval/{pattern}" if "/" in pattern else pattern)
    )
    removed = ["learned_embeds.safetensors"] if train else ["training_state.pt", "metrics.json"]
    for name in removed:
        next((tmp_path / "copy").rglob(name)).unlink()
    data = file.read_bytes()
    half = data[: data.rfind(b"\n", 0, len(data) // 2) + 4]  # in the middle of a line
    file.write_bytes(
        {"truncated": half, "foreign": b"\x89\xfe\x00 not ours {" * 9, "empty": b""}[how]
    )
    before = {
        name: data
        for name, data in read_contents(tmp_path / "copy").items()
        if not name.endswith(("grid.png", "summary_demo.json", "error.txt"))
    }
    line = error_of(
        capsys, *argv, "--output_path", tmp_path / "copy", "--train", train, "--evaluate", "True"
    )
    assert file.name in line or (train and file.parent.as_posix() in line)
    assert before.items() <= read_contents(tmp_path / "copy").items()


def test_broken_metrics_are_measured_again(argv, evaluated, tmp_path):
    """And a state that a kill left beside its token, just before it was removed, is removed."""
    shutil.copytree(evaluated, tmp_path / "copy")
    (metrics,) = (tmp_path / "copy").rglob("metrics.json")
    metrics.write_bytes(metrics.read_bytes()[:100])
    before = file_times(tmp_path / "copy")
    assert main([*argv, "--output_path", str(tmp_path / "copy")]) == 0
    after = file_times(tmp_path / "copy")
    assert {path.name for path in before if before[path] != after.get(path)} == {
        "grid.png",
        "training_state.pt",
    }
    assert json.loads(metrics.read_text())["images"] == 8 and not list(
        tmp_path.rglob("training_state.pt")
    )


@pytest.mark.parametrize("content", [b"{}", b"[1, 2]", b'{"class_index": 3}', b"\xff\xfe"])
def test_a_report_over_foreign_files(evaluated, tmp_path, capsys, content):
    shutil.copytree(evaluated, tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("metrics.json")
    file.write_bytes(content)
    capsys.readouterr()
    assert report.main([str(file.parent.parent), "--out", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(file) in err
    assert not (tmp_path / "report.html").exists()
