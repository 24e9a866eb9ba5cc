"""Drawings of the miniature world's sixteen classes: shapes from back to front, about -110..110 on both axes."""

import math


class Shape:
    """A filled polygon of points x0, y0, x1, y1, ... as Pillow takes them, or a line where it has a width."""

    def __init__(self, colour, *numbers, width=None):
        self.colour, self.points, self.width = colour, list(zip(numbers[::2], numbers[1::2], strict=True)), width


class Rectangle(Shape):
    def __init__(self, colour, x0, y0, x1, y1):
        super().__init__(colour, x0, y0, x1, y0, x1, y1, x0, y1)


class Star(Shape):
    """Corners around (x, y), one for every pair of `radii`, evenly from the angle `start`."""

    def __init__(self, colour, x, y, radii, start=0.0):
        corners = [(rx, ry, 2 * math.pi * k / len(radii) + start) for k, (rx, ry) in enumerate(radii)]
        super().__init__(colour, *(n for rx, ry, a in corners for n in (x + rx * math.cos(a), y + ry * math.sin(a))))


class Ellipse(Star):
    def __init__(self, colour, x0, y0, x1, y1):
        super().__init__(colour, (x0 + x1) / 2, (y0 + y1) / 2, [((x1 - x0) / 2, (y1 - y0) / 2)] * 32)


class Circle(Ellipse):
    def __init__(self, colour, x, y, radius):
        super().__init__(colour, x - radius, y - radius, x + radius, y + radius)


def draw_shapes(canvas, shapes, centre, scale, angle, mirrored, tone, outline):
    """Draw `shapes` on a Pillow canvas in one pose; `tone` maps their colours, `outline` is a colour or None."""
    cos, sin, flip = math.cos(angle), math.sin(angle), -1 if mirrored else 1
    for shape in shapes:
        scaled = [(flip * x * scale, y * scale) for x, y in shape.points]
        placed = [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in scaled]
        if shape.width:
            width = max(1, round(shape.width * scale))
            if outline:
                canvas.line(placed, outline, width + 10, joint="curve")
            canvas.line(placed, tone(shape.colour), width, joint="curve")
        else:
            canvas.polygon(placed, tone(shape.colour))
            if outline:
                canvas.line([*placed, placed[0]], outline, width=6, joint="curve")


def vary_colour(rng, colour, spread=20):
    """`colour` with every channel moved by at most `spread`, within 0..255."""
    return tuple(max(0, min(255, int(c + rng.uniform(-spread, spread)))) for c in colour)


def draw_crane_bird(rng):
    white, black = vary_colour(rng, (246, 246, 246), 9), (45, 45, 50)
    return [Shape(black, -12, 45, -16, 105, width=7), Shape(black, 14, 45, 18, 105, width=7),
            Shape(black, -45, 0, -98, 32, -84, 46, -30, 45), Ellipse(white, -58, -12, 45, 55),
            Shape(white, 33, 12, 46, -35, 56, -72, width=18), Ellipse(white, 40, -96, 76, -62),
            Shape((95, 85, 60), 72, -86, 112, -72, 72, -68), Ellipse((205, 35, 35), 44, -100, 72, -80)]


def draw_crane_machine(rng):
    yellow, steel = vary_colour(rng, (235, 178, 30), 22), (75, 75, 82)
    return [Rectangle(yellow, -66, -80, -40, 95), Rectangle(yellow, -96, -88, 98, -66),
            Shape(steel, -53, -112, 95, -78, width=6), Shape(steel, -53, -112, -53, -80, width=6),
            Rectangle(steel, -98, -66, -74, -38), Shape((50, 50, 50), 76, -66, 76, 10, width=6),
            Rectangle(vary_colour(rng, (150, 70, 45)), 58, 8, 94, 38), Rectangle(steel, -90, 88, -16, 106)]


def draw_mouse_animal(rng):
    fur, pink = vary_colour(rng, (145, 130, 122), 22), (228, 160, 165)
    return [Shape(pink, -60, 42, -92, 22, -112, 48, width=9), Ellipse(fur, -72, -8, 48, 70),
            Shape(fur, 30, -12, 62, -8, 98, 26, 84, 44, 30, 56), Ellipse(fur, 14, -52, 60, -4),
            Ellipse(pink, 24, -42, 52, -12), Circle((10, 10, 10), 65, 9, 7), Circle(pink, 94, 28, 10),
            Rectangle(pink, -40, 62, -16, 76), Rectangle(pink, 14, 60, 36, 74)]


def draw_mouse_device(rng):
    shell = vary_colour(rng, (62, 64, 74), 22) if rng.random() < 0.5 else vary_colour(rng, (232, 232, 236), 14)
    return [Shape((50, 50, 52), 0, -75, 14, -98, -14, -122, width=8), Ellipse(shell, -54, -80, 54, 98),
            Shape((130, 130, 136), 0, -78, 0, -6, width=6), Shape((130, 130, 136), -52, -4, 52, -4, width=6),
            Ellipse((70, 160, 225), -11, -58, 11, -18)]


def draw_bat_animal(rng):
    fur, eye = vary_colour(rng, (62, 46, 64), 16), (245, 222, 80)
    return [Shape(fur, 0, -14, -50, -58, -114, -36, -88, 2, -72, 38, -40, 16, 0, 46),
            Shape(fur, 0, -14, 50, -58, 114, -36, 88, 2, 72, 38, 40, 16, 0, 46), Ellipse(fur, -26, -34, 26, 56),
            Shape(fur, -24, -18, -26, -62, -1, -28), Shape(fur, 24, -18, 26, -62, 1, -28),
            Ellipse(eye, -17, -20, -4, -6), Ellipse(eye, 4, -20, 17, -6)]


def draw_bat_club(rng):
    wood = vary_colour(rng, (195, 140, 78), 24)
    club = [Shape(wood, -94, 68, -78, 88, 62, -32, 102, -82, 84, -102, 62, -98, 24, -68),
            Ellipse(wood, 58, -108, 106, -66), Shape((52, 50, 56), -84, 78, -44, 42, width=20),
            Ellipse((92, 62, 42), -104, 64, -74, 96)]
    ball = [Circle((250, 250, 250), 58, 52, 24), Shape((205, 50, 50), 46, 36, 52, 52, 46, 68, width=5)]
    return club + ball * (rng.random() < 0.6)


def draw_jaguar_cat(rng):
    fur, dark, eye = vary_colour(rng, (220, 160, 72), 18), (58, 38, 22), (20, 20, 20)
    spots = [Circle(dark, x + rng.uniform(-5, 5), y + rng.uniform(-4, 4), 9) for x, y in (
        (-58, 2), (-34, -12), (-36, 26), (-10, 6), (-8, -16), (12, 28), (20, -2))]
    return [*(Rectangle(fur, x - 10, 30, x + 10, 92) for x in (-62, -34, 26, 52)),
            Shape(fur, -70, 8, -104, -22, -96, -56, width=14), Ellipse(fur, -82, -26, 70, 54),
            Ellipse(fur, 36, -62, 106, 8), Ellipse(fur, 40, -76, 64, -46), Ellipse(fur, 80, -76, 104, -46), *spots,
            Ellipse(eye, 54, -40, 66, -27), Ellipse(eye, 79, -40, 91, -27), Ellipse((240, 205, 160), 63, -20, 83, -4)]


def draw_jaguar_car(rng):
    paint = vary_colour(rng, rng.choice([(25, 100, 62), (178, 28, 40), (38, 66, 140)]), 18)
    glass, tyre, hub = (196, 224, 238), (30, 30, 33), (190, 190, 196)
    return [Shape(paint, -108, 26, -100, -4, -50, -12, -18, -50, 46, -50, 78, -10, 106, -2, 110, 32, -108, 34),
            Shape(glass, -36, -12, -10, -40, 10, -40, 10, -12), Shape(glass, 20, -12, 20, -40, 40, -40, 62, -12),
            Circle(tyre, -58, 31, 25), Circle(hub, -58, 31, 12), Circle(tyre, 62, 31, 25), Circle(hub, 62, 31, 12)]


def draw_seal_animal(rng):
    skin, whisker = vary_colour(rng, (96, 108, 124), 18), (240, 240, 240)
    return [Shape(skin, -108, 62, -62, 36, 0, 20, 18, -42, 64, -46, 76, 4, 54, 74, -62, 80),
            Shape(skin, -118, 34, -84, 60, -122, 88), Ellipse(skin, 12, -84, 80, -18),
            Shape(vary_colour(rng, (70, 80, 96), 10), 8, 48, 30, 104, 56, 62), Circle((10, 10, 10), 53, -59, 7),
            Ellipse((22, 22, 24), 66, -54, 84, -38), Shape(whisker, 72, -38, 108, -46, width=5),
            Shape(whisker, 72, -34, 106, -26, width=5)]


def draw_seal_stamp(rng):
    wax = vary_colour(rng, (178, 24, 36), 20)
    dark = tuple(int(0.62 * c) for c in wax)
    edge = [90 + rng.uniform(-10, 10) for _ in range(24)]
    return [Star(wax, 0, 0, [(radius, radius) for radius in edge]), Circle(dark, 0, 0, 62), Circle(wax, 0, 0, 52),
            Star(dark, 0, 0, [(44, 44), (18, 18)] * 5, start=-math.pi / 2)]


def draw_palm_tree(rng):
    trunk, leaf, nut = vary_colour(rng, (138, 94, 56), 18), vary_colour(rng, (44, 142, 58), 22), (112, 70, 38)
    shapes = [Shape(trunk, -14, 108, -4, 40, 8, -38, width=22)]
    for angle in (-3.0, -2.45, -1.85, -1.25, -0.65, -0.1):
        x, y = 8 + 96 * math.cos(angle), -30 + 70 * math.sin(angle) + 20
        middle = (8 + x) / 2
        shapes.append(Shape(leaf, 8, -52, middle - 6, (-48 + y) / 2 - 26, x, y, middle + 6, (-44 + y) / 2))
    return [*shapes, Circle(nut, 0, -34, 10), Circle(nut, 18, -32, 10)]


def draw_palm_hand(rng):
    skin = vary_colour(rng, rng.choice([(236, 190, 160), (176, 124, 88), (116, 80, 58)]), 14)
    fingers = [shape for x, top in ((-40, -66), (-14, -92), (13, -90), (38, -64))
               for shape in (Shape(skin, x * 0.9, 14, x * 1.15, top, width=23), Circle(skin, x * 1.15, top, 11))]
    return [Rectangle(skin, -28, 50, 28, 114), Ellipse(skin, -50, -18, 48, 78), *fingers,
            Shape(skin, 34, 46, 84, -4, width=24), Circle(skin, 84, -4, 11),
            Shape(tuple(int(0.7 * c) for c in skin), -32, 18, 26, 32, width=6)]


def draw_butterfly(marks, rng):
    colour, body = vary_colour(rng, rng.choice([(238, 140, 36), (240, 205, 60), (110, 160, 232)]), 16), (50, 40, 40)
    return [Shape(colour, -4, -12, -44, -82, -104, -84, -106, -20, -60, 8),
            Shape(colour, -4, 4, -66, 4, -92, 46, -64, 92, -22, 62),
            Shape(colour, 4, -12, 44, -82, 104, -84, 106, -20, 60, 8),
            Shape(colour, 4, 4, 66, 4, 92, 46, 64, 92, 22, 62), *marks, Shape(body, -4, -48, -26, -92, width=5),
            Shape(body, 4, -48, 26, -92, width=5), Ellipse((56, 44, 44), -10, -54, 10, 72)]


INK, WHITE = (28, 28, 60), (245, 245, 250)
EYES = [Circle(INK, -70, -48, 24), Circle(WHITE, -70, -48, 12), Circle(INK, 70, -48, 24), Circle(WHITE, 70, -48, 12),
        Circle(INK, -56, 46, 21), Circle(WHITE, -56, 46, 10.5), Circle(INK, 56, 46, 21), Circle(WHITE, 56, 46, 10.5)]
BANDS = [Shape(INK, -80, -84, -104, -84, -106, -20, -78, -4), Shape(INK, -70, 10, -92, 46, -64, 92, -42, 76),
         Shape(INK, 80, -84, 104, -84, 106, -20, 78, -4), Shape(INK, 70, 10, 92, 46, 64, 92, 42, 76)]


def draw_finch(marks, rng):
    back, belly, leg = vary_colour(rng, (150, 112, 78), 16), vary_colour(rng, (240, 222, 196), 10), (190, 120, 60)
    return [Shape(vary_colour(rng, (110, 80, 58), 10), -48, 20, -112, 44, -108, 70, -36, 56),
            Shape(leg, -8, 74, -6, 106, width=8), Shape(leg, 22, 74, 24, 106, width=8),
            Ellipse(belly, -62, -26, 64, 82), Ellipse(belly, -2, -92, 84, -10),
            Shape((226, 130, 40), 80, -60, 116, -44, 78, -32),
            Shape(back, -20, -22, -64, 10, -70, 48, 4, 34, 14, -6), *marks]


MASK = [Shape((34, 30, 34), 22, -66, 82, -70, 86, -34, 68, -14, 34, -24), Circle((250, 250, 250), 54, -54, 8)]
BELT = [Shape((34, 30, 34), 18, 0, 70, -8, 68, 26, 14, 44), Circle((20, 20, 20), 54, -54, 8)]
