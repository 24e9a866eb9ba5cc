"""What every study has: its options, its session, and the page of its result."""

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from command_line import parse_settings
from config import RunConfig
from evaluation.statistics import Comparison
from evaluation.tables import Table
from prompt_datasets import TargetClass
from runs.session import Session
from system.paths import read_path
from system.text_files import read_json
from utils import ROOT, require, write_json, write_text

EXPLORATORY, TESTED, SHOWN = "exploratory", "tested", "shown"  # kinds, as protocol.md says
MINIATURE = "configs/miniature_guided.yml"  # the settings that the studies start from
QUICK = {"num_train_epochs": 2, "epoch_size": 4, "num_inference_steps": 3, "test_size": 2}
HELP = {  # of the flags of single studies
    "images": "held-out pictures per class",
    "seeds": "trainings, each with noise or pictures of its own",
    "epoch_size": "pictures per update",
    "updates": "of a training, at most",
    "steps": "of the training",
    "real_images": "a folder of real pictures instead of the config's",
    "k": "real pictures per class to learn from",
    "trained": "for which k the costly conditions run too",
    "test": "real pictures per class for the test",
    "inversion_steps": "of textual inversion",
    "nearest_k": "neighbours of coverage",
    "truth": "real pictures per class to be covered",
    "drawings": "new drawings to train on",
    "guide_steps": "of the biased classifiers' training",
    "other": "the other generator (the run's own, trained further)",
}


class Study(NamedTuple):
    """A study's options, and the session whose classes it is about."""

    options: argparse.Namespace
    session: Session
    out: Path  # where results go
    loop: tuple = ()  # what the study changes in the training loop itself ...
    change_loop: Callable[[Session], None] | None = None  # ... and how

    @property
    def config(self) -> RunConfig:
        """Its settings."""
        return self.session.config

    @property
    def targets(self) -> list[TargetClass]:
        """Its classes."""
        return self.session.targets

    @property
    def work(self) -> Path:
        """Where tokens and pictures are kept for the next call."""
        return Path(self.config.output_path)


class StudyResult(NamedTuple):
    """What a study found."""

    name: str  # of its files
    kind: str  # one of protocol.md's
    claim: str
    found: str  # in a sentence
    table: Table
    note: str
    data: dict[str, Any]  # for the JSON file; may hold NamedTuples and dataclasses
    tests: dict[str, Comparison]  # a table of their own on the page; empty where nothing is tested
    paper: str = ""  # what the authors say to it


def parse_options(
    doc: str | None,
    argv: list[str] | None,
    class_index: str,
    quick: dict | None = None,
    **flags,
) -> argparse.Namespace:
    """Parse the options of a study, of the miniature's classes by default.

    `flags` are its own, with their defaults; `quick` are those under --quick.
    """
    parser = build_parser(doc, class_index, flags)
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(**{"class_index": "7,8", **(quick or {})})
        options = parser.parse_args(argv)
    options.given = list_given(parser, options)
    if not options.class_index:
        options.class_index = class_index if options.config == MINIATURE else ""
    return options


def build_parser(doc: str | None, class_index: str, flags: dict) -> argparse.ArgumentParser:
    """Build the parser of `parse_options`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=MINIATURE,
        help="settings, such as configs/imagenet.yml (the miniature's)",
    )
    parser.add_argument(
        "--class_index", help=f"which classes, as for run.py (of the miniature: {class_index})"
    )
    parser.add_argument(
        "--work", type=read_path, help="keeps what is made for the next call (a folder in img/)"
    )
    parser.add_argument("--out", type=read_path, help="where results go (in docs/)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=(
            "whether it runs, not what it finds: two classes, two updates and a few pictures, "
            "all in img/results/quick"
        ),
    )
    for name, default in flags.items():
        text = f"{HELP.get(name, name)} ({default})"
        if default is None:
            parser.add_argument(f"--{name}", help=text)
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=default, help=text)
        else:
            parser.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser


def list_given(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """List the words of the command line for what is not the default."""
    words = ["--quick"] if options.quick else []
    for name, value in vars(options).items():
        if name in ("work", "out", "quick") or value == parser.get_default(name):
            continue
        parts = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, parts)]
    return words


def open_study(options: argparse.Namespace, **changes) -> Study:
    """Open the study of `options`; `changes` are settings that it decides itself.

    Raises:
        UserError: settings that cannot work, or training that may have seen `options.images` seeds.
    """
    name = Path(options.config).stem
    work = options.work or Path("img/results", "quick" if options.quick else name)
    if getattr(options, "real_images", None):
        changes["real_images"] = options.real_images
    if options.quick:
        changes |= QUICK
    config, _ = parse_settings(["--config", options.config])
    settings = {"class_index": options.class_index, "train": True, "output_path": str(work)}
    config = replace(config, **(settings | changes))
    config.validate_settings()
    images = getattr(options, "images", 0)
    require(
        images <= config.seed,
        f"--images {images} would judge seeds that training uses, from {config.seed} on: give "
        "fewer",
    )
    results = ROOT / "docs/results"
    if options.quick:
        results = work / "docs"
    elif options.config != MINIATURE:
        results = results / name
    return Study(options, Session(config), options.out or results)


def publish_result(study: Study, result: StudyResult):
    """Write <name>.md and <name>.json, list all results in README.md, and print the table.

    The page shows <name>.png, which the study has drawn.
    """
    command = shlex.join(["python", "-m", f"experiments.{result.name}", *study.options.given])
    judge = f"'{study.session.judge.name}'"
    if study.config.evaluator:
        judge = f"the evaluator {judge}"
    else:
        judge = f"the classifier that trained the token, {judge}: the result is biased"
    figure = f"{result.name}.png"
    parts = [f"# {result.claim}", result.found, result.table.to_markdown()]
    if result.tests:
        parts.append(tabulate_tests(result.tests).to_markdown())
    parts += [
        f"{result.note} Judged by {judge}. This study is {result.kind}: see the "
        "[protocol](README.md#protocol).",
        f"![{result.claim}]({figure})",
        f"`{command}`\n",
    ]
    write_text(study.out / f"{result.name}.md", "\n\n".join(parts))
    record = {
        "claim": result.claim,
        "kind": result.kind,
        "command": command,
        "found": result.found,
        "figure": figure,
        "paper": result.paper,
        **result.data,
        "tests": result.tests,
        "config": {**asdict(study.config), "output_path": "."},
    }
    plain = json.loads(json.dumps(record, default=asdict))
    write_json(study.out / f"{result.name}.json", plain)
    write_index(study.out)
    print(result.table.to_markdown(), f"\n{result.found}")


def tabulate_tests(tests: dict[str, Comparison]) -> Table:
    """Make a table with a row per comparison."""
    rows = []
    for name, test in tests.items():
        mean, low, high = test.difference
        rows.append([name, f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{test.pvalue:.2g}"])
    return Table(["comparison", "difference [95 % interval]", "p"], rows)


def write_index(out: Path):
    """Write README.md of a folder of results: the protocol, and a row for every study."""
    header = ["study", "kind", "claim", "found", "figure", "the paper"]
    index = Table(header, [])
    for path in sorted(out.glob("*.json")):
        found = read_json(path, "claim", "kind", "command", "figure", "found", "paper")
        row = [
            f"[{path.stem}]({path.stem}.md)",
            found["kind"],
            found["claim"],
            found["found"],
            f"[figure]({found['figure']})",
            found["paper"],
        ]
        index.rows.append(row)
    protocol = (ROOT / "experiments/protocol.md").read_text(encoding="utf-8")
    write_text(
        out / "README.md",
        f"{protocol}\n## Studies\n\nThe paper's column holds what its project page says; the "
        f"paper's tables are not at hand.\n\n{index.to_markdown()}\n",
    )
