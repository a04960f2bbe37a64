"""Trains the embedded checkpoint `minillava/tiny` from nothing: `python -m train.train_tiny`.

Three kinds of stages. The first takes the place of the pretrained CLIP that LLaVA begins with:
1. vision: the vision tower learns to say, patch by patch, what covers it (colour, shape, size, place, outline,
   background, the patch's own row and column, and whether an object's middle lies in it), through linear heads
   that are thrown away afterwards;
2. language: projector and decoder learn conversations about scenes of which two thirds have at most three objects, the
   vision tower frozen, and one attention head of the decoder is shown where to look (`pointing_loss`);
3. joint: everything together; patch labels and pointing are still trained. The learning rate falls to zero, as it does
   at the end of vision stages.

The table STAGES says what is done in which order. Most is learnt from small pictures, which cost little; then the
pictures grow, and the tower's position embeddings with them. The last three stages also draw objects down to 2 x 2
patches: one stage three times over, in which the rate rises and falls again, until questions are answered as before.

Many questions are asked of one picture at once. Short conversations of one to three turns lie side by side after
the image tokens; each sees the image and itself, at the positions it would have by itself. So one reading of the image
serves a dozen questions, and no answer can be copied from another conversation.

The state of training is saved to `--work` every two minutes, and the same command resumes it. `--start FOLDER --first
STAGE` goes on from an exported checkpoint; the heads are trained anew.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minillava import scenes
from minillava.checks import LlavaError
from minillava.command import run_command
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.convert import convert
from minillava.files import replacing, write_json
from minillava.model import DecoderLayer, Llava, merge_heads
from minillava.processor import IMAGE_TOKEN, ImageProcessor, Processor, Tokenizer
from train.evaluate import commonest, evaluate
from weights import load, load_model


@dataclass(frozen=True)
class Stage:
    """One row of STAGES."""

    name: str  # names the file of its state, and seeds its scenes
    kind: str  # vision, language or joint
    side: int  # of the picture, in pixels
    steps: int
    batch: int  # scenes a step
    rate: float  # the peak of the learning rate
    smallest: float = scenes.SIZES["small"][0]  # radius of the smallest objects

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.side // PATCH


STAGES = (
    Stage("vision", "vision", side=96, steps=1500, batch=32, rate=2e-3),
    Stage("language", "language", side=96, steps=1345, batch=16, rate=1.5e-3),
    Stage("joint", "joint", side=96, steps=1000, batch=16, rate=5e-4),
    Stage("vision-192", "vision", side=192, steps=200, batch=32, rate=1e-3),
    Stage("joint-192", "joint", side=192, steps=950, batch=12, rate=5e-4),
    Stage("joint-small", "joint", side=192, steps=300, batch=12, rate=3e-4, smallest=scenes.SMALLEST),
    Stage("joint-small-2", "joint", side=192, steps=400, batch=12, rate=3e-4, smallest=scenes.SMALLEST),
    Stage("joint-small-3", "joint", side=192, steps=300, batch=12, rate=3e-4, smallest=scenes.SMALLEST),
)
FALL_FROM = {"vision": 0.6, "language": 1.0, "joint": 0.0}  # after this share of a stage its learning rate falls
PATCH = 8
LABELS = {  # what a patch is asked, and how many answers there are: + 1 for "no object"
    "colour": len(scenes.COLOURS) + 1,
    "shape": len(scenes.SHAPES) + 1,
    "size": len(scenes.SIZES) + 1,
    "place": len(scenes.PLACES) + 1,
    "outline": 2,  # is there more than one thing in the patch
    "background": len(scenes.BACKGROUNDS),
    "row": 0,  # as many as the grid has, see `make_heads`
    "column": 0,
    "centre": 2,  # does an object's middle lie in it: one patch an object, which is what counting needs
}
WEIGHTS = (0.5, 1.0, 1.0, 1.0, 2.0, 1.5, 1.5, 1.0)  # how often each of scenes.KINDS is asked
POINTER = 4  # the decoder layer, counted from 0, of which one head is shown where to look


def train_tokenizer(path: Path, seed: int) -> None:
    """Writes a byte-fallback sentencepiece model of Llama's kind, trained on the instructions and answers."""
    rng = random.Random(seed)
    lines = []
    for _ in range(4000):
        scene = scenes.make_scene(rng)
        turns = [scenes.description(rng, scene), *(scenes.short_question(rng, scene) for _ in range(5))]
        lines += [f"USER: {turn.text} ASSISTANT: {turn.answer}" for turn in turns]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=512, hard_vocab_limit=False,
        byte_fallback=True, character_coverage=1.0, split_digits=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def image_processor(side: int) -> ImageProcessor:
    """The processor of a checkpoint for pictures of side x side pixels."""
    return ImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def patch_labels(scene: scenes.Scene, cover: Image.Image, grid: int) -> Tensor:
    """The answers to LABELS for every patch: [grid², 9]. An object counts where it covers a sixth of the patch."""
    small = cover.resize((grid * PATCH, grid * PATCH), Image.Resampling.NEAREST)
    ids = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(grid, PATCH, grid, PATCH)
    ids = ids.permute(0, 2, 1, 3).reshape(grid * grid, PATCH * PATCH).long()  # [P, pixels of a patch]
    shares = F.one_hot(ids, scenes.MAX_OBJECTS + 1).float().mean(1)  # [P, objects + 1]
    best = shares[:, 1:].max(-1)
    owner = torch.where(best.values >= 1 / 6, best.indices + 1, 0)
    colours, sizes = list(scenes.COLOURS), list(scenes.SIZES)
    things = [
        (colours.index(t.colour), scenes.SHAPES.index(t.shape), sizes.index(t.size), t.cell) for t in scene.things
    ]
    cells = torch.arange(grid * grid)
    rest = [
        (shares.max(-1).values < 0.999).long(),
        torch.full_like(cells, list(scenes.BACKGROUNDS).index(scene.background)),
        cells // grid,
        cells % grid,
        torch.isin(cells, torch.tensor([int(t.y * grid) * grid + int(t.x * grid) for t in scene.things])).long(),
    ]
    return torch.cat([torch.tensor([(-1, -1, -1, -1), *things])[owner] + 1, torch.stack(rest, -1)], -1)


class Token(NamedTuple):
    """A token of conversations about one picture, side by side. What is not an answer's has the defaults."""

    id: int
    branch: int  # which conversation it belongs to; 0 for what stands before them, which all of them see
    position: int
    label: int = -100  # the token itself in an answer
    about: int = 0  # bit i is set if its sentence is about an object in PLACES[i]
    colour: int = -100  # the one colour that the question names, -100 for none or several
    shape: int = -100


class Conversations:
    """Turns conversations into tokens in LLaVA-1.5's format, with labels on the answers only."""

    def __init__(self, tokenizer: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        self.image_id = self.model.vocab_size()  # the tokens added after sentencepiece's own
        self.pad_id = self.image_id + 1
        self.size = math.ceil((self.pad_id + 1) / 64) * 64

    def encode(self, conversations: list[list[scenes.Question]], patches: int) -> list[Token]:
        """Conversations about one picture of so many patches."""
        prefix = [self.bos, *self.model.encode("USER: "), *[self.image_id] * patches]
        tokens = [Token(id, 0, position) for position, id in enumerate(prefix)]
        for branch, turns in enumerate(conversations, start=1):
            position = itertools.count(len(prefix))
            for index, turn in enumerate(turns):
                prompt = f"{'USER: ' if index else chr(10)}{turn.text} ASSISTANT:"
                asked, both = self.model.encode(prompt), self.model.encode(f"{prompt} {turn.answer}")
                assert both[: len(asked)] == asked
                tokens += [Token(id, branch, next(position)) for id in asked]
                colour, shape = (only_one(names, turn.text) for names in (scenes.COLOURS, SHAPE_NAMES))
                sentence = 0
                for id in [*both[len(asked) :], self.eos]:
                    about = sum(1 << cell for cells in turn.cells[sentence : sentence + 1] for cell in cells)
                    tokens.append(Token(id, branch, next(position), id, about, colour, shape))
                    sentence += "." in self.model.id_to_piece(id)
        return tokens


SHAPE_NAMES = [f"{shape} {scenes.plural(shape)}" for shape in scenes.SHAPES]


def only_one(names: Iterable[str], text: str) -> int:
    """The number of the one name that a text mentions, in one of its forms; -100 if it mentions none or several."""
    words = {*re.findall(r"\w+", text)}
    found = [number for number, forms in enumerate(names) if words & {*forms.split()}]
    return found[0] if len(found) == 1 else -100


@dataclass(frozen=True)
class Batches(torch.utils.data.Dataset):
    """A stage's batches; batch i follows only from (seed, stage, i), so a resumed run sees the same."""

    stage: Stage
    seed: int
    talk: Conversations

    def conversations(self, rng: random.Random, scene: scenes.Scene) -> list[list[scenes.Question]]:
        """Twelve short questions and at times a description, in conversations of one to three turns."""
        turns = [scenes.short_question(rng, scene, WEIGHTS) for _ in range(12)]
        if rng.random() < 0.4:
            turns.insert(rng.randint(0, 12), scenes.description(rng, scene))
        parts = []
        while turns:
            cut = rng.choice((1, 1, 2, 3))
            parts.append(turns[:cut])
            turns = turns[cut:]
        return parts

    def __getitem__(self, index: int) -> list[Tensor]:
        """Images [B, 3, R, R], targets [B, P, 9], and Tokens [B, N, 7], of which a vision stage has none."""
        stage, rng = self.stage, random.Random(f"{self.seed} {self.stage.name} {index}")
        images, targets, rows = [], [], []
        for _ in range(stage.batch):
            # Scenes of at most two or three objects make it easy to see what a question is about.
            most = rng.choice((2, 3, scenes.MAX_OBJECTS)) if stage.kind == "language" else scenes.MAX_OBJECTS
            scene = scenes.make_scene(rng, most, stage.smallest)
            image, cover = scenes.draw(scene)
            images.append(image_processor(stage.side)(image))
            targets.append(patch_labels(scene, cover, stage.grid))
            if stage.kind != "vision":
                rows.append(self.talk.encode(self.conversations(rng, scene), stage.grid**2))
        length = math.ceil(max(map(len, rows), default=0) / 32) * 32
        rows = [row + [Token(self.talk.pad_id, -1, 0)] * (length - len(row)) for row in rows]
        return [torch.stack(images), torch.stack(targets), torch.tensor(rows)]


def new_model(side: int, talk: Conversations) -> Llava:
    """The architecture of minillava/tiny for pictures of side x side pixels, with random weights.

    They are normal, of deviation fan_in^-1/2; half of that in layers that write to the residual stream.
    """
    vision = VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
                          image_size=side, patch_size=PATCH)  # fmt: skip
    text = TextConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
                      vocab_size=talk.size)  # fmt: skip
    model = Llava(LlavaConfig(vision=vision, text=text, image_token_id=talk.image_id, pad_token_id=talk.pad_id))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")) else 1
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=0.05 if "embed" in name and "patch" not in name else scale * fan_in**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


@torch.no_grad()
def widen(model: Llava, heads: nn.ModuleDict, stage: Stage, seed: int) -> None:
    """Makes model and heads fit the stage's side; heads for rows and columns, which have other answers, are new.

    The tower's position embeddings are interpolated, that of the class token aside. A patch keeps the place that it has
    in the picture, so that what the tower knows of places holds for the new grid.
    """
    vision = model.config.vision
    if vision.image_size == stage.side:
        return
    model.config = replace(model.config, vision=replace(vision, image_size=stage.side))
    table, old = model.vision_tower.position_embedding.weight, vision.image_size // PATCH  # [1 + P, Dv]
    square = table[1:].view(1, old, old, -1).permute(0, 3, 1, 2)  # [1, Dv, old, old]
    square = F.interpolate(square, size=(stage.grid,) * 2, mode="bicubic", align_corners=False)
    wide = torch.cat([table[:1], square.flatten(2)[0].T])  # [1 + grid², Dv]
    model.vision_tower.position_embedding = nn.Embedding.from_pretrained(wide.contiguous(), freeze=False)
    torch.manual_seed(seed)
    heads.update({name: nn.Linear(vision.hidden_size, stage.grid, device=wide.device) for name in ("row", "column")})


def make_heads(grid: int) -> nn.ModuleDict:
    """Linear readers: of a patch's features for each of LABELS, of the pointing head for colour and shape."""
    heads = nn.ModuleDict({name: nn.Linear(128, count or grid) for name, count in LABELS.items()})
    heads.update({f"pointer {name}": nn.Linear(32, LABELS[name] - 1) for name in ("colour", "shape")})
    return heads


def rate(step: int, steps: int, peak: float, fall_from: float) -> float:
    """Learning rate: a short rise, a plateau, and from `fall_from` of the way on a straight fall to zero."""
    rise = min(1.0, (step + 1) / min(200, steps / 5))
    fall = min(1.0, (1 - step / steps) / (1 - fall_from)) if fall_from < 1 else 1.0
    return peak * min(rise, max(fall, 0.0))


def look(model: Llava, images: Tensor) -> Tensor:
    """The patches' features [B, P, Dv] of images [B, 3, R, R]."""
    return model.vision_tower(images, model.config.vision_feature_layer)[:, 1:]


def project(layer: DecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands before a layer's attention: [B, N, D] -> query [B, H, N, Dh], key and value [B, Hkv, N, Dh]."""
    return layer.self_attn.project(layer.input_layernorm(hidden), (cos, sin))


def finish(layer: DecoderLayer, hidden: Tensor, context: Tensor) -> Tensor:
    """What comes after it: hidden [B, N, D] and the attention's context [B, H, N, Dh] -> [B, N, D]."""
    hidden = hidden + layer.self_attn.o_proj(merge_heads(context))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def decode(
    model: Llava,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor,
    before: Callable[..., Any] = project,
    after: Callable[..., Tensor] = finish,
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder over embeddings [B, N, D]: the words' outputs [B, M, D], and of POINTER query and key [B, N, Dh].

    The first N - M tokens end with the picture's: plainly causal, so that they need no mask. The mask [B, 1, M, N] is
    that of the words after them. Of the top layer, the picture's outputs are read by nobody. `before` and `after` are
    `project` and `finish`, or the same compiled: once for all layers and lengths.
    """
    layers, image = model.language_model.layers, hidden.shape[1] - mask.shape[2]
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    for index, layer in enumerate(layers):
        queries, keys, values = before(layer, hidden, *rope)
        context = attend(queries[:, :, image:], keys, values, attn_mask=mask)  # [B, H, M, Dh]
        if index + 1 == len(layers):
            hidden = hidden[:, image:]  # [B, M, D]
        else:
            first = attend(queries[:, :, :image], keys[:, :, :image], values[:, :, :image], is_causal=True)
            context = torch.cat([first, context], dim=2)  # [B, H, N, Dh]
        hidden = after(layer, hidden, context)
        if index == POINTER:
            query, key = queries[:, 0], keys[:, 0]
    return model.language_model.norm(hidden), query, key


def pointing_loss(query: Tensor, shown: Tensor, heads: nn.ModuleDict, tokens: Tensor, targets: Tensor) -> Tensor:
    """Shows one head of layer POINTER where to look for the next token of an answer.

    query [B, N, Dh] of all tokens, shown [B, P, Dh]: keys of the patches. Minus the log of the attention to the
    patches of what the sentence is about, as a share of that to all patches. And the same linear readers must find the
    colour and the shape that a question names in its query, and those that a patch shows in its key. Without them the
    head looks at all objects alike: what is asked is no help before keys can be told apart by it, nor the other way
    round.
    """
    *_, about, colour, shape = tokens.unbind(-1)  # [B, N] each
    row, at = about.nonzero(as_tuple=True)  # of T tokens; each is asked for by the token before it
    # One product for all tokens, of which some are then taken: gathering a picture's keys for each is far slower.
    weights = ((query @ shown.mT)[row, at - 1] * query.shape[-1] ** -0.5).log_softmax(-1)  # [T, P]
    place = targets[row][..., list(LABELS).index("place")]  # [T, P], 0 for none
    bits = about[row, at][:, None] << 1  # bit 0, of patches in no place, is never set
    wanted = ((bits >> place) & 1).bool()
    loss = -weights.masked_fill(~wanted, -torch.inf).logsumexp(-1)[wanted.any(-1)].mean()
    for name, asked in (("colour", colour), ("shape", shape)):
        reader, looks = heads[f"pointer {name}"], targets[..., list(LABELS).index(name)] - 1
        loss = loss + 0.5 * F.cross_entropy(reader(query[row, at - 1]), asked[row, at])
        loss = loss + 0.5 * F.cross_entropy(reader(shown).flatten(0, 1), looks.flatten(), ignore_index=-1)
    return loss


def answer_loss(
    model: Llava,
    heads: nn.ModuleDict,
    features: Tensor,
    tokens: Tensor,
    targets: Tensor,
    blocks: tuple[Callable[..., Any], Callable[..., Any]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch's answers, the share of answers of which each token is the likeliest, and the pointing loss.

    Every sample is new, so the share of right answers is that of greedy decoding on scenes never seen. An answer of
    n tokens weighs sqrt(n): with every token alike, the few of "yes." drown in the seventy of a description. The
    output layer is not run over questions and patches. `blocks` are the last two arguments of `decode`.
    """
    ids, branch, position, label, *_ = tokens.unbind(-1)  # [B, N] each
    prefix = int((branch[0] == 0).sum())  # tokens up to the picture's last, in every row; words follow
    image = (ids == model.config.image_token_id)[..., None]
    embeddings = model.language_model.embed_tokens(ids).masked_scatter(image, model.multi_modal_projector(features))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[prefix:]  # [M, N]
    mask = causal & ((branch[:, prefix:, None] == branch[:, None]) | (branch[:, None] == 0))  # [B, M, N]
    hidden, query, key = decode(model, embeddings, model.language_model.cos_sin(position), mask[:, None], *blocks)
    pointing = pointing_loss(query, key[:, prefix - features.shape[1] : prefix], heads, tokens, targets)
    label = label[:, prefix + 1 :]  # [B, M - 1]: the token after each word
    answered = label != -100
    logits, truth = model.lm_head(hidden[:, :-1][answered]), label[answered]  # [T, V], [T]
    begins = answered & ~answered.roll(1)  # in reading order; between two answers there is a question
    answer = begins.flatten().cumsum(0)[answered.flatten()] - 1  # [T]: its number in the batch
    weight = answer.bincount()[answer].float().rsqrt()
    loss = (F.cross_entropy(logits, truth, reduction="none") * weight).sum() / weight.sum()
    faults = answer.bincount((logits.argmax(-1) != truth).float())
    return loss, (faults == 0).float().mean(), pointing


def run_stage(stage: Stage, model: Llava, heads: nn.ModuleDict, talk: Conversations, args: argparse.Namespace) -> float:
    """Trains one stage to its end, from wherever its saved state stands; returns the processor's seconds in all."""
    path, steps = args.work / f"{stage.name}.pt", min(stage.steps, args.limit or stage.steps)
    labels_patches, answers_questions = stage.kind != "language", stage.kind != "vision"
    widen(model, heads, stage, args.seed)
    trained: dict[str, list[nn.Module]] = {
        "vision": [model.vision_tower, heads],
        "language": [model.multi_modal_projector, model.language_model, model.lm_head, heads],
        "joint": [model, heads],
    }
    parameters = [p for module in trained[stage.kind] for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.02)
    start, before, origin = 0, 0.0, f"seed {args.seed}, begun from {args.start or 'nothing'}"
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        if state["origin"] != origin:
            raise LlavaError(f"{path} is of {state['origin']}, and this is {origin}; choose another --work.")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        start, before = state["step"], state["seconds"]
        if start >= steps:
            return before
        optimizer.load_state_dict(state["optimizer"])
    compiled: Callable[..., Any] = torch.compile if args.compile else lambda part, dynamic: part
    see, blocks = compiled(look, dynamic=False), (compiled(project, dynamic=True), compiled(finish, dynamic=True))
    data = torch.utils.data.DataLoader(
        Batches(stage, args.seed, talk), batch_size=None, sampler=range(start, steps), num_workers=1, prefetch_factor=4
    )
    began, used, saved, mean = time.time(), time.process_time(), time.time(), 0.0
    for step, batch in enumerate(data, start):
        images, targets, tokens = (part.to(args.device) for part in batch)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, stage.rate, FALL_FROM[stage.kind])
        with torch.set_grad_enabled(labels_patches):
            features = see(model, images)
        loss = torch.zeros((), device=args.device)
        shares: dict[str, Tensor] = {}
        for name, label in zip(LABELS, targets.unbind(-1) if labels_patches else ()):
            logits = heads[name](features)
            part = F.cross_entropy(logits.flatten(0, 1), label.flatten())
            loss = loss + (0.2 * part if answers_questions else part)
            shares[name] = (logits.argmax(-1) == label).float().mean()
        if answers_questions:
            talked, shares["answers"], shares["pointing"] = answer_loss(model, heads, features, tokens, targets, blocks)
            loss = loss + talked + 0.2 * shares["pointing"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise LlavaError(f"The loss of stage {stage.name} became {value} at step {step}; lower its rate.")
        mean = value if step == start else 0.98 * mean + 0.02 * value
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            pace = (step + 1 - start) / (time.time() - began)
            line = f"{stage.name} {step + 1}/{steps} loss {mean:.4f}, {(steps - step - 1) / pace / 60:.0f} min left"
            print(line, *(f"{name} {share.item():.3f}" for name, share in shares.items()), flush=True)
        if time.time() - saved > 120 or last:
            saved = time.time()
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict(),
                     "step": step + 1, "seconds": before + time.process_time() - used, "origin": origin}  # fmt: skip
            with replacing(path) as temporary:
                torch.save(state, temporary)
    return before + time.process_time() - used


CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---

# minillava/tiny

A LLaVA of {parameters:,} parameters that describes scenes of coloured shapes: a CLIP vision tower
({v.image_size} x {v.image_size} pixels, patches of {v.patch_size}, {v.num_patches} image tokens), a two-layer
projector, and a Llama decoder of {t.num_hidden_layers} layers with grouped-query attention
({t.num_attention_heads} query heads, {t.kv_heads} key-value heads). It exists so that the
demo, the tests and the benchmarks of minillava run on trained weights without a download. It knows nothing but its
scenes: up to {objects} objects on a plain background, each in a cell of a 3 x 3 grid. It has only ever seen one
picture in a prompt.

Loads with `weights.load` and with `LlavaForConditionalGeneration.from_pretrained`.

## Training

    {command}

Scenes and conversations are drawn on the fly (`minillava/scenes.py`); no data set is needed. In a vision stage the
vision tower learns to label patches. In a language stage the decoder learns a dozen short questions about every scene,
and sometimes a description, with the tower frozen. In a joint stage all of it learns together. In the last two kinds,
one attention head of the decoder is shown which patches the answer is about. Where the pictures grow from one stage to
the next, the position embeddings of the tower are interpolated.

| stage | kind | picture | smallest object, patches wide | steps | scenes a step | peak of the rate |
|---|---|---|---|---|---|---|
{stages}

{time}

## Scores

`python -m train.evaluate` on 200 descriptions and 1,600 short questions about scenes that neither training nor any
decision about it used; greedy decoding, full cache. An object of a description is right if its size,
colour, shape and place are; an answer must match word for word. Beside it, what always giving the commonest answer to
these questions would score.

| | share right | commonest answer |
|---|---|---|
{scores}
"""


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, added: dict[int, str]) -> dict[str, object]:
    """The same tokenizer as `tokenizers` reads it, so that transformers need not convert the sentencepiece model."""
    score = {model.id_to_piece(i): model.get_score(i) for i in range(model.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(score)}
    cuts = [(piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    merges.sort(key=lambda pair: (-score["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos, space = model.id_to_piece(model.bos_id()), {"String": " "}
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": content, **flags} for i, content in sorted(added.items())],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": space, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def export(model: Llava, tokenizer: Path, talk: Conversations, folder: Path) -> None:
    """Writes the checkpoint in the layout of a Hub repository, weights in float16, and two files beside `tokenizer`."""
    config, work = model.config, tokenizer.parent
    added = {talk.image_id: IMAGE_TOKEN, talk.pad_id: "<pad>", 0: "<unk>", talk.bos: "<s>", talk.eos: "</s>"}
    write_json(work / "tokenizer.json", tokenizer_json(talk.model, added))
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in sorted(added.items())},
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "model_max_length": config.text.max_position_embeddings, "processor_class": "LlavaProcessor",
    }  # fmt: skip
    write_json(work / "tokenizer_config.json", settings)
    made = Tokenizer.from_folder(work, config.image_token_id)
    processor = Processor(made, image_processor(config.vision.image_size), config)
    with tempfile.TemporaryDirectory() as scratch:
        convert(model.half(), processor, work, Path(scratch, "made"))
        shutil.copytree(Path(scratch, "made"), folder, dirs_exist_ok=True)
    examples = folder / "examples"
    examples.mkdir(exist_ok=True)
    for index in range(1, 4):
        rng = random.Random(f"example {index}")
        scene = scenes.make_scene(rng)
        while len(scene.things) != 3 + index:
            scene = scenes.make_scene(rng)
        scenes.draw(scene, 384, oversample=4)[0].save(examples / f"scene_{index}.png", optimize=True)


def write_card(
    model: Llava,
    folder: Path,
    args: argparse.Namespace,
    stages: tuple[Stage, ...],
    scores: dict[str, float],
    seconds: float,
) -> None:
    """Writes the model card, with the scores as measured, and the processor's seconds that `stages` took."""
    processor, blind = f"{torch.get_num_threads()} threads of the {args.device}", commonest()
    which = "All stages" if stages[0] == STAGES[0] else f"The stages from {stages[0].name} on, in a run with `--start`,"
    rows = [
        f"| {s.name} | {s.kind} | {s.side} x {s.side} | {2 * s.smallest * s.grid:.1f} | {s.steps:,} | {s.batch} "
        f"| {s.rate:g} |"
        for s in STAGES[: STAGES.index(stages[-1]) + 1]
    ]
    marks = [
        f"| {name} | {100 * share:.1f} % | " + (f"{100 * blind[name]:.1f} % |" if name in blind else "|")
        for name, share in scores.items()
    ]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        v=model.config.vision,
        t=model.config.text,
        objects=scenes.MAX_OBJECTS,
        stages="\n".join(rows),
        scores="\n".join(marks),
        command=f"python -m train.train_tiny --until {stages[-1].name} --seed {args.seed}{' --compile' * args.compile}"
        + (f" --start FOLDER --first {stages[0].name}" if stages[0] != STAGES[0] else ""),
        time=f"{which} took {seconds / 60:.0f} minutes of processor time, on {processor}, without that of the "
        "process that draws the scenes.",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.train_tiny", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder for the state of training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (about a third faster)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--start", type=Path, help="folder of a checkpoint that the stages before --first have made")
    parser.add_argument("--first", choices=names, default=names[0], help="the first stage")
    parser.add_argument(
        "--until",
        choices=names,
        default=names[-1],
        help="the last stage (default: all); `joint` gives a checkpoint for 96 px",
    )
    parser.add_argument("--limit", type=int, help="at most so many steps a stage, to try it out")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/checkpoint"), help="folder for the checkpoint")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    stages = STAGES[names.index(args.first) : names.index(args.until) + 1]
    if not stages or (args.first != names[0]) != (args.start is not None):
        parser.error("--first and --start go together, and --until names no stage before --first")
    tokenizer = args.work / "tokenizer.model"
    if args.start:
        try:
            model = load_model(args.start).train()
            pieces = (args.start / "tokenizer.model").read_bytes()
        except (LlavaError, OSError) as error:
            parser.error(f"--start: {error}")
        side = model.config.vision.image_size
        if side > stages[0].side:
            parser.error(f"{args.start} is for {side} px, and the pictures of {stages[0].name} have {stages[0].side}")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.start:
        tokenizer.write_bytes(pieces)
    elif not tokenizer.exists():
        train_tokenizer(tokenizer, args.seed)
    talk = Conversations(tokenizer)
    if not args.start:
        model = new_model(STAGES[0].side, talk)
    heads = make_heads(model.config.vision.image_size // PATCH)
    model.to(args.device), heads.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {talk.size}", flush=True)
    seconds = sum(run_stage(stage, model, heads, talk, args) for stage in stages)
    export(model, tokenizer, talk, args.out)
    loaded, processor = load(args.out, device=args.device, fast=True)
    scores = evaluate(loaded, processor)
    write_card(model, args.out, args, stages, scores, seconds)
    print(f"{args.out}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in scores.items()))


if __name__ == "__main__":
    sys.exit(run_command("train.train_tiny", main))
