"""The folder of a Hugging Face Space, ready for `hf upload`.

python page/space/assemble.py --to DIR                    a live page, on Gradio
python page/space/assemble.py --to DIR --static REPORT    one page of a run, such as
img/miniature/report_demo.html,
                                                      for an account without a live Space
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIVE = (
    "app.py",
    "command_line.py",
    "config.py",
    "prompt_datasets.py",
    "utils.py",
    "LICENSE",
    "page",
    "system",
    "method",
    "models",
    "evaluation",
    "tokens",
    "runs",
    "miniature",
    "configs",
    "pipeline_token",
)
STATIC = {
    "sdk: gradio": "sdk: static",
    "sdk_version: 6.31.0\n": "",
    "app_file: app.py\n": "app_file: index.html\n",
}


def assemble_live(out: Path):
    """Copy what the page imports and reads, as far as git tracks it, with its requirements."""
    listed = subprocess.run(
        ["git", "ls-files", *LIVE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, out / name)
    shutil.copyfile(ROOT / "page/space/README.md", out / "README.md")
    shutil.copyfile(ROOT / "requirements.txt", out / "requirements.txt")


def assemble_static(out: Path, report: Path):
    out.mkdir(parents=True, exist_ok=True)
    card = (ROOT / "page/space/README.md").read_text(encoding="utf-8")
    for old, new in STATIC.items():
        card = card.replace(old, new)
    (out / "README.md").write_text(
        card[: card.index("\n---\n") + 5]
        + "\nThe pictures and figures of a run, on one page: https://arxiv.org/abs/2303.17155\n",
        encoding="utf-8",
    )
    shutil.copyfile(report, out / "index.html")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder that is empty, or not there"
    )
    parser.add_argument(
        "--static", type=Path, metavar="REPORT", help="the page of a run, instead of the live one"
    )
    options = parser.parse_args(argv)
    if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
        parser.error(f"'{options.to}' is not an empty folder")
    if options.static and not options.static.is_file():
        parser.error(f"no file '{options.static}': run.py names the page that it writes")
    if options.static and 'loading="lazy"' in options.static.read_text(encoding="utf-8"):
        parser.error(
            f"'{options.static}' links its pictures: make a page of 50 classes or fewer by "
            "`python -m evaluation.report`"
        )
    if options.static:
        assemble_static(options.to, options.static)
    else:
        assemble_live(options.to)
    print(f"hf upload <your name>/<your space> {options.to} --repo-type space")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
