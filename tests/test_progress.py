"""What a sweep prints: a line per class, nothing twice, and nothing where it is quiet."""

import io
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from run import main
from runs.sweep import describe_rest
from system.terminal import LinesOutput
from tests.conftest import flags
from utils import ROOT

SWEEP = ("--class_index", "2,3", "--train", "True", "--evaluate", "True")


def run_command(*argv: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *argv], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_sweep_is_a_line_per_class(tiny_config, capsys):
    code, out, err = run_command(*flags(tiny_config, *SWEEP))
    assert code == 0 and err == ""  # a log has bars after a minute alone
    lines = [line for line in out.splitlines() if line.startswith("class ")]
    assert [line.partition(" (")[0] for line in lines] == ["class 2", "class 3"]
    assert re.search(
        r": \d+ updates in \d+ s, stopped: .*; right \d\.\d\d -> \d\.\d\d; 1 of 2 classes, about "
        r"\d\d:\d\d left$",
        lines[0],
    ) and lines[1].endswith("; 2 of 2 classes")
    told = [line for line in out.splitlines() if line.strip()]
    assert len(set(told)) == len(told)
    assert (
        out.count("/*/demo/learned_embeds.safetensors") == 1
        and out.count("/*/demo/eval/grid.png") == 1
    )
    assert main(flags(tiny_config, *SWEEP)) == 0
    # finished before: nothing to tell
    assert "class 2" not in capsys.readouterr().out.partition("accuracy")[0]


def test_quiet_prints_warnings_and_errors_alone(tiny_config, capsys):
    assert run_command(*flags(tiny_config, *SWEEP, "--quiet")) == (0, "", "")
    assert main(flags(tiny_config, *SWEEP, "--quiet", "--lr", "0.5")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_the_rest_is_estimated():
    assert describe_rest(16, 12, 60) == "4 of 16 classes, about 03:00 left"
    assert (
        describe_rest(1000, 999, 36) == "1 of 1000 classes, about 9:59:24 left"
        and describe_rest(2, 0, 5) == "2 of 2 classes"
    )


def test_bars_in_a_log_are_lines():
    data = io.BytesIO()
    log = LinesOutput(io.BufferedWriter(data), "utf-8")
    for text in (
        "\r  0%",
        "\r 50%   \n\x1b[A",
        "\r      ",
        "\r",
        "a warning",
        "\n",
        "two\nlines\n",
        "the e",
        "nd",
    ):
        log.write(text)
    log.flush()
    assert data.getvalue().decode() == "  0%\n 50%\na warning\ntwo\nlines\nthe end\n"


def test_a_bar_s_state_is_in_the_log_at_once():
    data = io.BytesIO()
    log = LinesOutput(io.BufferedWriter(data), "utf-8", line_buffering=True)
    with tqdm(total=2, file=log, mininterval=0, miniters=1, ascii=True) as bar:
        bar.update()
        assert " 50%|" in data.getvalue().decode().splitlines()[-1]


@pytest.mark.parametrize("show", ["traceback.print_exc()", "raise"])
def test_a_traceback_in_a_log_is_as_python_writes_it(show):
    """Python writes it in pieces: each was a line of its own."""
    code = (
        "import traceback\ntry:\n    [1, 2].index(\n        'three'.upper())\nexcept ValueError:\n"
        f"    {show}\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    guarded = subprocess.run(
        [sys.executable, "-c", f"from system import terminal; terminal.guard_output()\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stderr
    assert [re.sub(r"line \d+", "line", line) for line in guarded.splitlines()] == [
        re.sub(r"line \d+", "line", line) for line in plain.splitlines()
    ]
