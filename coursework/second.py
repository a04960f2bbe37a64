"""Several questions about one picture, which is read once, for the exercise `second`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image

from minillava.model import Compressor, Llava
from minillava.processor import Processor


def answers(model: Llava, processor: Processor, image: Image, questions: Sequence[str],
            compressor: Compressor | None = None, room: int = 160) -> list[str]:  # fmt: skip
    """The answer to each question about a picture, without blanks around it.

    The picture and the first question are one prompt; it is read once, with `compressor`, and answered. Each further
    question continues that conversation of one question and one answer, in a fork of its cache, so no question knows
    of the others after the first. Only ids that no cache has read are read. An answer has at most `room` tokens; in
    that room, the model ends the first one by itself. `processor.chat` writes prompts, and `model.decode` yields ids.
    """
    prompt = processor(processor.chat([(questions[0], None)], num_images=1), images=[image])
    cache = model.new_cache(room, compressor)
    logits = model.read(**prompt, cache=cache)
    ids = [int(token) for token in model.decode(logits, cache)]
    first = processor.decode(ids).strip()
    found, read = [first], prompt["input_ids"].shape[1] + len(ids) - 1  # `decode` does not read its last token
    for question in questions[1:]:
        talk = processor.chat([(questions[0], first), (question, None)], num_images=1)
        turn = processor(talk, images=[image])["input_ids"][:, read:]  # [1, N]
        other = cache.fork()
        other.reserve(max(0, turn.shape[1] + room - other.room))
        found.append(processor.decode([int(token) for token in model.decode(model.read(turn, other), other)]).strip())
    return found
