"""Drawings of the miniature world's sixteen classes.

Shapes from back to front, about -110..110 on both axes.
"""

import math
from random import Random

from PIL import ImageDraw

Colour = tuple[int, int, int]
BLACK = (10, 10, 10)
OUTLINE = 6  # pixels, of a closed shape; a line's is five on either side


class Shape:
    """A filled polygon of points "x0 y0  x1 y1 ...", or a line where it has a width."""

    def __init__(self, colour: Colour, points: str, width: float | None = None):
        numbers = list(map(float, points.split()))
        self.colour = colour
        self.points = list(zip(numbers[::2], numbers[1::2], strict=True))
        self.width = width


class Rectangle(Shape):
    """From the corner x0, y0 to the corner x1, y1."""

    def __init__(self, colour: Colour, x0: float, y0: float, x1: float, y1: float):
        super().__init__(colour, f"{x0} {y0}  {x1} {y0}  {x1} {y1}  {x0} {y1}")


class Star(Shape):
    """Corners around (x, y), one for every pair of `radii`, evenly from the angle `start`."""

    def __init__(
        self,
        colour: Colour,
        x: float,
        y: float,
        radii: list[tuple[float, float]],
        start: float = 0.0,
    ):
        super().__init__(colour, "")
        for k, (rx, ry) in enumerate(radii):
            angle = 2 * math.pi * k / len(radii) + start
            self.points.append((x + rx * math.cos(angle), y + ry * math.sin(angle)))


class Ellipse(Star):
    """In the rectangle from x0, y0 to x1, y1."""

    def __init__(self, colour: Colour, x0: float, y0: float, x1: float, y1: float):
        radii = ((x1 - x0) / 2, (y1 - y0) / 2)
        super().__init__(colour, (x0 + x1) / 2, (y0 + y1) / 2, [radii] * 32)


class Circle(Ellipse):
    """Around (x, y)."""

    def __init__(self, colour: Colour, x: float, y: float, radius: float):
        super().__init__(colour, x - radius, y - radius, x + radius, y + radius)


def draw_shapes(
    canvas: ImageDraw.ImageDraw,
    shapes: list[Shape],
    centre: tuple[float, float],
    scale: float,
    angle: float,
    mirrored: bool,
    tone,
    outline: Colour | None,
):
    """Draw `shapes` in one pose; `tone` maps their colours, `outline` is a colour or None."""
    cos, sin = math.cos(angle), math.sin(angle)
    flip = -1 if mirrored else 1
    for shape in shapes:
        placed = []
        for x, y in shape.points:
            x, y = flip * x * scale, y * scale
            placed.append((centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos))
        if shape.width:
            width = max(1, round(shape.width * scale))
            if outline:
                canvas.line(placed, outline, width + 10, joint="curve")
            canvas.line(placed, tone(shape.colour), width, joint="curve")
        else:
            canvas.polygon(placed, tone(shape.colour))
            if outline:
                canvas.line([*placed, placed[0]], outline, width=OUTLINE, joint="curve")


def vary_colour(rng: Random, colour: Colour, spread: float = 20) -> Colour:
    """`colour` with every channel moved by at most `spread`, within 0..255."""
    varied = []
    for channel in colour:
        moved = int(channel + rng.uniform(-spread, spread))
        varied.append(max(0, min(255, moved)))
    return tuple(varied)


def darken_colour(colour: Colour, share: float) -> Colour:
    """`colour` with every channel at a share of it."""
    return tuple(int(share * channel) for channel in colour)


def draw_crane_bird(rng: Random) -> list[Shape]:
    """On long legs, with a red cap."""
    white = vary_colour(rng, (246, 246, 246), 9)
    black = (45, 45, 50)
    left_leg = Shape(black, "-12 45  -16 105", width=7)
    right_leg = Shape(black, "14 45  18 105", width=7)
    tail = Shape(black, "-45 0  -98 32  -84 46  -30 45")
    body = Ellipse(white, -58, -12, 45, 55)
    neck = Shape(white, "33 12  46 -35  56 -72", width=18)
    head = Ellipse(white, 40, -96, 76, -62)
    beak = Shape((95, 85, 60), "72 -86  112 -72  72 -68")
    cap = Ellipse((205, 35, 35), 44, -100, 72, -80)
    return [left_leg, right_leg, tail, body, neck, head, beak, cap]


def draw_crane_machine(rng: Random) -> list[Shape]:
    """A tower crane with a load."""
    yellow = vary_colour(rng, (235, 178, 30), 22)
    steel = (75, 75, 82)
    tower = Rectangle(yellow, -66, -80, -40, 95)
    jib = Rectangle(yellow, -96, -88, 98, -66)
    stay = Shape(steel, "-53 -112  95 -78", width=6)
    post = Shape(steel, "-53 -112  -53 -80", width=6)
    counterweight = Rectangle(steel, -98, -66, -74, -38)
    rope = Shape((50, 50, 50), "76 -66  76 10", width=6)
    load = Rectangle(vary_colour(rng, (150, 70, 45)), 58, 8, 94, 38)
    foot = Rectangle(steel, -90, 88, -16, 106)
    return [tower, jib, stay, post, counterweight, rope, load, foot]


def draw_mouse_animal(rng: Random) -> list[Shape]:
    """With a pink tail and ears."""
    fur = vary_colour(rng, (145, 130, 122), 22)
    pink = (228, 160, 165)
    tail = Shape(pink, "-60 42  -92 22  -112 48", width=9)
    body = Ellipse(fur, -72, -8, 48, 70)
    head = Shape(fur, "30 -12  62 -8  98 26  84 44  30 56")
    ear = Ellipse(fur, 14, -52, 60, -4)
    inner_ear = Ellipse(pink, 24, -42, 52, -12)
    eye = Circle(BLACK, 65, 9, 7)
    nose = Circle(pink, 94, 28, 10)
    feet = [Rectangle(pink, -40, 62, -16, 76), Rectangle(pink, 14, 60, 36, 74)]
    return [tail, body, head, ear, inner_ear, eye, nose, *feet]


def draw_mouse_device(rng: Random) -> list[Shape]:
    """A computer's, dark or bright."""
    is_dark = rng.random() < 0.5
    if is_dark:
        shell_colour = vary_colour(rng, (62, 64, 74), 22)
    else:
        shell_colour = vary_colour(rng, (232, 232, 236), 14)
    grey = (130, 130, 136)
    cable = Shape((50, 50, 52), "0 -75  14 -98  -14 -122", width=8)
    shell = Ellipse(shell_colour, -54, -80, 54, 98)
    between = Shape(grey, "0 -78  0 -6", width=6)
    below = Shape(grey, "-52 -4  52 -4", width=6)
    wheel = Ellipse((70, 160, 225), -11, -58, 11, -18)
    return [cable, shell, between, below, wheel]


def draw_bat_animal(rng: Random) -> list[Shape]:
    """In flight."""
    fur = vary_colour(rng, (62, 46, 64), 16)
    yellow = (245, 222, 80)
    left_wing = Shape(fur, "0 -14  -50 -58  -114 -36  -88 2  -72 38  -40 16  0 46")
    right_wing = Shape(fur, "0 -14  50 -58  114 -36  88 2  72 38  40 16  0 46")
    body = Ellipse(fur, -26, -34, 26, 56)
    left_ear = Shape(fur, "-24 -18  -26 -62  -1 -28")
    right_ear = Shape(fur, "24 -18  26 -62  1 -28")
    left_eye = Ellipse(yellow, -17, -20, -4, -6)
    right_eye = Ellipse(yellow, 4, -20, 17, -6)
    return [left_wing, right_wing, body, left_ear, right_ear, left_eye, right_eye]


def draw_bat_club(rng: Random) -> list[Shape]:
    """A baseball bat, often with a ball."""
    wood = vary_colour(rng, (195, 140, 78), 24)
    shaft = Shape(wood, "-94 68  -78 88  62 -32  102 -82  84 -102  62 -98  24 -68")
    end = Ellipse(wood, 58, -108, 106, -66)
    grip = Shape((52, 50, 56), "-84 78  -44 42", width=20)
    knob = Ellipse((92, 62, 42), -104, 64, -74, 96)
    shapes = [shaft, end, grip, knob]
    if rng.random() < 0.6:
        ball = Circle((250, 250, 250), 58, 52, 24)
        seam = Shape((205, 50, 50), "46 36  52 52  46 68", width=5)
        shapes += [ball, seam]
    return shapes


def draw_jaguar_cat(rng: Random) -> list[Shape]:
    """With spots that vary."""
    fur = vary_colour(rng, (220, 160, 72), 18)
    dark = (58, 38, 22)
    eye = (20, 20, 20)
    spots = []
    for x, y in ((-58, 2), (-34, -12), (-36, 26), (-10, 6), (-8, -16), (12, 28), (20, -2)):
        spots.append(Circle(dark, x + rng.uniform(-5, 5), y + rng.uniform(-4, 4), 9))
    legs = [Rectangle(fur, x - 10, 30, x + 10, 92) for x in (-62, -34, 26, 52)]
    tail = Shape(fur, "-70 8  -104 -22  -96 -56", width=14)
    body = Ellipse(fur, -82, -26, 70, 54)
    head = Ellipse(fur, 36, -62, 106, 8)
    ears = [Ellipse(fur, 40, -76, 64, -46), Ellipse(fur, 80, -76, 104, -46)]
    eyes = [Ellipse(eye, 54, -40, 66, -27), Ellipse(eye, 79, -40, 91, -27)]
    muzzle = Ellipse((240, 205, 160), 63, -20, 83, -4)
    return [*legs, tail, body, head, *ears, *spots, *eyes, muzzle]


def draw_jaguar_car(rng: Random) -> list[Shape]:
    """Green, red or blue."""
    paint = vary_colour(rng, rng.choice([(25, 100, 62), (178, 28, 40), (38, 66, 140)]), 18)
    glass, tyre, hub = (196, 224, 238), (30, 30, 33), (190, 190, 196)
    outline = "-108 26  -100 -4  -50 -12  -18 -50  46 -50  78 -10  106 -2  110 32  -108 34"
    body = Shape(paint, outline)
    windscreen = Shape(glass, "-36 -12  -10 -40  10 -40  10 -12")
    window = Shape(glass, "20 -12  20 -40  40 -40  62 -12")
    rear = [Circle(tyre, -58, 31, 25), Circle(hub, -58, 31, 12)]
    front = [Circle(tyre, 62, 31, 25), Circle(hub, 62, 31, 12)]
    return [body, windscreen, window, *rear, *front]


def draw_seal_animal(rng: Random) -> list[Shape]:
    """With whiskers."""
    skin = vary_colour(rng, (96, 108, 124), 18)
    white = (240, 240, 240)
    body = Shape(skin, "-108 62  -62 36  0 20  18 -42  64 -46  76 4  54 74  -62 80")
    tail = Shape(skin, "-118 34  -84 60  -122 88")
    head = Ellipse(skin, 12, -84, 80, -18)
    flipper = Shape(vary_colour(rng, (70, 80, 96), 10), "8 48  30 104  56 62")
    eye = Circle(BLACK, 53, -59, 7)
    nose = Ellipse((22, 22, 24), 66, -54, 84, -38)
    whiskers = [
        Shape(white, "72 -38  108 -46", width=5),
        Shape(white, "72 -34  106 -26", width=5),
    ]
    return [body, tail, head, flipper, eye, nose, *whiskers]


def draw_seal_stamp(rng: Random) -> list[Shape]:
    """Of wax, its edge uneven."""
    wax = vary_colour(rng, (178, 24, 36), 20)
    dark = darken_colour(wax, 0.62)
    edge = []
    for _ in range(24):
        radius = 90 + rng.uniform(-10, 10)
        edge.append((radius, radius))
    star = Star(dark, 0, 0, [(44, 44), (18, 18)] * 5, start=-math.pi / 2)
    return [Star(wax, 0, 0, edge), Circle(dark, 0, 0, 62), Circle(wax, 0, 0, 52), star]


def draw_palm_tree(rng: Random) -> list[Shape]:
    """With two coconuts."""
    trunk = vary_colour(rng, (138, 94, 56), 18)
    leaf = vary_colour(rng, (44, 142, 58), 22)
    nut = (112, 70, 38)
    shapes: list[Shape] = [Shape(trunk, "-14 108  -4 40  8 -38", width=22)]
    for angle in (-3.0, -2.45, -1.85, -1.25, -0.65, -0.1):
        x, y = 8 + 96 * math.cos(angle), -30 + 70 * math.sin(angle) + 20
        middle = (8 + x) / 2
        upper = f"{middle - 6} {(-48 + y) / 2 - 26}"
        lower = f"{middle + 6} {(-44 + y) / 2}"
        shapes.append(Shape(leaf, f"8 -52  {upper}  {x} {y}  {lower}"))
    return [*shapes, Circle(nut, 0, -34, 10), Circle(nut, 18, -32, 10)]


def draw_palm_hand(rng: Random) -> list[Shape]:
    """Of one of three skins."""
    skins = [(236, 190, 160), (176, 124, 88), (116, 80, 58)]
    skin = vary_colour(rng, rng.choice(skins), 14)
    wrist = Rectangle(skin, -28, 50, 28, 114)
    palm = Ellipse(skin, -50, -18, 48, 78)
    fingers: list[Shape] = []
    for x, top in ((-40, -66), (-14, -92), (13, -90), (38, -64)):
        fingers.append(Shape(skin, f"{x * 0.9} 14  {x * 1.15} {top}", width=23))
        fingers.append(Circle(skin, x * 1.15, top, 11))
    thumb = [Shape(skin, "34 46  84 -4", width=24), Circle(skin, 84, -4, 11)]
    line = Shape(darken_colour(skin, 0.7), "-32 18  26 32", width=6)
    return [wrist, palm, *fingers, *thumb, line]


def draw_butterfly(marks: list[Shape], rng: Random) -> list[Shape]:
    """Orange, yellow or blue, with `marks` on its wings."""
    colours = [(238, 140, 36), (240, 205, 60), (110, 160, 232)]
    colour = vary_colour(rng, rng.choice(colours), 16)
    dark = (50, 40, 40)
    wings = [
        Shape(colour, "-4 -12  -44 -82  -104 -84  -106 -20  -60 8"),
        Shape(colour, "-4 4  -66 4  -92 46  -64 92  -22 62"),
        Shape(colour, "4 -12  44 -82  104 -84  106 -20  60 8"),
        Shape(colour, "4 4  66 4  92 46  64 92  22 62"),
    ]
    feelers = [
        Shape(dark, "-4 -48  -26 -92", width=5),
        Shape(dark, "4 -48  26 -92", width=5),
    ]
    body = Ellipse((56, 44, 44), -10, -54, 10, 72)
    return [*wings, *marks, *feelers, body]


def draw_eye(x: float, y: float, outer: float, inner: float) -> list[Shape]:
    """A spot on a wing."""
    return [Circle(INK, x, y, outer), Circle(WHITE, x, y, inner)]


INK, WHITE = (28, 28, 60), (245, 245, 250)
EYES = [
    *draw_eye(-70, -48, 24, 12),
    *draw_eye(70, -48, 24, 12),
    *draw_eye(-56, 46, 21, 10.5),
    *draw_eye(56, 46, 21, 10.5),
]
BANDS = [
    Shape(INK, "-80 -84  -104 -84  -106 -20  -78 -4"),
    Shape(INK, "-70 10  -92 46  -64 92  -42 76"),
    Shape(INK, "80 -84  104 -84  106 -20  78 -4"),
    Shape(INK, "70 10  92 46  64 92  42 76"),
]


def draw_finch(marks: list[Shape], rng: Random) -> list[Shape]:
    """With `marks` on its head or breast."""
    back = vary_colour(rng, (150, 112, 78), 16)
    belly = vary_colour(rng, (240, 222, 196), 10)
    leg = (190, 120, 60)
    tail = Shape(vary_colour(rng, (110, 80, 58), 10), "-48 20  -112 44  -108 70  -36 56")
    legs = [Shape(leg, "-8 74  -6 106", width=8), Shape(leg, "22 74  24 106", width=8)]
    body = Ellipse(belly, -62, -26, 64, 82)
    head = Ellipse(belly, -2, -92, 84, -10)
    beak = Shape((226, 130, 40), "80 -60  116 -44  78 -32")
    wing = Shape(back, "-20 -22  -64 10  -70 48  4 34  14 -6")
    return [tail, *legs, body, head, beak, wing, *marks]


MASK_INK, EYE_WHITE, EYE_BLACK = (34, 30, 34), (250, 250, 250), (20, 20, 20)
MASK = [
    Shape(MASK_INK, "22 -66  82 -70  86 -34  68 -14  34 -24"),
    Circle(EYE_WHITE, 54, -54, 8),
]
BELT = [
    Shape(MASK_INK, "18 0  70 -8  68 26  14 44"),
    Circle(EYE_BLACK, 54, -54, 8),
]
