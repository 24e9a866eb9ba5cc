"""Write trained tokens as ComfyUI, A1111, Forge, InvokeAI and SD.Next read them.

    python export.py img/inet/*/demo --to ComfyUI/models/embeddings
    python export.py img/inet/*/demo --to gallery --card          a folder for `hf upload`, with pictures and figures
"""

import argparse
import sys

from evaluation.files import read_path
from evaluation.gallery import export_classes
from utils import exit_code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=read_path, metavar="RUN_DIR",
                        help="img/<classifier>/<class>/<exp_id>, or the same under pipeline_token")
    parser.add_argument("--to", required=True, type=read_path, metavar="DIR", help="the folder to write into")
    parser.add_argument("--card", action="store_true", help="add a model card, and the files that diffusers reads")

    def export_runs():
        arguments = parser.parse_args(argv)
        names = export_classes(arguments.runs, arguments.to, arguments.card)
        print("\n".join(f"token: {arguments.to / name}.safetensors" for name in names))

    return exit_code(export_runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
