"""What `bench.quality` asks of a model that sees pictures: generated scenes, or the entries of a file.

A sample knows how it is asked in each protocol, and what is right in an answer. `Text` in bench/real.py is one, too.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minillava.checks import LlavaError, require
from minillava.processor import Processor, llava_prompt, open_image
from minillava.scenes import DESCRIBE, NUMBERS, SIZES, Scene, describe, draw, make_scene, named, short_question

# Vicuna's instruction, which the published evaluation of LLaVA-1.5 puts before "USER:". For data files, not for scenes.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
# Of objects, in patches of the embedded model: halves of those that `--smaller` adds, then `scenes.SIZES`.
WIDTHS = ("2.0 to 2.4", "2.5 to 2.9", "3.0 to 3.6", "5.5 to 7.0")


def wide(radius: float) -> str:
    """Which of WIDTHS an object has. The corners of some shapes reach a tenth or a fifth further."""
    patches = 48 * radius  # twice the radius; the picture is 24 patches wide
    return WIDTHS[sum(patches >= edge for edge in (2.45, 2.97, 4))]


@dataclass(frozen=True)
class Sample:
    """A question with one `<image>`, its reference answer, how to get the picture, and the text before "USER:"."""

    question: str
    answer: str
    image: Callable[[], Image.Image]
    system: str = ""  # empty, or with a space at its end
    kind: str = "description"  # or that of a short question
    earlier: tuple[str, str] | None = None  # another question about the picture, and its answer
    scene: Scene | None = None

    def can_be(self, protocol: str) -> bool:
        """Whether it can be asked in this way."""
        return protocol != "second" or self.earlier is not None

    def prompt(self, processor: Processor, turns: Sequence[tuple[str, str | None]] = ()) -> str:
        """The published evaluation's: `system`, then the question in LLaVA-1.5's form, `<image>` where it stands.

        Or these turns, the image first. If the checkpoint's template writes anything but LLaVA-1.5's form, the prompt
        is the template's: no `system`, and the image before the question. Raises LlavaError for a template that fails.
        """
        asked = turns or [(self.question.replace("<image>", "").strip(), None)]
        own = processor.chat(asked, 1)
        if own != llava_prompt(asked, 1):
            return own
        return self.system + (own if turns else f"USER: {self.question} ASSISTANT:")

    def split(self, processor: Processor, protocol: str) -> tuple[dict[str, Tensor], int]:
        """The model's inputs for a whole prompt, and after how many of its ids the cache is cut."""
        images = [self.image()]
        question = self.question.replace("<image>", "").strip()
        if protocol != "second":  # for `first` the image stands first, whatever the data say
            turns = [(question, None)] if protocol == "first" else []
            inputs = processor(self.prompt(processor, turns), images)
            (ids,) = inputs["input_ids"]
            patches = (ids == processor.config.image_token_id).nonzero()
            return inputs, len(ids) if protocol == "known" else int(patches[-1]) + 1
        assert self.earlier is not None
        before = processor(self.prompt(processor, [(self.earlier[0], None)]), images)["input_ids"]
        inputs = processor(self.prompt(processor, [self.earlier, (question, None)]), images)
        same = torch.equal(inputs["input_ids"][:, : before.shape[1]], before)
        require(same, "The checkpoint's template rewrites history; leave out the protocol 'second'.")
        return inputs, before.shape[1]

    def answer_ids(self, processor: Processor) -> list[int]:
        """Token ids of the true answer, without the beginning-of-text token."""
        return processor.tokenizer.encode(self.answer)[len(processor.tokenizer.encode("")) :]

    def marks(self, text: str) -> dict[str, int]:
        """What is right in an answer: of a description the objects, of a short answer all of it."""
        if self.scene is None:
            return {}
        if self.kind != "description":
            return {"right": int(text == self.answer)}
        true, told = set(named(self.answer)), named(text)
        found = Counter(found=len(true & set(told)), true=len(true), told=len(told))
        for thing in self.scene.things:
            width = wide(thing.radius)
            found[f"found {width}"] += int((thing.size, thing.colour, thing.shape, thing.place) in told)
            found[f"true {width}"] += 1
        return found


def scenes(
    count: int, seed: int, split: str = "quality", short: bool = False, smallest: float = SIZES["small"][0]
) -> list[Sample]:
    """Scenes to be described, or asked about; training's seeds begin with a number, so it has seen none of them."""
    samples = []
    for index in range(count):
        rng = random.Random(f"{split} {seed} {index}")
        scene = make_scene(rng, smallest=smallest)
        if short:
            kind, question, answer, _ = short_question(rng, scene)
            other = short_question(rng, scene)
            while other.kind == kind:
                other = short_question(rng, scene)
            earlier = other.text, other.answer
        else:  # one earlier wording for all, so that the turns of a batch are equally long
            kind, question, answer = "description", DESCRIBE[0], describe(scene)
            earlier = "How many objects are there?", f"{NUMBERS[len(scene.things)]}."
        picture = lambda scene=scene: draw(scene)[0]  # noqa: E731
        samples.append(Sample(f"<image>\n{question}", answer, picture, "", kind, earlier, scene))
    return samples


def read_samples(path: Path, images: Path, count: int) -> tuple[list[Sample], list[str]]:
    """The first `count` entries of a file in a published format, and a sentence for each that cannot be used.

    LLaVA-Description: `conversations` (two turns, or four: then the second question is asked) and `image`. MM-Vet:
    `question`, `answer`, and `image` or `imagename`. A list, or an object whose values are the entries.
    """
    require(os.path.isfile(path), f"There is no file {path}; expected a JSON file of questions.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(raw, (list, dict)) or not raw:
        raise LlavaError(f"{path} holds no entries; expected a list of questions with their images and answers.")
    samples, bad = [], []
    for name, entry in list(raw.items() if isinstance(raw, dict) else enumerate(raw))[:count]:
        try:
            if "conversations" in entry:
                question, answer, *more = (turn["value"] for turn in entry["conversations"][:4])
            else:
                question, answer, *more = f"{entry['question']}\n<image>", entry["answer"]
            picture = images / (entry["image"] if "image" in entry else entry["imagename"])
            require(isinstance(answer, str) and answer.strip(), "the answer is empty")
            places = question.count("<image>")
            require(places == 1, f"the question has {places} <image>, expected one")
            open_image(picture)
            earlier = None
            if len(more) == 2:  # the second turn is asked; the first one is the earlier question
                (question, answer), earlier = more, (question.replace("<image>", "").strip(), answer)
                question = f"<image>\n{question}"
        except LlavaError as error:
            bad.append(f"{path}, entry {name}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(f"{path}, entry {name}: not in a published format ({type(error).__name__}: {error})")
        else:
            samples.append(Sample(question, answer, partial(open_image, picture), SYSTEM, earlier=earlier))
    return samples, bad
