"""Draw docs/world.png: every thing of the miniature world (columns) in every context (rows).

    python -m docs.draw_world
"""

import random
from pathlib import Path

from miniature import world
from report import sheet


def main():
    rng = random.Random(1)
    rows = [(context or "a photo of", [world.draw(i, rng, context) for i in range(len(world.THINGS))])
            for context in (None, *world.CONTEXTS)]
    sheet(rows, Path(__file__).parent / "world.png", cell=64)


if __name__ == "__main__":
    main()
