"""An annotation of the toy world -> its frames, its file, and what stands in every patch of it.

Is: the inks and outlines; the drawing of an annotation (what one is: toyworld.py) as 16 frames; the GIF, or the folder
of JPEGs; the per-patch classes that stage 0 teaches a ViT with; the sheet of questions for people to look at.
Is not: a simulator (toyworld.py) or language (qagen.py, from which it takes the names of colours, shapes and actions).
It knows no model.
Source: ours; what the inks, outlines and tracks have to tell apart follows from MVBench's tasks (arXiv 2311.17005v4).

    pytest tests/test_draw.py
"""

import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qagen import generate

FRAMES, FPS = 16, 2
UNITS = 48    # the world is 48 x 48 units, y pointing down; a patch of the teacher is measured in units
PIXELS = 64   # of the files: decord mistakes rows shorter than 64 pixels for four-channel ones

INKS = {"black": (20, 20, 24), "white": (250, 250, 250), "grey": (130, 130, 138), "red": (222, 40, 40),
        "green": (30, 165, 70), "blue": (45, 90, 230), "yellow": (250, 215, 40), "purple": (150, 50, 190),
        "orange": (245, 135, 25), "light": (226, 226, 222), "cream": (240, 230, 210), "mist": (208, 220, 228),
        "sand": (232, 200, 130), "rust": (190, 140, 80), "sky": (150, 205, 245), "water": (60, 130, 190),
        "pine": (20, 80, 50), "moss": (130, 165, 110), "brick": (150, 110, 105), "snow": (235, 242, 250)}
INK = {name: i for i, name in enumerate(INKS)}
PALETTE = [value for _ in range(2) for rgb in INKS.values() for value in rgb]  # every ink twice

# The classes of the teacher, number 0 being nothing.
COLOURS = ("none", *generate.COLOURS, "grey", "white", "black")
SHAPES = ("none", *generate.SHAPES, *generate.LETTERS, *generate.POSES, "cup", "ball", "lamp", "wall", "block", "agent",
          "person", "gift", *generate.PLACES, "dark")
ACTIVITIES = ("none", "still", *generate.DIRECTIONS, "grows", "shrinks", "spins clockwise", "spins counter-clockwise",
              "blinks", "jumps", "shakes", "wobbles", "bounces", "zigzags", "appears", "disappears", "teleports",
              "passes through the wall", "stops in mid-fall", "splits in two", "lit", "touched", "approached",
              "hides the ball")

# ---------------------------------------------------------------------------------------------------------------------
# Outlines in units of a thing's radius, y pointing down, turned by its angle, in the ink of their role.


def ring(n, radius=1.0, inner=None, start=-90.0, x=0.0, y=0.0):
    """n corners on a circle; with `inner`, every other one on a smaller circle."""
    spots = [(math.radians(start + 360 * i / n), inner if inner and i % 2 else radius) for i in range(n)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in spots]


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


CROSS = [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
         (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]
SPOT = [("mark", ring(8, .24, y=-.5))]  # off the centre, or nobody could see a circle spin
FORMS = {  # shape -> [(role of the ink, corners)]
    "circle": [("fill", ring(18))] + SPOT, "square": [("fill", box(-.88, -.88, .88, .88))] + SPOT,
    "triangle": [("fill", ring(3, 1.15)), ("mark", ring(8, .24, y=-.3))],
    "star": [("fill", ring(10, 1.15, .5)), ("mark", ring(8, .22, y=-.4))],
    "cross": [("fill", CROSS)] + SPOT, "diamond": [("fill", [(0, -1.2), (.68, 0), (0, 1.2), (-.68, 0)])] + SPOT,
    "cup": [("fill", [(-.62, -1), (.62, -1), (.95, 1), (-.95, 1)])], "ball": [("fill", ring(14))],
    "lamp": [("black", box(-.32, .3, .32, 1)), ("fill", ring(16, .72, y=-.3))],
    "wall": [("fill", box(-.11, -1.1, .11, 1.1))], "block": [("fill", box(-.16, -1, .16, 1))],
    "agent": [("fill", [(0, -1.1), (.85, .9), (0, .45), (-.85, .9)])],
    "person": [("fill", [(-.2, -.35), (.2, -.35), (.42, 1), (-.42, 1)]), ("fill", ring(12, .3, y=-.65))],
    "gift": [("fill", box(-.9, -.9, .9, .9)), ("black", box(-.2, -.9, .2, .9)), ("black", box(-.9, -.2, .9, .2))],
}
LEGS = [[(-.35, 1), (0, .2), (.35, 1)]]
STROKES = {  # shape -> lines
    "A": [[(-.7, 1), (0, -1), (.7, 1)], [(-.4, .3), (.4, .3)]],
    "C": [[(.7, -.7), (.2, -1), (-.4, -.8), (-.7, -.2), (-.7, .2), (-.4, .8), (.2, 1), (.7, .7)]],
    "H": [[(-.6, -1), (-.6, 1)], [(.6, -1), (.6, 1)], [(-.6, 0), (.6, 0)]],
    "K": [[(-.55, -1), (-.55, 1)], [(.6, -1), (-.5, .05), (.65, 1)]], "L": [[(-.5, -1), (-.5, 1), (.6, 1)]],
    "T": [[(-.7, -1), (.7, -1)], [(0, -1), (0, 1)]], "X": [[(-.7, -1), (.7, 1)], [(.7, -1), (-.7, 1)]],
    "Z": [[(-.65, -1), (.65, -1), (-.65, 1), (.65, 1)]],
    "raises its arms": [*LEGS, [(0, .2), (0, -.5)], [(-.55, -1), (0, -.3), (.55, -1)]],
    "spreads its arms": [*LEGS, [(0, .2), (0, -.5)], [(-.9, -.3), (.9, -.3)]],
    "kneels": [[(-.6, 1), (0, 1), (0, .5), (.45, .5), (.45, 1)], [(0, .5), (0, -.1)], [(0, .1), (.4, .4)]],
    "bows": [[(-.35, 1), (-.2, .2), (.15, 1)], [(-.2, .2), (.5, -.1)], [(.4, 0), (.4, .55)]],
    "kicks": [[(0, 1), (0, .2), (.95, -.05)], [(0, .2), (-.15, -.5)], [(-.65, .1), (-.1, -.3), (.5, -.35)]],
    "lies down": [[(-1, .85), (.4, .85)], [(-.1, .8), (.2, .4)]],
}
HEADS = {"raises its arms": (0, -.7), "spreads its arms": (0, -.7), "kneels": (0, -.3), "bows": (.72, -.12),
         "kicks": (-.2, -.72), "lies down": (.65, .75)}
FORMS |= {pose: [("fill", ring(12, .24, x=x, y=y))] for pose, (x, y) in HEADS.items()}
SCENERY = {  # place -> the ink of its ground and [(ink, corners)] upon it, in units
    "city": ("mist", [("brick", box(0, 12, 9, 48)), ("grey", box(12, 3, 22, 48)), ("brick", box(26, 16, 35, 48)),
                      ("grey", box(38, 7, 48, 48))]),
    "desert": ("sand", [("rust", [(0, 40), (14, 28), (30, 40), (40, 32), (48, 38), (48, 48), (0, 48)]),
                        ("yellow", ring(14, 5, x=39, y=8))]),
    "sea": ("sky", [("water", box(0, 20, 48, 48)), ("white", [(28, 18), (34, 6), (34, 18)])]),
    "forest": ("moss", [("pine", [(x - 8, 42), (x, y), (x + 8, 42)]) for x, y in ((6, 10), (20, 3), (34, 8), (45, 4))]),
    "snow": ("snow", [("grey", [(0, 34), (13, 8), (24, 28), (36, 5), (48, 30), (48, 36), (0, 36)]),
                      ("white", box(0, 35, 48, 48))]),
    "dark": ("black", []),
}


# ---------------------------------------------------------------------------------------------------------------------
# Frames and files.


def backdrop(name, scale):
    """A palette image of the background; a name without scenery is the ink of a plain one."""
    ground, parts = SCENERY.get(name, (name, []))
    image = Image.new("P", (round(UNITS * scale),) * 2, INK[ground])
    for ink, corners in parts:
        ImageDraw.Draw(image).polygon([(x * scale, y * scale) for x, y in corners], fill=INK[ink])
    return image


def paint(draw, one, t, scale, ident=None):
    """Draw a thing as it is in frame t: in its own inks, or wholly in the ink number `ident`."""
    look, colour = one["look"][t], INK[one["colour"]]
    if look == "hidden":
        return
    radius, turn = one["size"][t] / 2, math.radians(one["angle"][t])
    cos, sin = radius * scale * math.cos(turn), radius * scale * math.sin(turn)
    x, y = one["x"][t] * scale, one["y"][t] * scale
    inks = {"fill": INK["yellow"] if look == "lit" else colour, "mark": INK["white"], "black": INK["black"]}
    if ident is not None:
        inks = dict.fromkeys(inks, ident)

    def spots(points, stretch=1.0):
        return [(x + stretch * (u * cos - v * sin), y + stretch * (u * sin + v * cos)) for u, v in points]

    for role, corners in FORMS.get(one["shape"], ()):
        draw.polygon(spots(corners), fill=inks[role], outline=inks["mark" if role == "mark" else "black"])
        if look == "hollow" and role == "fill":
            draw.polygon(spots(corners, 0.6), fill=inks["mark"])
    for line in STROKES.get(one["shape"], ()):
        draw.line(spots(line), fill=inks["fill"], width=round(radius * scale * (.3 if len(one["shape"]) == 1 else .17)))


def render(clip, pixels=PIXELS):
    """An annotation -> 16 palette images. The hero is painted last and so lies on top."""
    scale = pixels / UNITS
    backdrops = {name: backdrop(name, scale) for name in set(clip["background"])}
    frames = []
    for t, name in enumerate(clip["background"]):
        frames.append(backdrops[name].copy())
        for one in reversed(clip["objects"]):
            paint(ImageDraw.Draw(frames[-1]), one, t, scale)
        frames[-1].putpalette(PALETTE)
    return frames


def write_gif(frames, path):
    """subtle: pillow merges equal neighbours; so a corner takes, in every other frame, the second copy of its ink."""
    corner = (PIXELS - 1, PIXELS - 1)
    for frame in frames[1::2]:
        frame.putpixel(corner, frame.getpixel(corner) + len(INKS))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, optimize=False)


def write_frames(frames, folder, fps=3):
    """A folder of JPEGs at 3 fps, the first of them 00001.jpg: how TVQA comes."""
    folder.mkdir()
    for i in range(FRAMES * fps // FPS):
        frame = frames[i * FPS // fps].convert("RGB")
        frame.save(folder / f"{i + 1:05d}.jpg", quality=95, subsampling=0)


# ---------------------------------------------------------------------------------------------------------------------
# What stands where.


def token_targets(clip, patch=12, frames=None):
    """The teacher of stage 0: for every patch of the frames (default all), what covers most of it.

    -> (T, L, 3) uint8: indices into COLOURS, SHAPES and ACTIVITIES of the thing with most of the patch's area, if that
    is a tenth or more; else the background: nothing, or the place as shape.
    """
    frames, things, grid = range(FRAMES) if frames is None else frames, clip["objects"], UNITS // patch
    targets = np.zeros((len(frames), grid * grid, 3), dtype=np.uint8)                     # (T, L, 3)
    for i, t in enumerate(frames):
        place = clip["background"][t]
        targets[i, :, 1] = SHAPES.index(place) if place in SCENERY else 0
        mask = Image.new("L", (UNITS, UNITS))
        for number in reversed(range(len(things))):
            paint(ImageDraw.Draw(mask), things[number], t, 1.0, ident=number + 1)
        cells = np.asarray(mask).reshape(grid, patch, grid, patch).swapaxes(1, 2)         # (grid, grid, patch, patch)
        cells = cells.reshape(grid * grid, patch * patch, 1)                              # (L, patch * patch, 1)
        area = (cells == np.arange(1, len(things) + 1)).sum(1)                            # (L, things)
        covered = area.max(1, initial=0) >= patch * patch / 10                            # (L,)
        if covered.any():
            targets[i, covered] = np.array([classes(one, t) for one in things])[area[covered].argmax(1)]
    return targets


def classes(one, t):
    """What a thing is in frame t, as indices into COLOURS, SHAPES and ACTIVITIES."""
    colour = "yellow" if one["look"][t] == "lit" else one["colour"]
    return COLOURS.index(colour), SHAPES.index(one["shape"]), ACTIVITIES.index(one["activity"][t])


def contact_sheet(rows, path, columns=4, pixels=96):
    """Draw questions into a picture, each with eight frames of its clip, for people to judge whether they could answer.

    `rows`: (title, clip, multiple-choice question of qagen) triples.
    """
    width, height = 4 * (pixels + 2) + 20, 2 * (pixels + 2) + 146
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    for i, row in enumerate(rows):
        draw_row(sheet, 10 + i % columns * width, 10 + i // columns * height, pixels, *row)
    sheet.save(path)


def draw_row(sheet, left, top, pixels, title, clip, choice):
    draw, (large, small) = ImageDraw.Draw(sheet), [ImageFont.load_default(size) for size in (15, 13)]
    frames, side = render(clip, pixels), pixels + 2
    for k in range(8):
        sheet.paste(frames[2 * k].convert("RGB"), (left + k % 4 * side, top + 22 + k // 4 * side))
    draw.text((left, top), title, "black", large)
    top += 26 + 2 * side
    for line in textwrap.wrap(choice["question"], 60):
        draw.text((left, top), line, "black", small)
        top += 16
    columns = 1 if max(map(len, choice["candidates"])) > 25 else 2
    for k, text in enumerate(choice["candidates"]):
        ink, (row, column) = "#0a7a2f" if text == choice["answer"] else "#666666", divmod(k, columns)
        draw.text((left + column * (4 * side + 20) // 2, top + row * 16), f"({'ABCDE'[k]}) {text}", ink, small)
