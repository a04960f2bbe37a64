"""What goes into the model: a PIL image becomes pixels, a prompt becomes token ids, and ids become text again.

Pixels agree with `transformers`' PIL image processors (CLIP, SigLIP, LLaVA and LLaVA-NeXT), token ids with
sentencepiece's own encoding around added tokens, which is what LLaVA's `tokenizer.json` does. A checkpoint that has a
`tokenizer.json` and no `tokenizer.model`, as those of Llama 3 and Qwen2, is read by the `tokenizers` library.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minillava import anyres
from minillava.checks import LlavaError
from minillava.config import LlavaConfig
from minillava.template import TemplateError, render

IMAGE_TOKEN = "<image>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
MAX_BYTES = 100_000_000  # the largest tokenizer.json in use has a third of that
MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb


# ---------------------------------------------------------------- images


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file, decoded whole; raises LlavaError for a file that holds none, or far too large a one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            if image.width * image.height > MAX_PIXELS:
                raise LlavaError(
                    f"{path} is {image.width} x {image.height} pixels; at most {MAX_PIXELS // 10**6} million are read. "
                    "Make it smaller first."
                )
            image.load()
    except LlavaError:
        raise
    except FileNotFoundError:
        raise LlavaError(f"There is no image at {path}; check the path.") from None
    except Image.DecompressionBombError:
        raise LlavaError(
            f"{path} claims more than {MAX_PIXELS // 10**6} million pixels. Make it smaller first."
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever their format's code does
        raise LlavaError(
            f"{path} cannot be read as an image ({error}). Expected a whole PNG, JPEG or the like."
        ) from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it, in RGB: turned as its EXIF data says, on white where it is transparent.

    16-bit greyscale is brought to 8 bits; Pillow's own conversion would clip it.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        scale = 1 / 257 if image.mode != "F" else 1.0
        image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def require_room(image: Image.Image, pixels: int) -> None:
    """Refuses a picture so long and thin that it has too many pixels once it is padded or resized."""
    if pixels > MAX_PIXELS:
        raise LlavaError(
            f"An image of {image.width} x {image.height} pixels is too long and thin: it would become {pixels} pixels; "
            f"at most {MAX_PIXELS} are expected. Crop it first."
        )


def size_of(value: Any, name: str) -> tuple[int, int] | int:
    """(height, width), or the length of the shortest edge, from any spelling in use in preprocessor configs."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or (value.get("height"), value.get("width"))
    sides = value if isinstance(value, tuple) else (value,)
    if not all(type(side) is int and 0 < side <= 16384 for side in sides):
        raise LlavaError(f"The image processor's config has {name} = {value!r}; expected pixels, from 1 to 16384.")
    return value


def is_number(value: object) -> bool:
    """Whether a config's value is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, rescale, normalise; the names and defaults of `LlavaImageProcessor`.

    Every picture is converted to RGB first, whatever a config's `do_convert_rgb` says: the model takes nothing else.
    """

    size: Any = 224
    crop_size: Any = 224
    do_pad: bool = False  # pad to a square with the mean colour first, as LLaVA-1.5 was trained
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ImageProcessor:
        """From a `preprocessor_config.json`, or the `image_processor` part of a `processor_config.json`."""
        names, kind = cls.__dataclass_fields__, str(raw.get("image_processor_type", ""))
        if kind.startswith("Siglip"):  # files leave defaults out
            raw = {**SIGLIP, **{name: value for name, value in raw.items() if value is not None}}
        if kind.startswith(
            "LlavaNext"
        ):  # whose do_pad means something else: as many tiles for every picture of a batch
            raw = {**raw, "do_pad": False}
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        processor = cls(**values)
        size_of(processor.size, "size"), size_of(processor.crop_size, "crop_size")
        for name, value in vars(processor).items():
            if name.startswith("do_") and type(value) is not bool:
                raise LlavaError(f"The image processor's config has {name} = {value!r:.99}; expected true or false.")
        factor = processor.rescale_factor
        if not is_number(factor):
            raise LlavaError(f"The image processor's config has rescale_factor = {factor!r:.99}; expected a number.")
        for name in ("image_mean", "image_std"):
            value = getattr(processor, name)
            if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(is_number, value)):
                raise LlavaError(f"The image processor's config has {name} = {value!r:.99}; expected three numbers.")
        if not all(processor.image_std):
            raise LlavaError("The image processor's config has a 0 in image_std; pixels are divided by it.")
        if processor.resample not in list(Image.Resampling):
            raise LlavaError(f"The image processor's config has resample = {processor.resample!r}; expected 0 to 5.")
        return processor

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> float32 [3, R, R]."""
        image = to_rgb(image)
        if self.do_pad and image.width != image.height:
            side = max(image.size)
            require_room(image, side * side)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.image_mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.do_resize:
            size = size_of(self.size, "size")
            if isinstance(size, int):
                short, long = sorted(image.size)
                other = int(size * long / short)
                size = (other, size) if image.width == short else (size, other)
            height, width = size
            require_room(image, height * width)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.do_center_crop:
            crop = size_of(self.crop_size, "crop_size")
            height, width = (crop, crop) if isinstance(crop, int) else crop
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


@dataclass(frozen=True)
class AddedToken:
    """A token outside the sentencepiece model, or one of its control tokens, found in the text as it stands."""

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class Tokenizer:
    """Sentencepiece between added tokens.

    Every stretch of text between two added tokens is encoded by itself, with sentencepiece's own leading space.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, added: Sequence[AddedToken], add_bos: bool = True):
        self.model, self.add_bos = model, add_bos
        self.added = {token.content: token for token in added}
        self.special_ids = {token.id for token in added if token.special}
        self.by_id = {token.id: token for token in added}
        longest_first = sorted(added, key=lambda token: -len(token.content))
        alternatives = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in longest_first
        ]
        self.pattern = re.compile("(" + "|".join(alternatives) + ")") if alternatives else None

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From `tokenizer.model` and the JSON files beside it that name added tokens."""
        path = folder / "tokenizer.model"
        if not path.is_file():
            raise LlavaError(f"{folder} has neither tokenizer.model nor tokenizer.json; expected one of them.")
        model, content = sentencepiece.SentencePieceProcessor(), read_bytes(path)
        try:
            model.LoadFromSerializedProto(content)
            size = model.vocab_size()
            for id in range(size):
                model.id_to_piece(id)  # raises where a piece is no text
        except Exception:  # sentencepiece raises RuntimeError and others, with addresses of its own source
            raise LlavaError(f"{path} is not a sentencepiece model; copy or download it again.") from None
        if size <= 0:
            raise LlavaError(f"{path} holds no pieces; copy or download it again.")
        config = read_json(folder / "tokenizer_config.json")
        found: dict[str, AddedToken] = {}
        for id in (model.unk_id(), model.bos_id(), model.eos_id()):
            if id >= 0:
                found[model.id_to_piece(id)] = AddedToken(model.id_to_piece(id), id)
        # Later files know more: only tokenizer.json and tokenizer_config.json say how a token is matched.
        entries = [{"content": content, "id": id} for content, id in read_json(folder / "added_tokens.json").items()]
        try:
            entries += read_json(folder / "tokenizer.json").get("added_tokens") or []
            decoder = config.get("added_tokens_decoder") or {}
            entries += [{**entry, "id": int(id)} for id, entry in decoder.items()]
            for entry in entries:
                flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "special") if name in entry}
                token = AddedToken(entry["content"], entry["id"], **flags)
                if not isinstance(token.content, str) or not token.content or type(token.id) is not int or token.id < 0:
                    raise ValueError(f"{token.content!r} with id {token.id!r}")
                found[token.content] = token
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LlavaError(f"{folder}: its files hold an added token that makes no sense ({error}).") from None
        return cls(model, list(found.values()), add_bos=config.get("add_bos_token", True) is not False)

    @property
    def largest_id(self) -> int:
        """Of all tokens."""
        return max([self.model.vocab_size() - 1, *self.by_id])

    def piece(self, id: int) -> str:
        """A token as the vocabulary has it; a leading space is ▁. Empty for an id that it does not have."""
        if id in self.by_id:
            return self.by_id[id].content
        return str(self.model.id_to_piece(id)) if 0 <= id < self.model.vocab_size() else ""

    def with_token(self, token: AddedToken) -> Tokenizer:
        """The same tokenizer with one more token."""
        return Tokenizer(self.model, [*self.added.values(), token], self.add_bos)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with BOS in front."""
        ids = [self.model.bos_id()] if self.add_bos and self.model.bos_id() >= 0 else []
        for piece in self.pattern.split(text) if self.pattern else [text]:
            token = self.added.get(piece) or self.added.get(piece.strip())
            if token is not None:
                ids.append(token.id)
            elif piece:
                ids += self.model.encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; ids that the tokenizer does not know (padding of the vocabulary) are left out.

        A byte that is no part of UTF-8 text becomes �. In the tokenizers library all bytes beside it do, too.
        """
        pieces: list[str] = []
        run: list[int] = []
        for id in [*ids, -1]:
            if 0 <= id < self.model.vocab_size() and id not in self.by_id:
                run.append(id)
                continue
            if run:
                pieces.append(self.model.decode(run))
                run = []
            if id in self.by_id and not (skip_special_tokens and id in self.special_ids):
                pieces.append(self.by_id[id].content)
        return "".join(pieces)


def reason_of(error: BaseException) -> str:
    """What the `tokenizers` library says, in one line. It raises plain Exception, and panics that are not even that."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    return " ".join(str(error).split())[:200]


class JsonTokenizer:
    """What a `tokenizer.json` describes, such as byte-level BPE, run by the `tokenizers` library."""

    def __init__(self, model: Any):
        self.model = model
        found = model.get_added_tokens_decoder().items()
        self.by_id = {id: AddedToken(t.content, id, t.lstrip, t.rstrip, t.special) for id, t in found}
        self.added = {token.content: token for token in self.by_id.values()}

    @classmethod
    def from_folder(cls, folder: Path) -> JsonTokenizer:
        """From `tokenizer.json`, and the tokens that only `tokenizer_config.json` has."""
        path = folder / "tokenizer.json"
        try:
            import tokenizers
        except ImportError:
            raise LlavaError(
                f"{folder} has a tokenizer.json and no tokenizer.model. To read it, install the tokenizers library: "
                "pip install -c constraints.txt -e '.[hub]'"
            ) from None
        content = read_bytes(path)
        read_json(path)  # what is no JSON gets a sentence of its own
        try:
            model = tokenizers.Tokenizer.from_str(content.decode())
            model.no_truncation()  # a file keeps these settings of the one who saved it
            model.no_padding()
            made = cls(model)
            decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
            for id, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
                if entry["content"] not in made.added:
                    flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "special") if name in entry}
                    made = made.with_token(AddedToken(entry["content"], int(id), **flags))
        except LlavaError:
            raise
        except BaseException as error:
            reason = reason_of(error)
            raise LlavaError(f"{path} is no tokenizer that can be used ({reason}); download it again.") from None
        return made

    @property
    def largest_id(self) -> int:
        """Of all tokens."""
        return max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)

    def piece(self, id: int) -> str:
        """A token as text; a leading space is ▁. Empty for an id that the vocabulary does not have."""
        if id in self.by_id:
            return self.by_id[id].content
        return str(self.model.decode([id], skip_special_tokens=False)).replace(" ", "▁")

    def with_token(self, token: AddedToken) -> JsonTokenizer:
        """Adds a token to this tokenizer. Raises LlavaError if the next free id is not the token's."""
        import tokenizers

        options = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False, "special": token.special}
        self.model.add_tokens([tokenizers.AddedToken(token.content, **options)])
        if self.model.token_to_id(token.content) != token.id:
            raise LlavaError(
                f"The tokenizer has no {token.content}; added to it, it gets the id "
                f"{self.model.token_to_id(token.content)}, and the checkpoint says {token.id}."
            )
        return JsonTokenizer(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with BOS in front where the tokenizer's file says so."""
        try:
            return list(self.model.encode(text).ids)
        except BaseException as error:
            reason = reason_of(error)
            raise LlavaError(
                f"The text cannot be made into tokens ({reason}); look for characters that are no Unicode text."
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; ids that the tokenizer does not know (padding of the vocabulary) are left out."""
        return str(self.model.decode(list(ids), skip_special_tokens=skip_special_tokens))


def read_tokenizer(folder: Path) -> Tokenizer | JsonTokenizer:
    """The tokenizer of a checkpoint's folder: its `tokenizer.model`, else its `tokenizer.json`."""
    if not (folder / "tokenizer.model").is_file() and (folder / "tokenizer.json").is_file():
        return JsonTokenizer.from_folder(folder)
    return Tokenizer.from_folder(folder)


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """A checkpoint's chat template, None if it has none, and its special tokens by name, such as bos_token."""
    config = read_json(folder / "tokenizer_config.json")
    template: Any = None
    if (folder / "chat_template.jinja").is_file():
        try:
            template = read_bytes(folder / "chat_template.jinja").decode()
        except UnicodeDecodeError:
            raise LlavaError(f"{folder / 'chat_template.jinja'} is not UTF-8 text; download it again.") from None
    template = template or read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        entries = [entry for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        # As in transformers, only a prompt that is asked for fails.
        none = "{{ raise_exception('there are several, and none has the name default') }}"
        template = named.get("default", none)
    if template is not None and not isinstance(template, str):
        raise LlavaError(f"{folder}: its chat template is {type(template).__name__}; expected text.")
    special: dict[str, str] = {}
    for name, token in [*read_json(folder / "special_tokens_map.json").items(), *config.items()]:
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    return template, special


def read_bytes(path: Path) -> bytes:
    """What a checkpoint says beside its weights; refused if it is larger than any such file."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise LlavaError(f"{path} has {size} bytes; at most {MAX_BYTES} are expected. Copy or download it again.")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file; raises LlavaError if it holds anything else."""
    if not path.is_file():
        return {}
    content = read_bytes(path)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{path} is not valid JSON ({error}); copy or download it again.") from None
    if not isinstance(value, dict):
        raise LlavaError(f"{path} holds {type(value).__name__} where a JSON object is expected.")
    return value


# ---------------------------------------------------------------- both


def messages(turns: Sequence[tuple[str, str | None]], num_images: int, as_parts: bool) -> list[dict[str, Any]]:
    """A conversation as chat templates take it, its images first; each content a list of parts, or text."""
    made: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        images = num_images if index == 0 else 0
        parts = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        made.append({"role": "user", "content": parts if as_parts else f"{IMAGE_TOKEN}\n" * images + question})
        if answer is not None:
            made.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if as_parts else answer})
    return made


def llava_prompt(turns: Sequence[tuple[str, str | None]], num_images: int = 0) -> str:
    """LLaVA-1.5's prompt for a conversation of (question, answer) turns; the last answer may be None.

    The images come first: `USER: <image>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:`.
    """
    parts = []
    for index, (question, answer) in enumerate(turns):
        images = f"{IMAGE_TOKEN}\n" * num_images if index == 0 else ""
        parts.append(f"USER: {images}{question} ASSISTANT:" + ("" if answer is None else f" {answer}</s>"))
    return "".join(parts)


class Processor:
    """Makes the model's inputs: `processor("USER: <image>\\nWhat is it? ASSISTANT:", images=[image])`."""

    def __init__(
        self,
        tokenizer: Tokenizer | JsonTokenizer,
        image_processor: ImageProcessor,
        config: LlavaConfig,
        template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.template, self.special_tokens = template, special_tokens or {}

    @classmethod
    def from_folder(cls, folder: str | Path, config: LlavaConfig) -> Processor:
        """From a checkpoint's folder; raises LlavaError where its parts do not fit together."""
        folder = Path(folder)
        both = read_json(folder / "processor_config.json").get("image_processor") or {}
        if not isinstance(both, dict):
            raise LlavaError(f"{folder}: processor_config.json has an image_processor that is no object.")
        raw = {**both, **read_json(folder / "preprocessor_config.json")}
        tokenizer = read_tokenizer(folder)
        token = tokenizer.added.get(IMAGE_TOKEN)
        if token is None:
            tokenizer = tokenizer.with_token(AddedToken(IMAGE_TOKEN, config.image_token_id))
        elif token.id != config.image_token_id:
            raise LlavaError(
                f"The tokenizer gives {IMAGE_TOKEN} the id {token.id}, config.json {config.image_token_id}; "
                "the files belong to different checkpoints."
            )
        largest, size = tokenizer.largest_id, config.text.vocab_size
        if largest >= size:
            raise LlavaError(
                f"The tokenizer has ids up to {largest}, the model a vocabulary of {size}; "
                "the files belong to different checkpoints."
            )
        pinpoints = raw.get("image_grid_pinpoints")
        expected = [list(pair) for pair in config.image_grid_pinpoints]
        if expected and pinpoints is not None and pinpoints != expected:
            raise LlavaError(
                f"The image processor's config has image_grid_pinpoints = {pinpoints!s:.99}, config.json other ones; "
                "the files belong to different checkpoints."
            )
        return cls(tokenizer, ImageProcessor.from_dict(raw), config, *read_template(folder))

    def __call__(self, text: str | Sequence[str], images: Image.Image | Sequence[Image.Image] = ()) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [B, N], and `pixel_values` [I, 3, R, R] if there are images.

        Every `<image>` becomes as many tokens as the image has patches; shorter prompts are padded on the left.
        Images are taken in the order in which the prompts name them. For LLaVA-NeXT, `pixel_values` are the tiles of
        all images, and `image_sizes` [I, 2] are heights and widths. Raises LlavaError if the counts differ.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = [images] if isinstance(images, Image.Image) else images
        for one in texts:
            if any("\ud800" <= character <= "\udfff" for character in one):
                raise LlavaError("The prompt holds bytes that are not UTF-8 text; type it anew.")
        named = sum(t.count(IMAGE_TOKEN) for t in texts)
        if named != len(images):
            raise LlavaError(
                f"The prompt has {named} {IMAGE_TOKEN} and {len(images)} images were given; "
                f"write {IMAGE_TOKEN} once for each image."
            )
        if not texts:
            raise LlavaError("No prompt was given; expected at least one.")
        shown = [to_rgb(image) for image in images]
        counts = iter([self.num_image_tokens(image) for image in shown])  # of tokens, image by image
        rows = []
        for one in texts:
            row: list[int] = []
            for id in self.tokenizer.encode(one):
                row += [id] * (next(counts) if id == self.config.image_token_id else 1)
            rows.append(row)
        if not all(rows):
            raise LlavaError("A prompt is empty and the tokenizer adds no beginning-of-text token; write a prompt.")
        longest = max(len(row) for row in rows)
        pad = self.config.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if images:
            tiles = [tile for image in shown for tile in self.tiles(image)]
            inputs["pixel_values"] = torch.stack([self.image_processor(tile) for tile in tiles])
            if self.config.image_grid_pinpoints:
                inputs["image_sizes"] = torch.tensor([[image.height, image.width] for image in shown])
            side, expected = inputs["pixel_values"].shape[-2:], self.config.vision.image_size
            if side != (expected, expected):
                raise LlavaError(
                    f"The image processor makes {side[1]} x {side[0]} pixels, the vision tower expects "
                    f"{expected} x {expected}; the files belong to different checkpoints."
                )
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
        if tokens > limit:
            raise LlavaError(
                f"An image of {image.width} x {image.height} pixels becomes {tokens} tokens, and the model has "
                f"{limit} positions; make the image smaller."
            )
        return tokens

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        """What the vision tower sees of a picture: itself, or LLaVA-NeXT's overview and tiles."""
        if not self.config.image_grid_pinpoints:
            return [image]
        size = size_of(self.image_processor.size, "size")
        overview = (size, size) if isinstance(size, int) else size
        side = self.config.vision.image_size
        return anyres.cut(image, self.config.image_grid_pinpoints, side, overview, self.image_processor.resample)

    def chat(self, turns: Sequence[tuple[str, str | None]], num_images: int = 0) -> str:
        """The prompt for a conversation of (question, answer) turns; the last answer may be None. Images come first.

        The checkpoint's own template writes it, without one `llava_prompt`. Raises LlavaError for a template that fails
        or does not end.
        """
        if self.template is None:
            return llava_prompt(turns, num_images)
        # A template reads a message's content as a list of parts or, as those of language models do, as text. One that
        # reads text fails on a list, or prints it as Python does, with 'type': in it.
        said = "".join(question + (answer or "") for question, answer in turns)
        reasons = []
        for as_parts in (True, False):
            values: dict[str, Any] = {"messages": messages(turns, num_images, as_parts), **self.special_tokens}
            # Templates ask whether these are none, since transformers passes them.
            values |= {"tools": None, "documents": None}
            values["add_generation_prompt"] = not turns or turns[-1][1] is None
            try:
                prompt = render(self.template, values)
            except TemplateError as error:
                reasons.append(str(error))
                continue
            all_shown = prompt.count(IMAGE_TOKEN) == num_images + said.count(IMAGE_TOKEN)
            read = prompt.count("'type':") == said.count("'type':")
            if all_shown and read and all(question.strip() in prompt for question, _ in turns):
                first = self.tokenizer.encode("")[:1]  # of every text: BOS, or nothing; not to stand there twice
                return prompt.removeprefix(self.tokenizer.piece(first[0])) if first else prompt
            reasons.append("it leaves out an image or a question")
        reason = "; with content as text: ".join(dict.fromkeys(reasons))
        raise LlavaError(f"The checkpoint's chat template cannot be used: {reason}. Write the whole prompt yourself.")
