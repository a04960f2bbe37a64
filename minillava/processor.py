"""What goes into the model: a PIL image becomes pixels, a prompt becomes token ids, and ids become text again.

Pixels agree with `transformers`' PIL image processors (CLIP, SigLIP, LLaVA and LLaVA-NeXT), token ids and text with
its fast tokenizers, whether a checkpoint has a `tokenizer.model` or, as those of Llama 3 and Qwen2, a `tokenizer.json`.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minillava import anyres
from minillava.checks import LlavaError, require
from minillava.config import LlavaConfig
from minillava.template import render

IMAGE_TOKEN = "<image>"
SIGLIP = dict(size=dict(height=224, width=224), do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
MAX_BYTES = 100_000_000  # the largest tokenizer.json in use has a third of that
MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb
FOREIGN = "the files belong to different checkpoints."


# ---------------------------------------------------------------- images


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file, decoded whole; raises LlavaError for a file that holds none, or far too large a one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own limit lies a little lower
            image = Image.open(path)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
    except FileNotFoundError:
        raise LlavaError(f"There is no image at {path}; check the path.") from None
    except Image.DecompressionBombError:
        raise LlavaError(f"{path} has more than {MAX_PIXELS // 10**6} million pixels. Make it smaller first.") from None
    except Exception as error:  # Pillow's decoders raise whatever their format's code does
        raise LlavaError(f"{path} is not an image that can be read ({error}); expected a whole PNG or JPEG.") from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it, in RGB: turned as its EXIF data says, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # to 8 bits; Pillow's own conversion would clip 16
        scale = 1 / 257 if image.mode != "F" else 1.0
        image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def require_room(image: Image.Image, pixels: int) -> None:
    """Refuses a picture so long and thin that it has too many pixels once it is padded or resized."""
    if pixels > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise LlavaError(f"An image of {size} is too long and thin: {pixels} pixels once it is resized. Crop it first.")


def size_of(value: Any) -> tuple[Any, ...]:
    """(height, width), or (the shortest edge,), from any spelling in use in preprocessor configs."""
    if not isinstance(value, dict):
        return (value,)
    return (value["shortest_edge"],) if value.get("shortest_edge") else (value.get("height"), value.get("width"))


def is_number(value: object) -> bool:
    """Whether a config's value is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, rescale, normalise; the names and defaults of `LlavaImageProcessor`."""

    size: Any = 224
    crop_size: Any = 224
    do_pad: bool = False  # pad to a square with the mean colour first, as LLaVA-1.5 was trained
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ImageProcessor:
        """From a `preprocessor_config.json`, or the `image_processor` part of a `processor_config.json`."""
        kind = str(raw.get("image_processor_type", ""))
        if kind.startswith("Siglip"):  # files leave its own defaults out
            raw = {**SIGLIP, **{name: value for name, value in raw.items() if value is not None}}
        if kind.startswith("LlavaNext"):  # its do_pad gives every picture of a batch as many tiles
            raw = {**raw, "do_pad": False}
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("do_"):
                fits, expected = isinstance(value, bool), "true or false"
            elif name.endswith("size"):
                fits = all(type(side) is int and 0 < side <= 16384 for side in size_of(value))
                expected = "pixels, from 1 to 16384"
            elif name == "resample":
                fits, expected = value in list(Image.Resampling), "0 to 5"
            elif name == "rescale_factor":
                fits, expected = is_number(value), "a number"
            else:
                fits = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_number, value))
                expected = "three numbers"
            require(fits, f"The image processor's config has {name} = {value!r:.99}; expected {expected}.")
        require(all(self.image_std), "The image processor's config has a 0 in image_std; pixels are divided by it.")

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> float32 [3, R, R]."""
        image = to_rgb(image)  # whatever a config's do_convert_rgb says: the model takes nothing else
        if self.do_pad and image.width != image.height:
            side = max(image.size)
            require_room(image, side * side)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.image_mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.do_resize:
            size = size_of(self.size)
            if len(size) == 1:  # the shortest edge; the other one in proportion
                size = tuple(int(size[0] * side / min(image.size)) for side in (image.height, image.width))
            height, width = size
            require_room(image, height * width)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.do_center_crop:
            height, width = size_of(self.crop_size)[0], size_of(self.crop_size)[-1]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where the image is smaller
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = raw.view(image.height, image.width, 3).permute(2, 0, 1)  # [3, R, R]
        # Rounded as in transformers: rescaled in float64, normalised in float32.
        values = (pixels.double() * self.rescale_factor).float() if self.do_rescale else pixels.float()
        if self.do_normalize:
            mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.image_mean, self.image_std))
            values = (values - mean) / std
        return values


# ---------------------------------------------------------------- text


@contextlib.contextmanager
def as_llava_error(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside, as LlavaError in one line; `tokenizers` has panics that are not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, LlavaError):
        raise
    except BaseException as error:
        raise LlavaError(f"{what} ({' '.join(str(error).split()):.200}); {remedy}") from None


def read_bytes(path: Path) -> bytes:
    """What a checkpoint says beside its weights; refused if it is larger than any such file."""
    size = path.stat().st_size
    require(size <= MAX_BYTES, f"{path} has {size} bytes; at most {MAX_BYTES} are expected. Copy it again.")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file; raises LlavaError if it holds anything else."""
    if not path.is_file():
        return {}
    with as_llava_error(f"{path} is not valid JSON", "copy or download it again."):
        value = json.loads(read_bytes(path).decode())
    require(isinstance(value, dict), f"{path} holds {type(value).__name__} where a JSON object is expected.")
    return value


@dataclass(frozen=True)
class AddedToken:
    """A token outside the sentencepiece model, or one of its control tokens, found in the text as it stands."""

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


def read_added_tokens(folder: Path) -> dict[str, AddedToken]:
    """Added tokens by their text, from every file that may name them. Later files know more: how one is matched."""
    entries = [{"content": content, "id": id} for content, id in read_json(folder / "added_tokens.json").items()]
    found: dict[str, AddedToken] = {}
    with as_llava_error(f"{folder}: its files hold an added token that makes no sense", "download them again."):
        entries += read_json(folder / "tokenizer.json").get("added_tokens") or []
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        entries += [{**entry, "id": int(id)} for id, entry in decoder.items()]
        for entry in entries:
            flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "special") if name in entry}
            token = AddedToken(entry["content"], entry["id"], **flags)
            if not isinstance(token.content, str) or not token.content or type(token.id) is not int or token.id < 0:
                raise ValueError(f"{token.content!r} with id {token.id!r}")
            found[token.content] = token
    return found


class SentencePiece:
    """A `tokenizer.model`, read by sentencepiece; what stands between added tokens is encoded as a text of its own."""

    def __init__(self, path: Path, added: dict[str, AddedToken], add_bos: bool = True):
        model = sentencepiece.SentencePieceProcessor()
        with as_llava_error(f"{path} is not a sentencepiece model", "copy or download it again."):
            model.LoadFromSerializedProto(read_bytes(path))
            # The byte of a space is a space, which at the beginning of a text is left out, as in transformers.
            vocab = {id: str(model.id_to_piece(id)).replace("<0x20>", "▁") for id in range(model.vocab_size())}
        control = [id for id in (model.unk_id(), model.bos_id(), model.eos_id()) if id >= 0]
        added = {**{vocab[id]: AddedToken(vocab[id], id) for id in control}, **added}
        self.model, self.start = model, [model.bos_id()] if add_bos and model.bos_id() >= 0 else []
        self.vocab = {**vocab, **{token.id: token.content for token in added.values()}}
        self.added = sorted(added.values(), key=lambda token: -len(token.content))  # the longest is found first
        space = r"\s*"
        groups = [f"({space * t.lstrip}{re.escape(t.content)}{space * t.rstrip})" for t in self.added]
        self.pattern = re.compile("|".join(groups))

    def encode(self, text: str) -> list[int]:
        """Token ids of the text."""
        ids, end = list(self.start), 0
        for match in self.pattern.finditer(text):
            ids += [*self.model.encode(text[end : match.start()]), self.added[(match.lastindex or 0) - 1].id]
            end = match.end()
        return ids + list(self.model.encode(text[end:]))

    def decode(self, ids: list[int]) -> str:
        """Text of ids of the vocabulary. A piece that the model does not have is written out as it is."""
        return str(self.model.decode([self.vocab[id] for id in ids]))


class TokenizerJson:
    """A `tokenizer.json`, such as byte-level BPE, read by the `tokenizers` library, which finds added tokens itself."""

    def __init__(self, path: Path, added: dict[str, AddedToken]):
        try:
            import tokenizers
        except ImportError:
            raise LlavaError(f"{path} needs tokenizers: pip install -c constraints.txt -e '.[hub]'") from None
        with as_llava_error(f"{path} is not a tokenizer that can be used", "download it again."):
            self.model: Any = tokenizers.Tokenizer.from_str(read_bytes(path).decode())
            self.model.no_truncation()  # a file keeps these settings of the one who saved it
            self.model.no_padding()
            known = {token.content for token in self.model.get_added_tokens_decoder().values()}
            for token in sorted(added.values(), key=lambda token: token.id):
                if token.content not in known:
                    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "special": token.special}
                    self.model.add_tokens([tokenizers.AddedToken(token.content, normalized=False, **flags)])
                    id = self.model.token_to_id(token.content)
                    if id != token.id:
                        raise LlavaError(f"{path} gives {token.content} the id {id}, others {token.id}; {FOREIGN}")
            found = self.model.get_added_tokens_decoder().items()
            self.added = [AddedToken(t.content, id, t.lstrip, t.rstrip, t.special) for id, t in found]
            self.vocab = {id: self.decode([id]).replace(" ", "▁") for id in self.model.get_vocab().values()}
            self.vocab |= {token.id: token.content for token in self.added}

    def encode(self, text: str) -> list[int]:
        """Token ids of the text."""
        return list(self.model.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids of the vocabulary."""
        return str(self.model.decode(ids, skip_special_tokens=False))


class Tokenizer:
    """Text to token ids and back, by the library that reads the checkpoint's file."""

    def __init__(self, library: SentencePiece | TokenizerJson):
        self.library, self.model = library, library.model
        self.added = {token.content: token for token in library.added}
        self.special_ids = {token.id for token in library.added if token.special}
        self.largest_id = max(library.vocab, default=-1)

    @classmethod
    def from_folder(cls, folder: Path, image_token_id: int) -> Tokenizer:
        """From `tokenizer.model`, else `tokenizer.json`, and the added tokens that the files beside it name."""
        added = read_added_tokens(folder)
        added.setdefault(IMAGE_TOKEN, AddedToken(IMAGE_TOKEN, image_token_id))
        if (folder / "tokenizer.model").is_file():
            add_bos = read_json(folder / "tokenizer_config.json").get("add_bos_token") is not False
            return cls(SentencePiece(folder / "tokenizer.model", added, add_bos))
        if (folder / "tokenizer.json").is_file():
            return cls(TokenizerJson(folder / "tokenizer.json", added))
        raise LlavaError(f"{folder} has neither tokenizer.model nor tokenizer.json; expected one of them.")

    def piece(self, id: int) -> str:
        """A token as it is shown; a leading space is ▁. Empty for an id that the vocabulary does not have."""
        return self.library.vocab.get(id, "")

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with BOS in front where the checkpoint's files say so."""
        with as_llava_error("The text cannot be made into tokens", "type it anew, as UTF-8 text."):
            text.encode()  # says more clearly than the libraries where bytes are not text
            return self.library.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens and ids that the vocabulary does not have, such as its padding.

        In sentencepiece, a byte that is no part of UTF-8 text becomes �. In `tokenizers` all bytes beside it do, too.
        """
        return self.library.decode([id for id in ids if id in self.library.vocab and id not in self.special_ids])


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """A checkpoint's chat template, None if it has none, and its special tokens by name, such as bos_token."""
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    with as_llava_error(f"{path} is not UTF-8 text", "download it again."):
        template: Any = read_bytes(path).decode() if path.is_file() else ""
    template = template or read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, each with its name; as in transformers, only a prompt asked for fails
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", "{{ raise_exception('there are several, and none has the name default') }}")
    if template is not None and not isinstance(template, str):
        raise LlavaError(f"{folder}: its chat template is {type(template).__name__}; expected text.")
    special: dict[str, str] = {}
    for name, token in [*read_json(folder / "special_tokens_map.json").items(), *config.items()]:
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    return template, special


def messages(turns: Sequence[tuple[str, str | None]], num_images: int, as_parts: bool) -> list[dict[str, Any]]:
    """A conversation as chat templates take it, its images first; each content a list of parts, or text."""
    made: list[dict[str, Any]] = []
    for turn in turns:
        for role, text in zip(("user", "assistant"), turn):
            if text is not None:
                images = 0 if made else num_images
                parts = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
                made.append({"role": role, "content": parts if as_parts else f"{IMAGE_TOKEN}\n" * images + text})
    return made


def llava_prompt(turns: Sequence[tuple[str, str | None]], num_images: int = 0) -> str:
    """LLaVA-1.5's prompt for a conversation of (question, answer) turns; the last answer may be None.

    The images come first: `USER: <image>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:`.
    """
    return "".join(
        f"USER: {message['content']} ASSISTANT:" if message["role"] == "user" else f" {message['content']}</s>"
        for message in messages(turns, num_images, as_parts=False)
    )


@dataclass(eq=False)
class Processor:
    """Makes the model's inputs: `processor("USER: <image>\\nWhat is it? ASSISTANT:", images=[image])`."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    config: LlavaConfig
    template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, config: LlavaConfig) -> Processor:
        """From a checkpoint's folder; raises LlavaError where its parts do not fit together."""
        both = read_json(folder / "processor_config.json").get("image_processor") or {}
        if not isinstance(both, dict):
            raise LlavaError(f"{folder}: processor_config.json has an image_processor that is no object.")
        raw = {**both, **read_json(folder / "preprocessor_config.json")}
        tokenizer = Tokenizer.from_folder(folder, config.image_token_id)
        id, largest, size = tokenizer.added[IMAGE_TOKEN].id, tokenizer.largest_id, config.text.vocab_size
        if id != config.image_token_id:
            raise LlavaError(f"{IMAGE_TOKEN} has the id {id}, in config.json {config.image_token_id}; {FOREIGN}")
        require(largest < size, f"The tokenizer has ids up to {largest}, the model a vocabulary of {size}; {FOREIGN}")
        pinpoints, known = raw.get("image_grid_pinpoints"), [list(pair) for pair in config.image_grid_pinpoints]
        if known and pinpoints not in (None, known):
            raise LlavaError(f"image_grid_pinpoints are {pinpoints!s:.99}, in config.json {known!s:.99}; {FOREIGN}")
        return cls(tokenizer, ImageProcessor.from_dict(raw), config, *read_template(folder))

    def __call__(self, text: str | Sequence[str], images: Image.Image | Sequence[Image.Image] = ()) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [B, N], and `pixel_values` [I, 3, R, R] if there are images.

        Every `<image>` becomes as many tokens as the image has patches; shorter prompts are padded on the left.
        Images are taken in the order in which the prompts name them. For LLaVA-NeXT, `pixel_values` are the tiles of
        all images, and `image_sizes` [I, 2] are heights and widths. Raises LlavaError if the counts differ.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = [images] if isinstance(images, Image.Image) else images
        require(texts, "No prompt was given; expected at least one.")
        named = sum(one.count(IMAGE_TOKEN) for one in texts)
        given = f"{named} {IMAGE_TOKEN} and {len(images)} images were given"
        require(named == len(images), f"The prompt has {given}; write {IMAGE_TOKEN} once for each image.")
        shown = [to_rgb(image) for image in images]
        counts = iter([self.num_image_tokens(image) for image in shown])  # of tokens, image by image
        rows = []
        for one in texts:
            row: list[int] = []
            for id in self.tokenizer.encode(one):
                row += [id] * (next(counts) if id == self.config.image_token_id else 1)
            rows.append(row)
        require(all(rows), "A prompt is empty and the tokenizer adds no beginning-of-text token; write a prompt.")
        longest, pad = max(map(len, rows)), self.config.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if images:
            tiles = [self.image_processor(tile) for image in shown for tile in self.tiles(image)]
            side = self.config.vision.image_size
            for _, height, width in (tile.shape for tile in tiles):
                fits = height == width == side
                require(fits, f"An image becomes {width} x {height} pixels, not {side} x {side}; {FOREIGN}")
            inputs["pixel_values"] = torch.stack(tiles)
            if self.config.image_grid_pinpoints:
                inputs["image_sizes"] = torch.tensor([[image.height, image.width] for image in shown])
        return inputs

    def decode(self, token_ids: Tensor | Sequence[int]) -> Any:
        """Text of token ids: a string for [N], a list of strings for [B, N]. Special tokens are left out."""
        ids: list[Any] = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        if ids and isinstance(ids[0], list):
            return [self.tokenizer.decode(row) for row in ids]
        return self.tokenizer.decode(ids)

    def num_image_tokens(self, image: Image.Image) -> int:
        """Decoder positions that a picture takes. Raises LlavaError if they are more than the model has."""
        if not self.config.image_grid_pinpoints:
            return self.config.num_image_tokens
        tokens, limit = self.config.tiling((image.height, image.width)).tokens, self.config.text.max_position_embeddings
        becomes = f"An image of {image.width} x {image.height} pixels becomes {tokens} tokens"
        require(tokens <= limit, f"{becomes}, and the model has {limit} positions; make the image smaller.")
        return tokens

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        """What the vision tower sees of a picture: itself, or LLaVA-NeXT's overview and tiles."""
        if not self.config.image_grid_pinpoints:
            return [image]
        size, side = size_of(self.image_processor.size), self.config.vision.image_size
        overview = (size[0], size[-1])
        return anyres.cut(image, self.config.image_grid_pinpoints, side, overview, self.image_processor.resample)

    def chat(self, turns: Sequence[tuple[str, str | None]], num_images: int = 0) -> str:
        """The prompt for a conversation of (question, answer) turns; the last answer may be None. Images come first.

        The checkpoint's own template writes it, without one `llava_prompt`. Raises LlavaError where the template fails.
        """
        if self.template is None:
            return llava_prompt(turns, num_images)
        said = "".join(question + (answer or "") for question, answer in turns)
        # Templates ask whether tools and documents are none, since transformers passes them.
        values: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens}
        values["add_generation_prompt"] = not turns or turns[-1][1] is None
        reasons = []
        # A template reads a message's content as a list of parts or, as those of language models do, as text. One that
        # reads text fails on a list, or prints it as Python does, with 'type': in it.
        for as_parts in (True, False):
            try:
                prompt = render(self.template, {**values, "messages": messages(turns, num_images, as_parts)})
            except ValueError as error:
                reasons.append(str(error))
                continue
            held = {IMAGE_TOKEN: num_images, "'type':": 0}  # how often, beside what is said
            counted = all(prompt.count(word) == count + said.count(word) for word, count in held.items())
            if counted and all(question.strip() in prompt for question, _ in turns):
                first = self.tokenizer.encode("")[:1]  # of every text: BOS, or nothing; not to stand there twice
                return prompt.removeprefix(self.tokenizer.piece(first[0])) if first else prompt
            reasons.append("it leaves out an image or a question")
        reason = "; with content as text: ".join(dict.fromkeys(reasons))
        raise LlavaError(f"The checkpoint's chat template cannot be used: {reason}. Write the whole prompt yourself.")
