"""The page: its handlers, and the whole in a browser where Chromium is installed."""

import functools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio")

from command_line import parse_settings  # noqa: E402  # gradio is optional
from page import handlers, layout, models  # noqa: E402
from prompt_datasets import select_classes  # noqa: E402
from tokens.class_token import load_token  # noqa: E402
from utils import ROOT, UserError  # noqa: E402

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def session():
    return models.open_session(
        parse_settings(["--config", "configs/miniature.yml", "--num_train_epochs", "3"])[0]
    )


def test_every_class_has_a_ready_token_which_draws_it_more_often(session):
    assert len(models.find_tokens(session)) == 16 and all(
        file.stat().st_size < 2000 for file in models.find_tokens(session).values()
    )
    target = session.targets[6]
    shares = [
        sum(
            picture.seen_as[0][0] == target.index
            for picture in models.draw_pictures(
                session, target, "A photo of a {}", token, list(range(10))
            )
        )
        for token in (None, load_token(models.find_tokens(session)[target]))
    ]
    assert shares[1] > shares[0] + 3


def test_look_shows_the_same_seeds_twice_and_a_token_that_loads(session, tmp_path):
    ((html, seed, button, usage),) = handlers.look_at_class(
        session, 7, "A painting of a {}", 5, str(tmp_path)
    )
    assert html.count("<figure>") == 2 * handlers.SHOWN and html.count("seed 5") == 4 and seed == 5
    assert "newclas-0007_jaguar jaguar" in usage and "&lt;newclas-0007_jaguar&gt;" in usage
    assert torch.equal(
        load_token(button["value"]).vectors,
        load_token(models.find_tokens(session)[session.targets[6]]).vectors,
    )
    ((_, other, *_),) = handlers.look_at_class(
        session, 7, "A painting of a {}", None, str(tmp_path)
    )
    assert 0 <= other < 10**6


@pytest.mark.parametrize(
    "template, seed, right",
    [
        ("no place", 0, "needs one {}"),
        ("{} {}", 0, "needs one {}"),
        ("{0}", 0, "needs one {}"),
        ("a newclas {}", 0, "leave 'newclas' out"),
        ("a {} " + "very " * 80, 0, "token"),
        ("a {}", -1, "whole number"),
        ("a {}", 2.5, "whole number"),
        ("a {}", 2**32, "whole number"),
    ],
)
def test_bad_input_is_one_line_for_the_visitor(session, tmp_path, template, seed, right):
    handler = handlers.show_errors(lambda *given: handlers.look_at_class(session, *given))
    with pytest.raises(gradio.Error, match=right) as raised:
        list(handler(7, template, seed, str(tmp_path)))
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_labels_are_text_and_no_html():
    picture = models.Picture(Image.new("RGB", (8, 8)), [(1, 0.5)])
    labels = ["<b>y</b>", "<script>x</script>"]
    (target,) = select_classes("1", labels, labels)
    html = handlers.show_rows([("row", [picture])], target, [0], labels)
    assert "<script>" not in html and "<b>y</b>" not in html and "&lt;script&gt;" in html


def test_two_classes_of_one_label_are_two_classes():
    """ImageNet's crane, the bird and the machine: what counts is the class that the judge names."""
    labels = ["crane", "tiger", "crane"]
    (target,) = select_classes("1", labels, labels)
    image = Image.new("RGB", (8, 8))
    pictures = [models.Picture(image, [(seen, 0.9)]) for seen in (0, 0, 0, 2, 2, 2)]
    html = handlers.show_rows([("row", pictures)], target, list(range(6)), labels)
    assert (
        "3 of 6 are 1 (crane)" in html
        and html.count("ct-right") == 3
        and html.count("<span>3 (crane)") == 3
    )
    targets = select_classes("all", labels, labels)
    assert layout.list_choices(targets, labels) == [
        ("1 (crane)", 1),
        ("tiger", 2),
        ("3 (crane)", 3),
    ]


def test_a_word_is_learned_update_by_update(session, tmp_path):
    steps = list(handlers.learn_live(session, 7, str(tmp_path)))
    assert [step[0].split("**")[1] for step in steps[1:-1]] == ["Update 1", "Update 2", "Update 3"]
    assert all(
        step[1].count("<figure>") == handlers.SHOWN and "<svg" in step[2] for step in steps[1:-1]
    )
    assert "Learned" in steps[-1][0] and steps[-1][3].count("<figure>") == 2 * handlers.SHOWN


def test_the_live_token_is_the_command_s(session, tmp_path):
    """The same update of the same loop: what the page learns is what run.py learns."""
    from run import main

    target = session.targets[6]
    *_, last = models.learn_word(session, target, tmp_path / "page")
    assert (
        main(
            [
                "--config",
                "configs/miniature.yml",
                "--class_index",
                "7",
                "--train",
                "True",
                "--num_train_epochs",
                "3",
                "--output_path",
                str(tmp_path),
            ]
        )
        == 0
    )
    (theirs,) = tmp_path.rglob("learned_embeds.safetensors")
    assert torch.equal(last.token.vectors, load_token(theirs).vectors)


def test_who_stops_asking_stops_the_training(session, tmp_path):
    steps = models.learn_word(session, session.targets[6], tmp_path)
    first = next(steps)
    steps.close()
    file = models.save_download(first.token, session.targets[6], tmp_path)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    status, html = next(handlers.finish_learning(session, 7, str(file), str(tmp_path)))
    assert "Stopped" in status and html.count("<figure>") == 2 * handlers.SHOWN
    assert "no word yet" in next(handlers.finish_learning(session, 7, None, str(tmp_path)))[0]


def run_in_fork(handler):
    """As a GPU that is lent for each call: the handler runs to its end in a forked process, whoever
    reads its steps.
    """

    def call_handler(*arguments):
        context = multiprocessing.get_context("fork")
        steps = context.Queue()

        def run_handler():
            torch.set_num_threads(1)
            for step in handler(*arguments):
                steps.put(step)
            steps.put(None)

        process = context.Process(target=run_handler)
        process.start()
        yield from iter(steps.get, None)
        process.join()

    return call_handler


def test_a_handler_in_another_process_leaves_its_token(session, tmp_path):
    """ZeroGPU's: the process has ended when the page copies the file that it offers."""
    forked = run_in_fork(handlers.show_errors(functools.partial(handlers.learn_live, session)))
    steps = list(forked(7, str(tmp_path)))
    assert "Learned" in steps[-1][0]
    assert load_token(steps[-1][4]["value"]).header["class_index"] == "7"
    (looked,) = run_in_fork(functools.partial(handlers.look_at_class, session))(
        7, "A photo of a {}", 0, str(tmp_path)
    )
    assert load_token(looked[2]["value"]).header["class_index"] == "7"
    (compared,) = run_in_fork(functools.partial(handlers.finish_learning, session))(
        7, steps[-1][4]["value"], str(tmp_path)
    )
    assert "Stopped" in compared[0]


def test_stop_reaches_a_handler_in_another_process(session, tmp_path):
    """It ends after its update, with the best token so far, and the next learning starts anew."""
    long = session.with_settings(num_train_epochs=1000, target_accuracy=1.0, early_stopping=1000)
    forked = run_in_fork(functools.partial(handlers.learn_live, long))
    steps = forked(7, str(tmp_path))
    _, first = next(steps), next(steps)
    handlers.request_stop(str(tmp_path))
    shown = [first, *steps]
    assert "Update 1" in first[0] and len(shown) < 5
    assert load_token(shown[-1][4]["value"]).header["class_index"] == "7"
    again = handlers.learn_live(long, 7, str(tmp_path))
    assert (
        "Learning" in next(again)[0]
        and "Update 1" in next(again)[0]
        and "Update 2" in next(again)[0]
    )
    # as a start does while an earlier learning has not noticed its stop
    handlers.begin_learning(str(tmp_path))
    assert not list(again)


def test_a_visitor_s_folder_has_a_lifetime_of_its_own(session):
    """Made for each visitor; gradio removes it when the visitor has gone, or after a day."""
    states = [
        block
        for block in layout.build_page(session).blocks.values()
        if isinstance(block, gradio.State)
    ]
    (state,) = (state for state in states if state.delete_callback is handlers.remove_folder)
    assert state.value is handlers.make_folder and state.time_to_live == layout.LIFETIME
    first, second = handlers.make_folder(), handlers.make_folder()
    assert first != second and os.path.isdir(first)
    for folder in (first, second):
        handlers.remove_folder(folder)
        assert not os.path.exists(folder)


def test_a_judge_of_other_classes_is_refused(tmp_path):
    """Classifier and evaluator tell classes by their index."""
    (tmp_path / "names.txt").write_text("bat, club\ncrane, bird\n")
    config = parse_settings(
        ["--config", "configs/miniature_zero_shot.yml", "--labels", str(tmp_path / "names.txt")]
    )[0]
    with pytest.raises(UserError, match="same classes"):
        models.open_session(config)


def test_words_of_one_s_own(tmp_path):
    config = parse_settings(["--config", "configs/miniature_zero_shot.yml"])[0]
    open_words = models.use_words(
        models.open_session(replace(config, evaluator=None)), "crane, bird\njaguar, cat\n", tmp_path
    )
    assert [target.label for target in open_words.targets] == ["crane, bird", "jaguar, cat"]
    for words, right in (("one", "holds 1 label:"), ("a\nA", "line 2: 'A' is already on line 1")):
        with pytest.raises(UserError, match=f"^your list.*{right}"):
            models.use_words(open_words, words, tmp_path)


def test_a_space_s_folder_serves_the_page(tmp_path):
    done = subprocess.run(
        [sys.executable, "page/space/assemble.py", "--to", tmp_path / "space"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "hf upload" in done.stdout
    card = (tmp_path / "space/README.md").read_text()
    assert (
        card.startswith("---\ntitle:")
        and "sdk: gradio" in card
        and not (tmp_path / "space/tests").exists()
    )
    code = (
        "import app; from command_line import parse_settings as p; from page import models; "
        "session = app.open_session(p(['--config', 'configs/miniature.yml'])[0]); "
        "print(len(models.find_tokens(session)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "space", capture_output=True, text=True
    )
    assert found.stdout.strip() == "16", found.stderr[-2000:]
    (tmp_path / "report.html").write_text("<p>a page</p>")
    subprocess.run(
        [
            sys.executable,
            "page/space/assemble.py",
            "--to",
            tmp_path / "static",
            "--static",
            tmp_path / "report.html",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    card = (tmp_path / "static/README.md").read_text()
    assert (
        "sdk: static" in card and "gradio" not in card and (tmp_path / "static/index.html").exists()
    )
    (tmp_path / "many.html").write_text('<img src="a.png" loading="lazy">')
    linked = subprocess.run(
        [
            sys.executable,
            "page/space/assemble.py",
            "--to",
            tmp_path / "linked",
            "--static",
            tmp_path / "many.html",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        linked.returncode == 2
        and "links its pictures" in linked.stderr
        and not (tmp_path / "linked").exists()
    )
    again = subprocess.run(
        [sys.executable, "page/space/assemble.py", "--to", tmp_path / "space"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "is not an empty folder" in again.stderr


@pytest.fixture
def address(tmp_path):
    """Of the page, served by the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py")],
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        env={**os.environ, "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    )
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
            break
        except OSError:
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait()
    log.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_in_a_browser(address, tmp_path):
    """Load, look, bad input, learn to the end, stop, download, on a desk and on a phone."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 390, "height": 900}, color_scheme="dark")
        foreign = []
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:")) or foreign.append(request.url)
            ),
        )
        page.goto(address)
        page.wait_for_selector(".ct-pictures img", timeout=60_000)
        assert page.locator(".ct-pictures img").count() == 2 * handlers.SHOWN
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        with page.expect_download() as started:
            page.get_by_role("button", name="Download the token").first.click()
        assert load_token(_keep(started.value, tmp_path)).widths == (64,)
        page.get_by_label("Prompt").fill("no place for it")
        page.get_by_role("button", name="Draw").click()
        page.wait_for_selector("text=needs one {}", timeout=30_000)
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_role("tab", name="Learn a word live").click()
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("text=Update 2", timeout=60_000)
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector("text=Stopped.", timeout=60_000)
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("text=Learned after", timeout=200_000)
        with page.expect_download() as started:
            page.get_by_role("button", name="Download the token").last.click()
        assert load_token(_keep(started.value, tmp_path)).header["class_index"] == "1"
        browser.close()
    assert not foreign, json.dumps(foreign[:3])


def _keep(download, folder):
    download.save_as(folder / download.suggested_filename)
    return folder / download.suggested_filename


@pytest.mark.parametrize("name, value", [("mixed_precision", "fp16"), ("lr", -1.0)])
def test_settings_that_cannot_work_are_refused(name, value):
    config, _ = parse_settings(["--config", "configs/miniature.yml"])
    with pytest.raises(UserError, match=name):
        models.open_session(replace(config, **{name: value}))
