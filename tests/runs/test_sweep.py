"""Sweeps: any number of processes share the classes, each once; a living one takes over what a dead
one left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from command_line import parse_settings
from config import RunConfig
from method.class_training import DivergenceError
from method.losses import cross_entropy
from prompt_datasets import target_class
from run import main
from runs.device import choose_device
from runs.folders import RunFolder
from runs.session import Session
from runs.sweep import ClassWork, Sweep, work_on_classes
from tests.conftest import LABELS, file_times, flags
from tests.runs.conftest import sweep_over
from tests.runs.processes import Process, finish_run
from tokens.class_token import load_token, save_token
from utils import ROOT, UserError, write_yaml

SETTINGS = [
    "--class_index",
    "1-3",
    "--train",
    "True",
    "--evaluate",
    "True",
    "--num_train_epochs",
    "10",
    "--lr",
    "0.05",
    "--train_timesteps",
    "999",
    "600",
    "--fresh_noise",
    "True",
    "--number_of_prompts",
    "1",
    "--target_accuracy",
    "1",
    "--epoch_size",
    "2",
]


def tokens(folder):
    return {
        path.parent.parent.name: load_token(path).vectors
        for path in folder.rglob("learned_embeds.safetensors")
    }


def claim_all(sweep: Sweep) -> list[RunFolder]:
    """The classes that a process gets which claims as many as it can."""
    return list(iter(sweep.claim_class, None))


def finish_class(sweep: Sweep, folder: RunFolder):
    """Its token is there."""
    save_token(folder.token_file, "newclas", torch.zeros(1, 4), (4,), {})
    sweep.finish_class(ClassWork(folder))


def test_every_class_is_claimed_once(tmp_path):
    ours, theirs = sweep_over(tmp_path), sweep_over(tmp_path)
    first, second = ours.claim_class(), theirs.claim_class()
    assert (first.target.number, second.target.number) == (1, 2)
    finish_class(ours, first)
    third = ours.claim_class()
    assert third.target.number == 3 and theirs.claim_class() is None
    assert [folder.target.number for folder in theirs.left_to_others()] == [2, 3]
    finish_class(theirs, second)
    finish_class(ours, third)
    assert not ours.left_to_others() and not theirs.left_to_others() and ours.claim_class() is None
    assert sweep_over(tmp_path).claim_class() is None


def test_a_class_that_another_process_gave_up_is_taken_over(tmp_path):
    ours, theirs = sweep_over(tmp_path), sweep_over(tmp_path)
    first, second = ours.claim_class(), theirs.claim_class()
    half = first.tokens / ".history.jsonl.1.1.tmp"
    half.parent.mkdir(parents=True)
    half.touch()
    first.lock.release()  # as the system does when a process dies
    finish_class(theirs, second)
    assert theirs.claim_class().target.number == 1 and not half.exists()


def test_what_another_process_finished_before_the_lock_was_ours_stays(tmp_path):
    looks = []

    def finished_at_the_second_look(folder):
        looks.append(folder.target.number)
        return looks.count(folder.target.number) > 1

    sweep = sweep_over(tmp_path, is_finished=finished_at_the_second_look)
    assert sweep.claim_class() is None and looks == [1, 1, 2, 2, 3, 3]
    assert all(folder.try_lock() for folder in sweep_over(tmp_path).folders)  # no lock was kept


def test_a_failed_class_is_not_tried_again_in_the_same_sweep(tmp_path):
    ours, theirs = sweep_over(tmp_path), sweep_over(tmp_path)
    ours.fail_class(ClassWork(ours.claim_class()), UserError("it diverged"))
    assert [folder.target.number for folder in claim_all(ours)] == [2, 3]
    ours.release_locks()
    assert [folder.target.number for folder in claim_all(theirs)] == [2, 3]
    theirs.release_locks()
    later = sweep_over(tmp_path)
    folder = later.claim_class()
    assert folder.target.number == 1
    finish_class(later, folder)
    assert not folder.error_file.exists()


def test_starting_over_counts_what_is_finished_since(tmp_path):
    for folder in (sweep := sweep_over(tmp_path)).folders:
        finish_class(sweep, folder)
    ours, theirs = sweep_over(tmp_path, start_over=True), sweep_over(tmp_path, start_over=True)
    folder = ours.claim_class()
    assert folder.target.number == 1
    folder.begin_training({}, start_over=True)
    finish_class(ours, folder)
    assert [folder.target.number for folder in claim_all(theirs)] == [2, 3]


@pytest.fixture
def session(tiny_config):
    """Two updates of two classes at once, with a loss that is not finite for class 2 ('crane,
    machine').
    """
    return open_session(tiny_config)


def open_session(config: RunConfig, **changes) -> Session:
    settings = {
        "class_index": "1-3",
        "num_train_epochs": 2,
        "classes_at_once": 2,
        "train_timesteps": [999, 600],
    }
    session = Session(replace(config, **(settings | changes)))
    classify = cross_entropy(session.classifier)

    def loss_fn(images, targets, vectors):
        loss, correct = classify(images, targets)
        return torch.where(targets == 1, torch.inf, loss), correct

    session.loss = loss_fn
    return session


def evaluate_by(session: Session, evaluate_class) -> Session:
    """Its classes are evaluated by this function of their folder."""
    session.config.evaluate = True
    session.evaluation = SimpleNamespace(
        evaluate_class=lambda folder: evaluate_class(folder) or [],
        is_finished=lambda folder: folder.token_file.exists(),
    )
    return session


def work_on(session: Session) -> Sweep:
    sweep = Sweep(session)
    work_on_classes(session, sweep)
    return sweep


def test_a_class_that_diverges_fails_alone(session, tmp_path, capsys):
    """The worker that tried it reports it."""
    evaluated = []
    sweep = work_on(evaluate_by(session, evaluated.append))
    (error,) = sweep.errors
    assert str(error).startswith("update 0 of class 2 (crane, machine) ")
    assert "class 2 (crane, machine) failed: update 0 of class" in capsys.readouterr().err
    assert {folder.target.number for folder in evaluated} == {1, 3} and not sweep.left_to_others()
    assert tokens(tmp_path).keys() == {"0001_crane", "0003_tiger_cat"}
    assert "non-finite loss" in sweep.failed[0].error_file.read_text()


@pytest.mark.parametrize("update", [0, 1, 2])
def test_a_class_that_diverged_may_be_tried_with_other_settings(tiny_config, tmp_path, update):
    """At its first update or later; only a training that was stopped is resumed."""
    seen = []

    def diverge(images, targets, vectors):
        loss, correct = images.mean((1, 2, 3)), targets < 0
        seen.append(targets)
        return (loss * torch.inf if len(seen) > update else loss), correct

    broken = open_session(tiny_config, class_index="1", num_train_epochs=4)
    broken.loss = diverge
    (error,) = work_on(broken).errors
    assert f"update {update} of class 1" in str(error) and "try a lower --lr" in str(error)
    (folder,) = broken.folders.values()
    assert not folder.state_file.exists()
    assert not work_on(open_session(tiny_config, class_index="1", lr=1e-5)).errors
    assert len(tokens(tmp_path)) == 1 and "lr: 1.0e-05" in folder.config_file.read_text()


def test_a_class_that_comes_free_while_the_last_ones_train_is_taken_over(tiny_config, tmp_path):
    """Its process dies after this one looked for classes for the last time before the end of its
    training.
    """
    theirs = list(open_session(tiny_config).folders.values())[2]
    assert theirs.try_lock()

    def release_lock(images, targets, vectors):
        theirs.lock.release()
        return (images.mean((1, 2, 3)), targets < 0)

    ours = open_session(tiny_config, classes_at_once=3)
    ours.loss = release_lock
    sweep = work_on(ours)
    assert len(tokens(tmp_path)) == 3 and not sweep.errors and not sweep.left_to_others()


def test_a_half_trained_token_that_is_broken_fails_alone(session, tmp_path):
    state = list(session.folders.values())[2].state_file
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not a state")
    write_yaml(state.with_name("config.yml"), asdict(session.config))
    errors = [str(error) for error in work_on(session).errors]
    assert sorted(error.split()[0] for error in errors) == ["the", "update"]
    assert any(f"'{state.parent}' is broken" in error for error in errors)
    assert tokens(tmp_path).keys() == {"0001_crane"}


def fail_of(number: int):
    """An evaluation with a mistake in it, which one class hits."""

    def evaluate_class(folder):
        if folder.target.number == number:
            raise ZeroDivisionError("division by zero")

    return evaluate_class


def test_an_unforeseen_error_of_one_class_ends_no_sweep(session, tmp_path, capsys):
    sweep = work_on(evaluate_by(session, fail_of(1)))
    # class 2 diverged
    assert [type(error) for error in sweep.errors] == [
        DivergenceError,
        UserError,
    ]
    failed = sweep.folders[0]
    text = failed.error_file.read_text()
    assert text.startswith("Traceback (most recent call last)") and "in evaluate_class" in text
    assert text.endswith("ZeroDivisionError: division by zero\n")
    (line,) = (
        line
        for line in capsys.readouterr().err.splitlines()
        if "class 1 (crane, bird) failed" in line
    )
    assert "failed: ZeroDivisionError: division by zero" in line and str(failed.error_file) in line
    assert (
        tokens(tmp_path).keys() == {"0001_crane", "0003_tiger_cat"} and not sweep.left_to_others()
    )


def test_an_unforeseen_error_of_an_update_fails_the_classes_that_were_in_it(session, tmp_path):
    """Two learn together; the third is trained all the same."""
    classify, seen = session.loss, []

    def break_once(images, targets, vectors):
        seen.append(targets)
        if len(seen) == 1:
            raise ZeroDivisionError("division by zero")
        return classify(images, targets % 2 * 0, vectors)

    session.loss = break_once
    errors = work_on(session).errors
    assert len(errors) == 2 and all("ZeroDivisionError" in str(error) for error in errors)
    assert tokens(tmp_path).keys() == {"0003_tiger_cat"}
    assert all(folder.try_lock() for folder in open_session(session.config).folders.values())


def test_an_unforeseen_error_of_the_only_class_is_a_line(tiny_config, capsys):
    argv = flags(
        tiny_config,
        class_index=3,
        train=True,
        evaluate=True,
        num_train_epochs=1,
        eval_prompts="A painting of a {}",
        context_judge="tests.drawings:fail_on_pictures",
    )
    assert main([*argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ZeroDivisionError: ") and "error.txt" in line
    assert main([*argv, "--debug"]) == 2
    assert "in evaluate_class" in capsys.readouterr().err


def test_no_lock_stays_where_an_error_ends_a_sweep(session, tmp_path):
    """As on a full disk; a program that calls this may try again."""

    def raise_error(folder):
        raise OSError(28, "No space left on device", str(folder.images))

    with pytest.raises(OSError, match="No space left"):
        work_on(evaluate_by(session, raise_error))
    assert all(folder.try_lock() for folder in open_session(session.config).folders.values())


def test_a_class_that_fails_does_not_stop_the_others(tiny_config, tmp_path, capsys):
    """Its pictures' folder is a link. The same command then does what failed, and repeats nothing
    else.
    """
    argv = flags(tiny_config, *SETTINGS, "--num_train_epochs", "1")
    crane = RunFolder(
        str(tmp_path), tiny_config.classifier, target_class(1, "crane", "crane, machine"), "demo"
    )
    link = crane.eval_images / "with"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path)
    capsys.readouterr()
    assert main(argv) == 2
    lines = [
        line
        for line in capsys.readouterr().err.replace("\x1b[A", "").splitlines()  # how bars move
        if "class" in line and "%" not in line
    ]
    assert lines[0].startswith(f"class 2 (crane, machine) failed: '{link}' is a link")
    assert "1 of 3 classes failed" in lines[-1] and "2 (crane, machine)" in lines[-1]
    assert len(tokens(tmp_path)) == 3 and numbers_in_summary(tmp_path) == [1, 3]
    link.unlink()
    before = file_times(tmp_path)
    before.pop(crane.error_file)
    assert main(argv) == 0
    assert before.items() <= file_times(tmp_path).items() and not crane.error_file.exists()
    assert numbers_in_summary(tmp_path) == [1, 2, 3]


def numbers_in_summary(folder: Path) -> list[int]:
    (summary,) = folder.rglob("summary_demo.json")
    return [metrics["class_index"] for metrics in json.loads(summary.read_text())["classes"]]


@pytest.fixture(scope="module")
def argv(tiny_model, tiny_classifier):
    """A command that writes to the folder where it is started."""
    return flags(RunConfig(model=tiny_model, classifier=tiny_classifier), *SETTINGS)


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """The three classes' tokens by one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish_run(argv, folder)[0] == 0
    return tokens(folder)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]):
    assert ours.keys() == theirs.keys() and len(ours) == 3
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)


def test_two_processes_do_what_one_does(argv, alone, tmp_path):
    codes, outs, errs = zip(
        *[process.finish() for process in [Process(argv, tmp_path) for _ in range(2)]], strict=True
    )
    assert codes == (0, 0) and errs == ([], [])
    assert_equal(tokens(tmp_path), alone)
    out = "".join(outs)
    assert (
        out.count(" updates in ") == 3
        and "all classes of run" in out
        and numbers_in_summary(tmp_path) == [1, 2, 3]
    )
    assert all(out.count(f"class {i} ({LABELS[i - 1]}):") == 1 for i in (1, 2, 3))


def test_a_living_process_takes_over_what_a_killed_one_left(argv, alone, tmp_path):
    """In the middle of a class, and without a further command."""
    victim, survivor = Process(argv, tmp_path), Process(argv, tmp_path)
    victim.wait_for(tmp_path, "training_state.pt", count=2)
    victim.send_signal(signal.SIGKILL)
    assert victim.finish()[0] == -signal.SIGKILL
    code, out, _ = survivor.finish()
    assert code == 0 and out.count("training resumed") == 1
    assert_equal(tokens(tmp_path), alone)
    assert numbers_in_summary(tmp_path) == [1, 2, 3]
    assert not list(tmp_path.rglob("training_state.pt")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_launcher_s_processes_share_the_classes(argv, alone, tmp_path):
    """The launcher ends when one of them is killed, and ends the others; the same command completes
    the sweep.
    """
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / "run.py"),
        *argv,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        launch, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as sweep:
        children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
        while not list(tmp_path.rglob("training_state.pt")):
            time.sleep(0.05)
            assert sweep.poll() is None
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        assert sweep.wait(120) != 0
    before = tokens(tmp_path)
    assert len(before) < 3
    done = subprocess.run(
        launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(tokens(tmp_path), alone)
    assert (
        done.stdout.count(" updates in ") == 3 - len(before) and "training resumed" in done.stdout
    )
    assert "%|" not in done.stderr  # a log has a line per minute instead of bars


@pytest.mark.slow
def test_compiled_networks_learn_the_same_tokens(tiny_config, tmp_path, alone, monkeypatch):
    """Traced and split into forward and backward as for any backend; inductor's minutes of C++ are
    left out.
    """
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: (compiled.append(type(self).__name__), original(self, backend="aot_eager")),
    )
    assert main(flags(tiny_config, *SETTINGS, "--torch_compile", "True")) == 0
    assert compiled == ["UNet2DConditionModel", "Decoder"]
    assert_equal(tokens(tmp_path), alone)


@pytest.mark.parametrize(
    "device, local_rank, expected",
    [
        ("cpu", -1, "cpu"),
        ("cpu", 1, "cpu"),
        ("cuda", -1, "cuda"),
        ("cuda:1", -1, "cuda:1"),
        ("cuda", 1, "cuda:1"),
    ],
)
def test_every_process_of_a_launcher_takes_its_own_gpu(two_gpus, device, local_rank, expected):
    assert choose_device(device, local_rank) == expected


@pytest.mark.parametrize(
    "device, local_rank, reason",
    [
        ("cuda:1", 1, "cuda:1 .* one GPU"),
        ("cuda", 2, "process 3"),
        ("cuda:2", -1, "no GPU 2"),
    ],
)
def test_gpus_that_are_not_there(two_gpus, device, local_rank, reason):
    with pytest.raises(UserError, match=reason):
        choose_device(device, local_rank)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


def test_a_slurm_script_passes_its_arguments_on(tmp_path):
    """The last of two values counts, so a command's own replace the script's."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "docs/sweep.slurm"), "--class_index", "tiger cat", "--exp_id", "first"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    program, script, *argv = done.stdout.splitlines()
    config, _ = parse_settings(argv)
    assert (program, script) == ("python", "run.py")
    assert (config.class_index, config.exp_id, config.classes_at_once) == ("tiger cat", "first", 8)
