"""Scores a checkpoint on held-out scenes: `python -m train.evaluate --model minillava/tiny`.

Descriptions: an object counts as right when it is named with its size, colour, shape and place. Questions: the
answer must match word for word. `commonest` is what always giving the commonest answer would score; the model card has
both. Training never uses these scenes, and no decision about it did.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict

from minillava import TINY
from minillava.command import run_command
from minillava.model import Llava
from minillava.processor import Processor
from minillava.scenes import DESCRIBE, Question, Scene, draw, make_scene, named, short_question
from weights import load

BATCH = 20


def held_out(name: str, index: int) -> tuple[random.Random, Scene]:
    """A scene that training has not seen (its seeds begin with a number), and the generator to ask about it with."""
    rng = random.Random(f"exam {name} {index}")
    return rng, make_scene(rng)


def answers(model: Llava, processor: Processor, asked: list[tuple[Scene, str]], new_tokens: int) -> list[str]:
    """Greedy answers to (scene, question) pairs, in batches."""
    texts: list[str] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        prompts = [processor.chat([(question, None)], 1) for _, question in part]
        inputs = processor(prompts, [draw(scene)[0] for scene, _ in part])
        inputs = {name: tensor.to(model.lm_head.weight.device) for name, tensor in inputs.items()}
        texts += processor.decode(model.generate(**inputs, max_new_tokens=new_tokens).token_ids)
    return [text.strip() for text in texts]


def exam(questions: int) -> list[tuple[Scene, Question]]:
    """Held-out scenes, with a short question about each."""
    drawn = [held_out("question", index) for index in range(questions)]
    return [(scene, short_question(rng, scene)) for rng, scene in drawn]


def evaluate(model: Llava, processor: Processor, descriptions: int = 200, questions: int = 1600) -> dict[str, float]:
    """Shares between 0 and 1: objects found, objects named that exist, and right answers by kind of question."""
    drawn = [held_out("description", index) for index in range(descriptions)]
    asked = [(scene, rng.choice(DESCRIBE)) for rng, scene in drawn]
    found = total = said = 0
    for (scene, _), text in zip(asked, answers(model, processor, asked, 160)):
        true, told = {(t.size, t.colour, t.shape, t.place) for t in scene.things}, named(text)
        found += len(true & {*told})
        total, said = total + len(true), said + len(told)
    scores = {"objects found": found / total, "objects named that exist": found / max(said, 1)}
    short = exam(questions)
    texts = answers(model, processor, [(scene, question.text) for scene, question in short], 16)
    right: dict[str, list[bool]] = defaultdict(list)
    for (_, question), text in zip(short, texts):
        right[question.kind].append(text == question.answer)
    scores["questions right"] = sum(map(sum, right.values())) / questions
    return scores | {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}


def commonest(questions: int = 1600) -> dict[str, float]:
    """What always giving the commonest answer of its kind would score, by kind and over all questions."""
    told: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in exam(questions):
        told[question.kind][question.answer] += 1
    scores = {kind: max(answers.values()) / answers.total() for kind, answers in told.items()}
    scores["questions right"] = sum(max(answers.values()) for answers in told.values()) / questions
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--descriptions", type=int, default=200)
    parser.add_argument("--questions", type=int, default=1600)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, processor = load(args.model, device=args.device, fast=True)
    scores = evaluate(model, processor, args.descriptions, args.questions)
    print(json.dumps({name: round(score, 4) for name, score in scores.items()}, indent=2))


if __name__ == "__main__":
    sys.exit(run_command("train.evaluate", main))
