"""A sweep over many classes: what a second start costs and says once all are finished, and the page
over them.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_hook
from transformers import CLIPTextModel

from command_line import parse_settings
from run import main
from runs.session import Session
from tests.conftest import flags, save_classifier
from utils import ROOT

CPU_SECONDS = 8  # of a second start over a finished thousand, beyond imports


def sweep_flags(config, folder: Path, classes: int) -> list[str]:
    """One update and one picture of each of so many classes."""
    classifier = save_classifier(folder / "many", [f"cat {i}, the animal" for i in range(classes)])
    return flags(
        config,
        classifier=classifier,
        class_index="all",
        train=True,
        evaluate=True,
        num_train_epochs=1,
        epoch_size=1,
        number_of_prompts=1,
        test_size=1,
        train_timesteps=999,
        num_inference_steps=1,
        classes_at_once=20,
        train_images="none",
        output_path=folder / "out",
    )


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_classifier, tmp_path_factory):
    """The command of a finished sweep over sixty classes, which is more than a terminal or page
    shows in full.
    """
    from config import RunConfig

    folder = tmp_path_factory.mktemp("sixty")
    argv = sweep_flags(RunConfig(model=tiny_model, classifier=tiny_classifier), folder, 60)
    assert main(argv) == 0
    return argv, folder / "out"


def test_a_finished_sweep_is_one_line_and_writes_nothing(finished, capsys):
    argv, out = finished
    capsys.readouterr()
    before = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    assert main(argv) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(
        r"60 classes, 1 images each: accuracy .* by the classifier; see .*report_demo.html", line
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_page_is_written_anew_where_what_it_shows_has_changed(finished, capsys):
    """What a class was evaluated to again is the same: the page stays. Its settings have a line
    more: it does not.
    """
    argv, out = finished
    (page,) = out.rglob("report_demo.html")
    before = page.stat().st_mtime_ns
    next(out.rglob("metrics.json")).unlink()
    assert main(argv) == 0 and page.stat().st_mtime_ns == before
    settings = next(out.rglob("config.yml"))
    settings.write_text(settings.read_text() + "# by hand\n")
    capsys.readouterr()
    assert main(argv) == 0
    assert page.stat().st_mtime_ns > before and "\nreport: " in capsys.readouterr().out


def test_a_page_of_many_classes_links_its_pictures(finished):
    """Each is loaded when it comes into sight, and a page may load pictures of its own alone."""
    _, out = finished
    (page,) = out.rglob("report_demo.html")
    html = page.read_text()
    sources = re.findall(r'<img src="([^"]+)" alt="[^"]*" loading="lazy">', html)
    assert len(sources) == 2 * 60 and all((page.parent / source).is_file() for source in sources)
    assert "data:image" not in html and "default-src 'none'; img-src data: 'self' file:;" in html
    assert html.count("<details>") == 1 and page.stat().st_size < 400_000


def test_prompts_are_checked_without_the_text_encoder(finished):
    """It takes a second per class at SD 1.4's size on a CPU."""
    argv, _ = finished
    config, _ = parse_settings([*argv, "--class_index", "all"])
    called = []
    watch = register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        session = Session(config)
        session.load_now("generator")
        assert CLIPTextModel not in called
        session.generator.encode(["a cat"])
        assert CLIPTextModel in called
    finally:
        watch.remove()


@pytest.mark.slow
def test_a_second_start_over_a_finished_thousand(tiny_config, tmp_path):
    """In seconds of CPU: what it does beyond importing."""

    def measure_cpu(*argv: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    argv = sweep_flags(tiny_config, tmp_path, 1000)
    assert main(argv) == 0
    imports = measure_cpu("-c", "import run, runs.sweep, runs.evaluation")
    assert measure_cpu("run.py", *argv) < imports + CPU_SECONDS
