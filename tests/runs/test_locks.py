"""Locks of machines that died, of disks that have none, and of processes that live."""

import errno
import os
import socket
import time

import pytest
from filelock import SoftFileLock

from run import main
from runs.locks import PATIENCE, describe_duration, find_patience
from tests.conftest import error_of, flags
from tests.runs.conftest import sweep_over
from utils import UserError

ONE_UPDATE = [
    "--class_index",
    "2,3",
    "--train",
    "True",
    "--evaluate",
    "True",
    "--num_train_epochs",
    "1",
]


def refuse_locks(number: int, monkeypatch):
    """As a disk whose flock fails with this error."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


def leave_marker(folder, age: float):
    """What a process on another machine left of its lock so many seconds ago."""
    path = folder.lock.lock_file
    folder.tokens.parent.mkdir(parents=True, exist_ok=True)
    with SoftFileLock(path), open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace(socket.gethostname(), "another-machine"))
    os.utime(path, (time.time() - age,) * 2)


def sweep_of(config):
    """What a process sees that works on the classes of ONE_UPDATE, the first of which another
    machine holds.
    """
    sweep = sweep_over(config.output_path, classifier=config.classifier)
    return [folder for folder in sweep.folders if folder.target.number in (2, 3)]


@pytest.mark.parametrize("age, code", [(60, 0), (2 * 86_400, 2)])
def test_a_lock_of_another_machine_on_a_disk_without_locks(
    tiny_config, capsys, monkeypatch, age, code
):
    """A young one is a worker's; an old one is named with its file, its age and what to do."""
    refuse_locks(errno.ENOSYS, monkeypatch)
    folder, other = sweep_of(tiny_config)
    leave_marker(folder, age)
    assert main(flags(tiny_config, *ONE_UPDATE)) == code
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0].startswith(
        f"warning: '{tiny_config.output_path}' is on a disk without file locks"
    )
    assert other.token_file.exists() and not folder.token_file.exists()
    if code == 0:
        assert "2 (crane, machine)" in shown.out
        return
    line = shown.err.splitlines()[-1]
    assert (
        "class 2 (crane, machine) is not finished" in line and f"'{folder.lock.lock_file}'" in line
    )
    assert "2 days" in line and "remove that file" in line
    os.remove(folder.lock.lock_file)
    assert main(flags(tiny_config, *ONE_UPDATE)) == 0 and folder.token_file.exists()


def test_a_disk_that_cannot_lock_at_all(tiny_config, capsys, monkeypatch):
    refuse_locks(errno.ENOLCK, monkeypatch)
    line = error_of(capsys, *flags(tiny_config, *ONE_UPDATE))
    assert (
        f"'{tiny_config.output_path}" in line
        and "No locks available" in line
        and "--output_path" in line
    )
    assert not list(sweep_of(tiny_config)[0].tokens.parent.parent.glob("*"))


def test_the_files_of_a_class_are_its_signs_of_life(tmp_path):
    """Whatever its holder wrote last counts, by the clock of the disk."""
    folder = sweep_over(tmp_path).folders[0]
    assert folder.try_lock()
    folder.images.mkdir(parents=True)
    old, new = folder.images / "0.png", folder.images / "1.png"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    assert folder.describe_silence() == ""
    os.utime(new, (time.time() - PATIENCE - 60,) * 2)
    assert "11 minutes" in folder.describe_silence()
    (folder.images / "2.png").touch()
    assert folder.describe_silence() == ""


def test_a_class_of_long_updates_is_waited_for_longer(tmp_path):
    folder = sweep_over(tmp_path).folders[0]
    folder.tokens.mkdir(parents=True)
    folder.config_file.touch()
    folder.history_file.write_text("{}\n{}\n")
    os.utime(folder.config_file, (0, 0))
    os.utime(folder.history_file, (1200, 1200))
    assert find_patience(folder) == 5 * 600
    folder.history_file.write_text("")
    folder.config_file.unlink()
    assert find_patience(folder) == PATIENCE


def test_a_link_is_no_lock(tmp_path):
    folder = sweep_over(tmp_path).folders[0]
    folder.tokens.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("precious")
    os.symlink(tmp_path / "elsewhere", folder.lock.lock_file)
    with pytest.raises(UserError, match="is a link, not a lock"):
        folder.try_lock()


def test_durations():
    assert [describe_duration(seconds) for seconds in (660, 7100, 7200, 100_000, 200_000)] == [
        "11 minutes",
        "118 minutes",
        "2 hours",
        "28 hours",
        "2 days",
    ]
