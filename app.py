"""A page to try class tokens on: look at ready ones, and learn a word live.

python app.py                                    the miniature, on a CPU python app.py --config
configs/imagenet.yml      Stable Diffusion, on a GPU, with the tokens in pipeline_token/
"""

import sys

from command_line import parse_settings
from page.layout import serve_page
from page.models import open_session
from system.terminal import exit_code


def main(argv: list[str]) -> int:
    """Serve the page; the exit code: 2 for a user error."""
    if "--config" not in argv:
        argv = ["--config", "configs/miniature.yml", *argv]

    def open_page():
        config, _ = parse_settings(argv)
        serve_page(open_session(config))

    return exit_code(open_page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
