"""Pictures of the toy world: an annotation -> 16 frames, a GIF or a folder of JPEGs, and what is in every patch.

Not here: objects and their tracks (things.py), what happens (scenarios.py), questions (qagen/generate.py), models.

    python -m toy.world --out data/toy --sheet sheet.png
"""
import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.tasks import LETTERS
from toy.things import COLOURS, DIRECTIONS, FPS, FRAMES, GLYPHS, PLACES, POSES, SHAPES, UNITS

PIXELS = 64   # of the files' sides

INKS = {"black": (20, 20, 24), "white": (250, 250, 250), "grey": (130, 130, 138), "red": (222, 40, 40),
        "green": (30, 165, 70), "blue": (45, 90, 230), "yellow": (250, 215, 40), "purple": (150, 50, 190),
        "orange": (245, 135, 25), "light": (226, 226, 222), "cream": (240, 230, 210), "mist": (208, 220, 228),
        "sand": (232, 200, 130), "rust": (190, 140, 80), "sky": (150, 205, 245), "water": (60, 130, 190),
        "pine": (20, 80, 50), "moss": (130, 165, 110), "brick": (150, 110, 105), "snow": (235, 242, 250)}
INK = {name: i for i, name in enumerate(INKS)}
PALETTE = [value for _ in range(2) for rgb in INKS.values() for value in rgb]  # every ink twice

# the classes of a patch; number 0 is nothing
COLOUR_CLASSES = ("none", *COLOURS, "grey", "white", "black")
SHAPE_CLASSES = ("none", *SHAPES, *GLYPHS, *POSES, "cup", "ball", "lamp", "wall", "block", "agent", "person", "gift",
                 *PLACES, "dark")
ACTIVITY_CLASSES = ("none", "still", *DIRECTIONS, "grows", "shrinks", "spins clockwise", "spins counter-clockwise",
                    "blinks", "jumps", "shakes", "wobbles", "bounces", "zigzags", "appears", "disappears", "teleports",
                    "passes through the wall", "stops in mid-fall", "splits in two", "lit", "touched", "approached",
                    "hides the ball")

# ---- outlines in units of an object's radius, y down; the object's angle turns them, their role picks the ink -----

def ring(n, radius=1.0, inner=None, start=-90.0, x=0.0, y=0.0):
    """n corners on a circle; with `inner`, every other one on a smaller circle."""
    spots = [(math.radians(start + 360 * i / n), inner if inner and i % 2 else radius) for i in range(n)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in spots]

def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]

CROSS = [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
         (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]
DOT = "dot", ring(8, .24, y=-.5)  # off the centre: otherwise a circle would spin invisibly
OUTLINES = {  # shape -> [(role of the ink, corners)]
    "circle": [("fill", ring(18)), DOT], "square": [("fill", box(-.88, -.88, .88, .88)), DOT],
    "triangle": [("fill", ring(3, 1.15)), ("dot", ring(8, .24, y=-.3))],
    "star": [("fill", ring(10, 1.15, .5)), ("dot", ring(8, .22, y=-.4))],
    "cross": [("fill", CROSS), DOT], "diamond": [("fill", [(0, -1.2), (.68, 0), (0, 1.2), (-.68, 0)]), DOT],
    "cup": [("fill", [(-.62, -1), (.62, -1), (.95, 1), (-.95, 1)])], "ball": [("fill", ring(14))],
    "lamp": [("black", box(-.32, .3, .32, 1)), ("fill", ring(16, .72, y=-.3))],
    "wall": [("fill", box(-.11, -1.1, .11, 1.1))], "block": [("fill", box(-.16, -1, .16, 1))],
    "agent": [("fill", [(0, -1.1), (.85, .9), (0, .45), (-.85, .9)])],
    "person": [("fill", [(-.2, -.35), (.2, -.35), (.42, 1), (-.42, 1)]), ("fill", ring(12, .3, y=-.65))],
    "gift": [("fill", box(-.9, -.9, .9, .9)), ("black", box(-.2, -.9, .2, .9)), ("black", box(-.9, -.2, .9, .2))],
}
LEGS, SPINE = [(-.35, 1), (0, .2), (.35, 1)], [(0, .2), (0, -.5)]
STROKES = {  # shape -> lines
    "A": [[(-.7, 1), (0, -1), (.7, 1)], [(-.4, .3), (.4, .3)]],
    "C": [[(.7, -.7), (.2, -1), (-.4, -.8), (-.7, -.2), (-.7, .2), (-.4, .8), (.2, 1), (.7, .7)]],
    "H": [[(-.6, -1), (-.6, 1)], [(.6, -1), (.6, 1)], [(-.6, 0), (.6, 0)]],
    "K": [[(-.55, -1), (-.55, 1)], [(.6, -1), (-.5, .05), (.65, 1)]], "L": [[(-.5, -1), (-.5, 1), (.6, 1)]],
    "T": [[(-.7, -1), (.7, -1)], [(0, -1), (0, 1)]], "X": [[(-.7, -1), (.7, 1)], [(.7, -1), (-.7, 1)]],
    "Z": [[(-.65, -1), (.65, -1), (-.65, 1), (.65, 1)]],
    "raises its arms": [LEGS, SPINE, [(-.55, -1), (0, -.3), (.55, -1)]],
    "spreads its arms": [LEGS, SPINE, [(-.9, -.3), (.9, -.3)]],
    "kneels": [[(-.6, 1), (0, 1), (0, .5), (.45, .5), (.45, 1)], [(0, .5), (0, -.1)], [(0, .1), (.4, .4)]],
    "bows": [[(-.35, 1), (-.2, .2), (.15, 1)], [(-.2, .2), (.5, -.1)], [(.4, 0), (.4, .55)]],
    "kicks": [[(0, 1), (0, .2), (.95, -.05)], [(0, .2), (-.15, -.5)], [(-.65, .1), (-.1, -.3), (.5, -.35)]],
    "lies down": [[(-1, .85), (.4, .85)], [(-.1, .8), (.2, .4)]],
}
HEADS = (0, -.7), (0, -.7), (0, -.3), (.72, -.12), (-.2, -.72), (.65, .75)  # of the poses
OUTLINES |= {pose: [("fill", ring(12, .24, x=x, y=y))] for pose, (x, y) in zip(POSES, HEADS, strict=True)}
SCENERY = {  # place -> the ink of its ground and [(ink, corners)] on it, in units
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

# ---- frames and files ------------------------------------------------------------------------------------------------

def paint(canvas, obj, t, scale, ink=None):
    """Draw an object as it is in frame t, in its own inks, or all of it in the ink number `ink`."""
    appearance = obj["look"][t]
    if appearance == "hidden":
        return

    # from units of its radius to pixels: turned, scaled, moved
    x, y, radius, angle = obj["x"][t] * scale, obj["y"][t] * scale, obj["size"][t] / 2 * scale, obj["angle"][t]
    cos, sin = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))

    def to_pixels(points, stretch=1.0):
        return [(x + stretch * (u * cos - v * sin), y + stretch * (u * sin + v * cos)) for u, v in points]

    # its inks by role, its outlines, its lines
    inks = {"fill": INK["yellow" if appearance == "lit" else obj["colour"]], "dot": INK["white"], "black": INK["black"]}
    if ink is not None:
        inks = dict.fromkeys(inks, ink)
    for role, corners in OUTLINES.get(obj["shape"], ()):
        canvas.polygon(to_pixels(corners), fill=inks[role], outline=inks["dot" if role == "dot" else "black"])
        if appearance == "hollow" and role == "fill":
            canvas.polygon(to_pixels(corners, 0.6), fill=inks["dot"])
    for line in STROKES.get(obj["shape"], ()):
        canvas.line(to_pixels(line), fill=inks["fill"], width=round(radius * (.3 if obj["shape"] in GLYPHS else .17)))

def render(clip, pixels=PIXELS):
    """An annotation -> 16 palette images. The hero is painted last, on top of everything."""
    scale, frames = pixels / UNITS, []
    for t, name in enumerate(clip["background"]):
        ground, parts = SCENERY.get(name, (name, []))  # a plain background is named after its ink
        image = Image.new("P", (pixels, pixels), INK[ground])
        image.putpalette(PALETTE)
        canvas = ImageDraw.Draw(image)
        for ink, corners in parts:
            canvas.polygon([(x * scale, y * scale) for x, y in corners], fill=INK[ink])
        for obj in reversed(clip["objects"]):
            paint(canvas, obj, t, scale)
        frames.append(image)
    return frames

def write_gif(frames, path):
    """subtle: pillow merges equal neighbours, so in every other frame a corner takes the second copy of its ink."""
    corner = (PIXELS - 1, PIXELS - 1)
    for frame in frames[1::2]:
        frame.putpixel(corner, frame.getpixel(corner) + len(INKS))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, optimize=False)

def write_frames(frames, folder, fps=3):
    """A folder of JPEGs at 3 frames per second, from 00001.jpg: the format of TVQA."""
    folder.mkdir()
    for i in range(FRAMES * fps // FPS):
        frames[i * FPS // fps].convert("RGB").save(folder / f"{i + 1:05d}.jpg", quality=95, subsampling=0)

def token_targets(clip, patch=12, frames=range(FRAMES)):
    """The classes of every patch -> (T, L, 3) uint8: indices into COLOUR_CLASSES, SHAPE_CLASSES, ACTIVITY_CLASSES.

    Those of the object with most of the patch's area, if that is a tenth or more; otherwise of the background: nothing,
    or the place as shape."""
    objects, grid, targets = clip["objects"], UNITS // patch, []
    for t in frames:
        # paint the frame with one ink per object, from 1 on, and count each object's pixels in every patch
        mask = Image.new("L", (UNITS, UNITS))
        for number, obj in reversed(list(enumerate(objects, 1))):
            paint(ImageDraw.Draw(mask), obj, t, 1.0, ink=number)
        cells = np.asarray(mask).reshape(grid, patch, grid, patch).swapaxes(1, 2)         # (grid, grid, patch, patch)
        cells = cells.reshape(grid * grid, patch * patch, 1)                              # (L, patch * patch, 1)
        area = (cells == np.arange(len(objects) + 1)).sum(1)                              # (L, 1 + objects)
        area[:, 0] = (patch * patch - 1) // 10  # of the background: what is less than a tenth of the patch

        # each patch takes the classes of the largest
        place = clip["background"][t]
        classes = [(0, SHAPE_CLASSES.index(place) if place in SCENERY else 0, 0)]
        classes += [(COLOUR_CLASSES.index("yellow" if obj["look"][t] == "lit" else obj["colour"]),
                     SHAPE_CLASSES.index(obj["shape"]), ACTIVITY_CLASSES.index(obj["activity"][t])) for obj in objects]
        targets.append(np.array(classes, np.uint8)[area.argmax(1)])                       # (L, 3)
    return np.stack(targets)

def contact_sheet(rows, path, columns=4, pixels=96):
    """Draw (title, annotation, question) rows into a picture, with eight frames of each clip, for people to judge."""
    side = pixels + 2
    width, height = 4 * side + 20, 2 * side + 146
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    canvas, (large, small) = ImageDraw.Draw(sheet), [ImageFont.load_default(size) for size in (15, 13)]
    for i, (title, clip, choice) in enumerate(rows):
        # the title and two rows of four frames
        left, top = 10 + i % columns * width, 10 + i // columns * height
        canvas.text((left, top), title, "black", large)
        for k, frame in enumerate(render(clip, pixels)[::2]):
            sheet.paste(frame.convert("RGB"), (left + k % 4 * side, top + 22 + k // 4 * side))

        # the question, then the options in two columns if they are short; the answer is green
        question = textwrap.wrap(choice["question"], 60)
        for k, line in enumerate(question):
            canvas.text((left, top + 26 + 2 * side + 16 * k), line, "black", small)
        n_columns = 1 if max(map(len, choice["candidates"])) > 25 else 2
        for k, text in enumerate(choice["candidates"]):
            colour = "#0a7a2f" if text == choice["answer"] else "#666666"
            place = left + k % n_columns * width // 2, top + 26 + 2 * side + 16 * (len(question) + k // n_columns)
            canvas.text(place, f"({LETTERS[k]}) {text}", colour, small)
    sheet.save(path)
