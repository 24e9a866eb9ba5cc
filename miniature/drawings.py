"""Drawings of the miniature world's sixteen classes, in their own coordinates: about -110..110 on both axes."""

import math


class Pen:
    """Draws an object's shapes on a Pillow canvas, in one pose; `tone` maps colours, `outline` is one or None."""

    def __init__(self, canvas, centre, scale, angle, mirrored, tone, outline):
        self.canvas, self.centre, self.scale, self.tone, self.outline = canvas, centre, scale, tone, outline
        self.cos, self.sin, self.flip = math.cos(angle), math.sin(angle), -1 if mirrored else 1

    def place_point(self, x, y):
        x, y = self.flip * x * self.scale, y * self.scale
        return self.centre[0] + x * self.cos - y * self.sin, self.centre[1] + x * self.sin + y * self.cos

    def draw_polygon(self, points, colour):
        placed = [self.place_point(*point) for point in points]
        self.canvas.polygon(placed, fill=self.tone(colour))
        if self.outline:
            self.canvas.line([*placed, placed[0]], fill=self.outline, width=6, joint="curve")

    def draw_ellipse(self, x0, y0, x1, y1, colour):
        angles = [2 * math.pi * k / 32 for k in range(32)]
        x, y, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        self.draw_polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], colour)

    def draw_rectangle(self, x0, y0, x1, y1, colour):
        self.draw_polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def draw_line(self, points, colour, width):
        placed = [self.place_point(*point) for point in points]
        width = max(1, round(width * self.scale))
        if self.outline:
            self.canvas.line(placed, fill=self.outline, width=width + 10, joint="curve")
        self.canvas.line(placed, fill=self.tone(colour), width=width, joint="curve")


def vary_colour(rng, colour, spread=20):
    """`colour` with every channel moved by at most `spread`, within 0..255."""
    return tuple(max(0, min(255, int(c + rng.uniform(-spread, spread)))) for c in colour)


def draw_crane_bird(pen, rng):
    white, black = vary_colour(rng, (246, 246, 246), 9), (45, 45, 50)
    pen.draw_line([(-12, 45), (-16, 105)], black, 7)
    pen.draw_line([(14, 45), (18, 105)], black, 7)
    pen.draw_polygon([(-45, 0), (-98, 32), (-84, 46), (-30, 45)], black)
    pen.draw_ellipse(-58, -12, 45, 55, white)
    pen.draw_line([(33, 12), (46, -35), (56, -72)], white, 18)
    pen.draw_ellipse(40, -96, 76, -62, white)
    pen.draw_polygon([(72, -86), (112, -72), (72, -68)], (95, 85, 60))
    pen.draw_ellipse(44, -100, 72, -80, (205, 35, 35))


def draw_crane_machine(pen, rng):
    yellow, steel = vary_colour(rng, (235, 178, 30), 22), (75, 75, 82)
    pen.draw_rectangle(-66, -80, -40, 95, yellow)
    pen.draw_rectangle(-96, -88, 98, -66, yellow)
    pen.draw_line([(-53, -112), (95, -78)], steel, 6)
    pen.draw_line([(-53, -112), (-53, -80)], steel, 6)
    pen.draw_rectangle(-98, -66, -74, -38, steel)
    pen.draw_line([(76, -66), (76, 10)], (50, 50, 50), 6)
    pen.draw_rectangle(58, 8, 94, 38, vary_colour(rng, (150, 70, 45)))
    pen.draw_rectangle(-90, 88, -16, 106, steel)


def draw_mouse_animal(pen, rng):
    fur, pink = vary_colour(rng, (145, 130, 122), 22), (228, 160, 165)
    pen.draw_line([(-60, 42), (-92, 22), (-112, 48)], pink, 9)
    pen.draw_ellipse(-72, -8, 48, 70, fur)
    pen.draw_polygon([(30, -12), (62, -8), (98, 26), (84, 44), (30, 56)], fur)
    pen.draw_ellipse(14, -52, 60, -4, fur)
    pen.draw_ellipse(24, -42, 52, -12, pink)
    pen.draw_ellipse(58, 2, 72, 16, (10, 10, 10))
    pen.draw_ellipse(84, 18, 104, 38, pink)
    pen.draw_rectangle(-40, 62, -16, 76, pink)
    pen.draw_rectangle(14, 60, 36, 74, pink)


def draw_mouse_device(pen, rng):
    shell = vary_colour(rng, (62, 64, 74), 22) if rng.random() < 0.5 else vary_colour(rng, (232, 232, 236), 14)
    seam = (130, 130, 136)
    pen.draw_line([(0, -75), (14, -98), (-14, -122)], (50, 50, 52), 8)
    pen.draw_ellipse(-54, -80, 54, 98, shell)
    pen.draw_line([(0, -78), (0, -6)], seam, 6)
    pen.draw_line([(-52, -4), (52, -4)], seam, 6)
    pen.draw_ellipse(-11, -58, 11, -18, (70, 160, 225))


def draw_bat_animal(pen, rng):
    fur = vary_colour(rng, (62, 46, 64), 16)
    for side in (-1, 1):
        pen.draw_polygon([(0, -14), (side * 50, -58), (side * 114, -36), (side * 88, 2), (side * 72, 38),
                          (side * 40, 16), (0, 46)], fur)
    pen.draw_ellipse(-26, -34, 26, 56, fur)
    pen.draw_polygon([(-24, -18), (-26, -62), (-1, -28)], fur)
    pen.draw_polygon([(24, -18), (26, -62), (1, -28)], fur)
    pen.draw_ellipse(-17, -20, -4, -6, (245, 222, 80))
    pen.draw_ellipse(4, -20, 17, -6, (245, 222, 80))


def draw_bat_club(pen, rng):
    wood = vary_colour(rng, (195, 140, 78), 24)
    pen.draw_polygon([(-94, 68), (-78, 88), (62, -32), (102, -82), (84, -102), (62, -98), (24, -68)], wood)
    pen.draw_ellipse(58, -108, 106, -66, wood)
    pen.draw_line([(-84, 78), (-44, 42)], (52, 50, 56), 20)
    pen.draw_ellipse(-104, 64, -74, 96, (92, 62, 42))
    if rng.random() < 0.6:
        pen.draw_ellipse(34, 28, 82, 76, (250, 250, 250))
        pen.draw_line([(46, 36), (52, 52), (46, 68)], (205, 50, 50), 5)


def draw_jaguar_cat(pen, rng):
    fur, dark = vary_colour(rng, (220, 160, 72), 18), (58, 38, 22)
    for x in (-62, -34, 26, 52):
        pen.draw_rectangle(x - 10, 30, x + 10, 92, fur)
    pen.draw_line([(-70, 8), (-104, -22), (-96, -56)], fur, 14)
    pen.draw_ellipse(-82, -26, 70, 54, fur)
    pen.draw_ellipse(36, -62, 106, 8, fur)
    pen.draw_ellipse(40, -76, 64, -46, fur)
    pen.draw_ellipse(80, -76, 104, -46, fur)
    for x, y in ((-58, 2), (-34, -12), (-36, 26), (-10, 6), (-8, -16), (12, 28), (20, -2)):
        x, y = x + rng.uniform(-5, 5), y + rng.uniform(-4, 4)
        pen.draw_ellipse(x - 9, y - 9, x + 9, y + 9, dark)
    pen.draw_ellipse(54, -40, 66, -27, (20, 20, 20))
    pen.draw_ellipse(79, -40, 91, -27, (20, 20, 20))
    pen.draw_ellipse(63, -20, 83, -4, (240, 205, 160))


def draw_jaguar_car(pen, rng):
    paint = vary_colour(rng, rng.choice([(25, 100, 62), (178, 28, 40), (38, 66, 140)]), 18)
    glass, tyre, hub = (196, 224, 238), (30, 30, 33), (190, 190, 196)
    pen.draw_polygon([(-108, 26), (-100, -4), (-50, -12), (-18, -50), (46, -50), (78, -10), (106, -2), (110, 32),
                      (-108, 34)], paint)
    pen.draw_polygon([(-36, -12), (-10, -40), (10, -40), (10, -12)], glass)
    pen.draw_polygon([(20, -12), (20, -40), (40, -40), (62, -12)], glass)
    for x in (-58, 62):
        pen.draw_ellipse(x - 25, 6, x + 25, 56, tyre)
        pen.draw_ellipse(x - 12, 19, x + 12, 43, hub)


def draw_seal_animal(pen, rng):
    skin = vary_colour(rng, (96, 108, 124), 18)
    pen.draw_polygon([(-108, 62), (-62, 36), (0, 20), (18, -42), (64, -46), (76, 4), (54, 74), (-62, 80)], skin)
    pen.draw_polygon([(-118, 34), (-84, 60), (-122, 88)], skin)
    pen.draw_ellipse(12, -84, 80, -18, skin)
    pen.draw_polygon([(8, 48), (30, 104), (56, 62)], vary_colour(rng, (70, 80, 96), 10))
    pen.draw_ellipse(46, -66, 60, -52, (10, 10, 10))
    pen.draw_ellipse(66, -54, 84, -38, (22, 22, 24))
    pen.draw_line([(72, -38), (108, -46)], (240, 240, 240), 5)
    pen.draw_line([(72, -34), (106, -26)], (240, 240, 240), 5)


def draw_seal_stamp(pen, rng):
    wax = vary_colour(rng, (178, 24, 36), 20)
    dark = tuple(int(0.62 * c) for c in wax)
    blob = [(radius * math.cos(2 * math.pi * k / 24), radius * math.sin(2 * math.pi * k / 24))
            for k, radius in enumerate(90 + rng.uniform(-10, 10) for _ in range(24))]
    pen.draw_polygon(blob, wax)
    pen.draw_ellipse(-62, -62, 62, 62, dark)
    pen.draw_ellipse(-52, -52, 52, 52, wax)
    star = [(radius * math.cos(math.pi * k / 5 - math.pi / 2), radius * math.sin(math.pi * k / 5 - math.pi / 2))
            for k, radius in enumerate([44, 18] * 5)]
    pen.draw_polygon(star, dark)


def draw_palm_tree(pen, rng):
    trunk, leaf = vary_colour(rng, (138, 94, 56), 18), vary_colour(rng, (44, 142, 58), 22)
    pen.draw_line([(-14, 108), (-4, 40), (8, -38)], trunk, 22)
    for angle in (-3.0, -2.45, -1.85, -1.25, -0.65, -0.1):
        x, y = 8 + 96 * math.cos(angle), -30 + 70 * math.sin(angle) + 20
        middle = (8 + x) / 2
        pen.draw_polygon([(8, -52), (middle - 6, (-48 + y) / 2 - 26), (x, y), (middle + 6, (-44 + y) / 2)], leaf)
    pen.draw_ellipse(-10, -44, 10, -24, (112, 70, 38))
    pen.draw_ellipse(8, -42, 28, -22, (112, 70, 38))


def draw_palm_hand(pen, rng):
    skin = vary_colour(rng, rng.choice([(236, 190, 160), (176, 124, 88), (116, 80, 58)]), 14)
    pen.draw_rectangle(-28, 50, 28, 114, skin)
    pen.draw_ellipse(-50, -18, 48, 78, skin)
    for x, top in ((-40, -66), (-14, -92), (13, -90), (38, -64)):
        pen.draw_line([(x * 0.9, 14), (x * 1.15, top)], skin, 23)
        pen.draw_ellipse(x * 1.15 - 11, top - 11, x * 1.15 + 11, top + 11, skin)
    pen.draw_line([(34, 46), (84, -4)], skin, 24)
    pen.draw_ellipse(73, -15, 95, 7, skin)
    pen.draw_line([(-32, 18), (26, 32)], tuple(int(0.7 * c) for c in skin), 6)


def _draw_wings(pen, rng):
    colour = vary_colour(rng, rng.choice([(238, 140, 36), (240, 205, 60), (110, 160, 232)]), 16)
    for side in (-1, 1):
        for wing in (((4, -12), (44, -82), (104, -84), (106, -20), (60, 8)),
                     ((4, 4), (66, 4), (92, 46), (64, 92), (22, 62))):
            pen.draw_polygon([(side * x, y) for x, y in wing], colour)


def _draw_butterfly_body(pen):
    pen.draw_line([(-4, -48), (-26, -92)], (50, 40, 40), 5)
    pen.draw_line([(4, -48), (26, -92)], (50, 40, 40), 5)
    pen.draw_ellipse(-10, -54, 10, 72, (56, 44, 44))


def draw_butterfly_eyed(pen, rng):
    _draw_wings(pen, rng)
    for x, y, size in ((70, -48, 24), (56, 46, 21)):
        for side in (-1, 1):
            pen.draw_ellipse(side * x - size, y - size, side * x + size, y + size, (28, 28, 60))
            pen.draw_ellipse(side * x - size / 2, y - size / 2, side * x + size / 2, y + size / 2, (245, 245, 250))
    _draw_butterfly_body(pen)


def draw_butterfly_banded(pen, rng):
    _draw_wings(pen, rng)
    for side in (-1, 1):
        pen.draw_polygon([(side * 80, -84), (side * 104, -84), (side * 106, -20), (side * 78, -4)], (28, 28, 60))
        pen.draw_polygon([(side * 70, 10), (side * 92, 46), (side * 64, 92), (side * 42, 76)], (28, 28, 60))
    _draw_butterfly_body(pen)


def _draw_finch(pen, rng):
    back, belly = vary_colour(rng, (150, 112, 78), 16), vary_colour(rng, (240, 222, 196), 10)
    pen.draw_polygon([(-48, 20), (-112, 44), (-108, 70), (-36, 56)], vary_colour(rng, (110, 80, 58), 10))
    for x in (-8, 22):
        pen.draw_line([(x, 74), (x + 2, 106)], (190, 120, 60), 8)
    pen.draw_ellipse(-62, -26, 64, 82, belly)
    pen.draw_ellipse(-2, -92, 84, -10, belly)
    pen.draw_polygon([(80, -60), (116, -44), (78, -32)], (226, 130, 40))
    pen.draw_polygon([(-20, -22), (-64, 10), (-70, 48), (4, 34), (14, -6)], back)


def draw_finch_masked(pen, rng):
    _draw_finch(pen, rng)
    pen.draw_polygon([(22, -66), (82, -70), (86, -34), (68, -14), (34, -24)], (34, 30, 34))
    pen.draw_ellipse(46, -62, 62, -46, (250, 250, 250))


def draw_finch_banded(pen, rng):
    _draw_finch(pen, rng)
    pen.draw_polygon([(18, 0), (70, -8), (68, 26), (14, 44)], (34, 30, 34))
    pen.draw_ellipse(46, -62, 62, -46, (20, 20, 20))
