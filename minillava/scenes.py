"""Scenes of coloured shapes, and what one can ask and say about them.

A scene is a plain background with one to seven objects, each in its own cell of a 3 x 3 grid, jittered, turned,
and at times large enough to overlap its neighbour. Everything follows from a `random.Random`, so a seed names a
scene. `short_question` and `description` ask about a scene in several wordings and give the true answers.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 40, 40),
    "green": (45, 160, 65),
    "blue": (45, 85, 220),
    "yellow": (240, 210, 45),
    "purple": (140, 55, 180),
    "orange": (240, 130, 30),
    "pink": (245, 140, 190),
    "cyan": (60, 200, 220),
}
BACKGROUNDS = {"white": (246, 246, 246), "grey": (128, 128, 128), "black": (14, 14, 14), "beige": (232, 214, 182)}
NEAR, FAR = math.hypot(1 / 3, 1 / 3), math.hypot(1 / 3, 1.1)  # corners of a cross; its arms are 2/3 of a radius wide
TILT = math.degrees(math.atan2(1 / 3, 1.1))
# Of every shape: angle in degrees from straight up, and distance from the middle. Round ones have many corners.
CORNERS: dict[str, list[tuple[float, float]]] = {
    "circle": [(step * 6, 1.0) for step in range(60)],
    "square": [(45 + step * 90, 1.2) for step in range(4)],
    "triangle": [(step * 120, 1.2) for step in range(3)],
    "star": [(step * 36, 1.2 if step % 2 == 0 else 0.5) for step in range(10)],
    "cross": [(arm * 90 + turn, far) for arm in range(4) for turn, far in ((-TILT, FAR), (TILT, FAR), (45, NEAR))],
}
CORNERS["ring"] = CORNERS["circle"]
SHAPES = tuple(CORNERS)
SIZES = {"small": (0.062, 0.075), "large": (0.115, 0.145)}  # radius as a share of the image's side
SMALLEST = 0.042  # of "small" objects that cover 2 x 2 patches of 24 x 24, where scenes are to be harder
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DESCRIBE = (
    "Describe the image in detail.",
    "Give a detailed description of the image.",
    "What do you see in this image? Describe everything.",
    "Please describe all objects in the picture.",
)
MAX_OBJECTS = 7


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` and `radius` are shares of the image's side, `angle` is in degrees."""

    size: str
    colour: str
    shape: str
    cell: int  # 0 .. 8, in reading order
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """A background and its objects, in reading order."""

    background: str
    rgb: tuple[int, int, int]
    things: tuple[Thing, ...]


def jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    """The colour with every channel moved by up to `by`."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-by, by))) for channel in rgb)
    return red, green, blue


def make_scene(rng: random.Random, max_objects: int = MAX_OBJECTS, smallest: float = SIZES["small"][0]) -> Scene:
    """A random scene of one to `max_objects` objects; small ones have a radius from `smallest` on."""
    background = rng.choice(list(BACKGROUNDS))
    things = []
    for cell in sorted(rng.sample(range(9), rng.randint(1, max_objects))):
        size, colour = rng.choice(list(SIZES)), rng.choice(list(COLOURS))
        low, high = SIZES[size] if size == "large" else (smallest, SIZES[size][1])
        things.append(
            Thing(
                size=size,
                colour=colour,
                shape=rng.choice(SHAPES),
                cell=cell,
                x=(cell % 3 + 0.5) / 3 + rng.uniform(-0.045, 0.045),
                y=(cell // 3 + 0.5) / 3 + rng.uniform(-0.045, 0.045),
                radius=rng.uniform(low, high),
                angle=rng.uniform(-15, 15),
                rgb=jitter(rng, COLOURS[colour], 12),
            )
        )
    return Scene(background, jitter(rng, BACKGROUNDS[background], 8), tuple(things))


def outline(thing: Thing, side: int) -> list[tuple[float, float]]:
    """Corners of the object in pixels of an image `side` pixels wide."""
    points = []
    for degrees, distance in CORNERS[thing.shape]:
        turn, radius = math.radians(degrees + thing.angle), thing.radius * distance
        points.append(((thing.x + radius * math.sin(turn)) * side, (thing.y - radius * math.cos(turn)) * side))
    return points


def draw(scene: Scene, side: int = 384, oversample: int = 1) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB), and a map (L) of which object covers each pixel: 0 for none, i for `things[i - 1]`.

    Edges are hard at `oversample` 1, which the processor's resizing smooths; more makes a nicer picture.
    """
    canvas = side * oversample
    image, cover = Image.new("RGB", (canvas, canvas), scene.rgb), Image.new("L", (canvas, canvas), 0)
    for index, thing in enumerate(scene.things, start=1):
        points = outline(thing, canvas)
        left, top = (int(min(axis)) for axis in zip(*points))
        mask = Image.new("L", (int(thing.radius * canvas * 2.6),) * 2, 0)
        pen = ImageDraw.Draw(mask)
        pen.polygon([(x - left, y - top) for x, y in points], fill=255)
        if thing.shape == "ring":
            hole, x, y = thing.radius * canvas * 0.55, thing.x * canvas - left, thing.y * canvas - top
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        image.paste(thing.rgb, (left, top), mask)
        cover.paste(index, (left, top), mask)
    if oversample > 1:
        image = image.reduce(oversample)
        cover = cover.resize((side, side), Image.Resampling.NEAREST)
    return image, cover


# ---------------------------------------------------------------- words


def describe(scene: Scene) -> str:
    """The long answer: how many objects on what, then every object in reading order."""
    count = len(scene.things)
    things = "one object" if count == 1 else f"{NUMBERS[count]} objects"
    sentences = [f"The image shows {things} on a {scene.background} background."]
    sentences += [f"{at(t.place).capitalize()} there is {a(t.size)} {t.colour} {t.shape}." for t in scene.things]
    return " ".join(sentences)


def at(place: str) -> str:
    """The place with its preposition."""
    return f"{'in' if place == 'centre' else 'at'} the {place}"


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def named(description: str) -> list[tuple[str, str, str, str]]:
    """(size, colour, shape, place) of every object that a description in the wording of `describe` names."""
    pattern = (
        rf"[AI][tn] the ({'|'.join(PLACES)}) there is a ({'|'.join(SIZES)}) "
        rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\."
    )
    return [(size, colour, shape, place) for place, size, colour, shape in re.findall(pattern, description)]


def places(things: Sequence[Thing]) -> str:
    """Where things are, in reading order: "at the top left and in the centre"; "nowhere" for none."""
    *others, last = [at(thing.place) for thing in things] or ["nowhere"]
    return f"{', '.join(others)} and {last}" if others else last


NUMBER_OF = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
WORDINGS = {
    "count": ("How many objects are there?", "Count the objects.", "How many shapes do you see?"),
    "count by colour": NUMBER_OF,
    "count by shape": NUMBER_OF,
    "what is where": ("What is {}?", "Which object is {}?", "What do you see {}?"),
    "where is": ("Where is the {}?", "In which place is the {}?", "Where do you see the {}?"),
    "where are": ("Where are the {}?", "In which places are the {}?", "Where do you see {}?"),
    "yes or no": ("Is there {} {}?", "Do you see {} {}?", "Does the image show {} {}?"),
    "compare": ("Are there more {} than {}?", "Do you see more {} than {}?"),
}
KINDS = tuple(WORDINGS)


class Question(NamedTuple):
    """One turn about a scene; `cells` has the places of the objects that each sentence of the answer is about."""

    kind: str
    text: str
    answer: str
    cells: tuple[tuple[int, ...], ...]


def short_question(rng: random.Random, scene: Scene, weights: Sequence[float] = (1,) * len(KINDS)) -> Question:
    """A question with a short answer; `weights` says how often each of KINDS is drawn."""
    things = scene.things
    (kind,) = rng.choices(KINDS, weights)
    thing = rng.choice(things)
    names: tuple[str, ...] = ()
    about: Sequence[Thing] = things
    if kind == "count":
        answer = NUMBERS[len(things)]
    elif kind in ("count by colour", "count by shape", "where are"):
        if kind == "count by colour" or (kind == "where are" and rng.random() < 0.5):
            colour = thing.colour if rng.random() < 0.7 else rng.choice(list(COLOURS))
            names, about = (f"{colour} objects",), [t for t in things if t.colour == colour]
        else:
            shape = thing.shape if rng.random() < 0.7 else rng.choice(SHAPES)
            names, about = (plural(shape),), [t for t in things if t.shape == shape]
        answer = places(about) if kind == "where are" else NUMBERS[len(about)]
    elif kind == "what is where":
        cell = thing.cell if rng.random() < 0.8 else rng.randrange(9)
        names, about = (at(PLACES[cell]),), [t for t in things if t.cell == cell]
        answer = f"{a(about[0].size)} {about[0].colour} {about[0].shape}" if about else "nothing"
    elif kind == "where is":
        alike = [t for t in things if (t.colour, t.shape) == (thing.colour, thing.shape)]
        if len(alike) > 1 and len([t for t in alike if t.size == thing.size]) > 1:
            return short_question(rng, scene, weights)  # nothing tells these two apart
        name = f"{thing.colour} {thing.shape}"
        names, about = (name if len(alike) == 1 else f"{thing.size} {name}",), [thing]
        answer = places(about)
    elif kind == "yes or no":
        colour, shape = thing.colour, thing.shape
        if rng.random() < 0.5:
            colour, shape = rng.choice(((rng.choice(list(COLOURS)), shape), (colour, rng.choice(SHAPES))))
        names, about = (a(colour), shape), [t for t in things if (t.colour, t.shape) == (colour, shape)]
        answer = "yes" if about else "no"
    else:
        counts = {shape: sum(t.shape == shape for t in things) for shape in SHAPES}
        seen = sorted({t.shape for t in things})
        pair = rng.sample(seen if len(seen) > 1 and rng.random() < 0.5 else SHAPES, 2)
        if counts[pair[0]] < counts[pair[1]] and rng.random() < 0.5:  # else "no" would nearly always be right
            pair.reverse()
        names, about = tuple(map(plural, pair)), [t for t in things if t.shape in pair]
        answer = "yes" if counts[pair[0]] > counts[pair[1]] else "no"
    text = rng.choice(WORDINGS[kind]).format(*names)
    return Question(kind, text, f"{answer}.", (tuple(t.cell for t in about),))


def description(rng: random.Random, scene: Scene) -> Question:
    """The long question and its answer."""
    cells = tuple(thing.cell for thing in scene.things)
    return Question("describe", rng.choice(DESCRIBE), describe(scene), (cells, *((cell,) for cell in cells)))
