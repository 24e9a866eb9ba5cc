"""Write trained tokens as ComfyUI, A1111, Forge, InvokeAI and SD.Next read them.

python export.py img/inet/*/demo --to ComfyUI/models/embeddings python export.py img/inet/*/demo
--to gallery --card          a folder for `hf upload`, with pictures and figures
"""

import sys

from command_line import OneLineParser
from evaluation.files import check_exported
from system.paths import read_path
from system.terminal import exit_code


def main(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code: 2 for a user error."""
    return exit_code(lambda: export_runs(argv))


def export_runs(argv: list[str]):
    """Answer mistakes at once; only then import torch, which takes seconds."""
    parser = OneLineParser(["--to", "--card"], description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=read_path,
        metavar="RUN_DIR",
        help="img/<classifier>/<class>/<exp_id>, or the same under pipeline_token",
    )
    parser.add_argument(
        "--to", required=True, type=read_path, metavar="DIR", help="the folder to write into"
    )
    parser.add_argument(
        "--card", action="store_true", help="add a model card, and the files that diffusers reads"
    )
    arguments = parser.parse_args(argv)
    check_exported(arguments.runs, arguments.to, arguments.card)
    from tokens.export import export_classes

    for name in export_classes(arguments.runs, arguments.to, arguments.card):
        print(f"token: {arguments.to / name}.safetensors")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
