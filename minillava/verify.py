"""Is this LLaVA right? Its numbers beside those of `transformers`, stage by stage.

    python -m minillava.verify --model FOLDER_OR_ID

Both models read the same pixels and token ids; every stage in between is compared, and the first that differs is
named with its likely causes. One model is in memory at a time: what transformers computes waits in a temporary folder.

For a module of your own, say where each stage can be seen in it, and leave out what it does not have:

    reference = Reference("minillava/tiny")
    taps = {"patch embedding": Tap("vision.stem"), "layer 0 MLP": Tap("blocks.0.ff"), "logits": Tap("head")}
    for stage in compare(my_module, taps, reference):
        print(stage)

The stages and their shapes are those of `stages`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava import TINY
from minillava.checks import LlavaError, require
from minillava.config import LlavaConfig
from minillava.model import Attention, Llava
from minillava.processor import open_image
from prefixkv import PrefixKV

EXAMPLE = TINY / "examples" / "scene_1.png"
QUESTION = "Describe the image in detail."
FURTHER = ("And what else?", "How many are there, and where?")  # the turns that continue its cache
# Relative to a stage's largest number: what a different order of summation makes of some 30 layers.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
CAUSES = {  # by what a stage's name contains; the first that fits
    "pixels": "the resize filter, crop or pad, rescaling, mean and std, the order of colours",
    "tiles": "the grid (height before width), the overview's place, the resize filter, padding that is not black",
    "token ids": "BOS, spaces beside an added token, the number of image tokens",
    "patch embedding": "the kernel's weights, a bias that CLIP has not, patches flattened in another order",
    "vision layer 0": "position embedding, CLS, the norm before the layers, and what can go wrong in any layer",
    "vision layer": "gelu instead of quick_gelu, layer_norm_eps, the attention's scale or biases",
    "projector": "features of another vision layer (vision_feature_layer), CLS kept, a missing bias, another gelu",
    "newline": "image_newline left out, or put elsewhere than at the end of every row of patches",
    "packed features": "rows that do not run over all tiles, padding cut off on one side only, the overview last",
    "merged embeddings": "the token embedding, or image features at other positions or in another order",
    "norm": "rms_norm_eps, a norm that subtracts the mean, or, after layer 0, the sum of residuals before it",
    "query": "RoPE: its pairs (halves, not neighbours), theta, scaling, positions; then the projection's weights",
    "key": "RoPE: its pairs (halves, not neighbours), theta, scaling, positions; then the projection's weights",
    "value": "the value projection, or the number of key-value heads",
    "attention": "the mask, the scale, which query heads share a key, the output projection",
    "MLP": "gate and up exchanged, another activation",
    "logits": "an output layer that should, or should not, be tied to the embedding",
    "greedy tokens": "the cache: positions of new tokens, slots, or the mask beyond the prompt",
    "three turns": "the mask of a block that continues a cache (causal within it, all that was held before), positions",
    "positions after eviction": "new tokens counted from the shortened cache, not from the text",
}
Inputs = dict[str, Tensor]  # of a model, by their names
Pick = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor]  # module, arguments, keyword arguments


def projected(part: int) -> Pick:
    """Of an attention: query, key or value (0, 1, 2), made once more from what the module was given."""

    def pick(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        if isinstance(module, Attention):
            return module.project(*arguments[:2])[part]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        projections = (module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (
            project(keywords["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for project in projections
        )
        return (*apply_rotary_pos_emb(query, key, *keywords["position_embeddings"]), value)[part]

    return pick


@dataclass(frozen=True)
class Tap:
    """Where a stage can be seen: in a module's output, or the first part of it; or what `pick` makes of its input."""

    module: str
    pick: Pick | None = None


@dataclass(frozen=True)
class Stage:
    """How far one stage is from the reference."""

    name: str
    absolute: float = 0.0  # the largest difference
    relative: float = 0.0  # as a share of the reference's largest number
    cosine: float = 1.0
    ok: bool = True
    note: str = ""  # what cannot be put in numbers

    def __str__(self) -> str:
        mark = "ok" if self.ok else "DIFFERS"
        if self.note:
            return f"{self.name:26} {self.note:>40}  {mark}"
        return f"{self.name:26} {self.absolute:12.2e} {self.relative:12.2e} {self.cosine:14.9f}  {mark}"


def stages(model: nn.Module, config: LlavaConfig) -> dict[str, Tap]:
    """The stages in the order of the computation, and where they can be seen: in `Llava` or in transformers' model.

    patch embedding [I, Dv, R / patch, R / patch] · vision layer i [I, P + 1, Dv] · projector [I, P, D] · merged
    embeddings [B, N, D] · of every decoder layer: norm [B, N, D], query [B, H, N, Dh] and key [B, Hkv, N, Dh] after
    RoPE, value [B, Hkv, N, Dh], attention and MLP [B, N, D] before they are added · final norm · logits [B, N, V].
    """
    names = [name for name, _ in model.named_modules()]

    def tap(ending: str, pick: Pick | None = None, vision: bool = False) -> Tap:  # versions begin names differently
        return Tap(next(name for name in names if name.endswith(ending) and ("vision" in name) == vision), pick)

    layer = config.vision_feature_layer
    depth = layer if layer >= 0 else config.vision.num_hidden_layers + 1 + layer
    taps = {"patch embedding": tap("patch_embedding", vision=True)}
    taps |= {f"vision layer {i}": tap(f"layers.{i}", vision=True) for i in range(depth)}
    taps["projector"] = tap("multi_modal_projector")
    taps["merged embeddings"] = tap("layers.0", lambda module, arguments, keywords: arguments[0])
    for i in range(config.text.num_hidden_layers):
        taps[f"layer {i} norm"] = tap(f"layers.{i}.input_layernorm")
        for part, name in enumerate(("query", "key", "value")):
            taps[f"layer {i} {name}"] = tap(f"layers.{i}.self_attn", projected(part))
        taps[f"layer {i} attention"] = tap(f"layers.{i}.self_attn.o_proj")
        taps[f"layer {i} MLP"] = tap(f"layers.{i}.mlp")
    return taps | {"final norm": tap(".norm"), "logits": tap("lm_head")}


@torch.no_grad()
def record(
    model: nn.Module, taps: dict[str, Tap], run: Callable[[], object], keep: Callable[[str, Tensor], object]
) -> None:
    """Calls `keep` with a stage's name and tensor whenever one is computed, while `run` runs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    with contextlib.ExitStack() as hooks:
        for stage, tap in taps.items():
            there = tap.module in modules
            require(there, f"The stage {stage!r} is tapped at {tap.module!r}; the model has no such module.")

            def hook(module: Any, given: Any, named: Any, made: Any, stage: str = stage, pick: Any = tap.pick) -> None:
                made = made[0] if isinstance(made, (tuple, list)) else made
                keep(stage, pick(module, given, named) if pick else made)

            hooks.enter_context(modules[tap.module].register_forward_hook(hook, with_kwargs=True))
        run()


class Reference:
    """What transformers computes for one prompt: every stage on disk, in a folder that goes with this object.

    folder: of a checkpoint. Raises LlavaError for input that cannot be read. transformers must be installed.
    """

    def __init__(
        self,
        folder: str | Path,
        image: str | Path = EXAMPLE,
        prompt: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        new_tokens: int = 32,
    ):
        try:
            from transformers import AutoModelForImageTextToText, DynamicCache, logging
        except ImportError:
            raise LlavaError("transformers is not installed; verify needs it: pip install transformers.") from None
        from weights import load_processor, read_config  # it stands on minillava, not the other way round

        folder, picture = Path(folder), open_image(image)
        self.config, self.processor = read_config(folder), load_processor(folder)
        self.tiled = len(self.config.image_grid_pinpoints) > 0  # LLaVA-NeXT
        prompt = prompt or self.processor.chat([(QUESTION, None)], 1)
        self.inputs = inputs = {name: t.to(device) for name, t in self.processor([prompt], [picture]).items()}
        self.preprocessed = self.preprocessing(folder, prompt, picture)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        self.scratch = tempfile.TemporaryDirectory(prefix="verify-")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval()  # goes when this function ends, before ours is loaded
        taps = stages(model, self.config)
        record(model, taps, lambda: model(**inputs), self.keep)
        with torch.no_grad():
            if self.tiled:
                pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
                made = model.model.get_image_features(**pictures, output_hidden_states=True)
                self.keep("packed features", torch.cat(list(made.pooler_output)))
            text = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
            self.keep("greedy tokens", text[:, inputs["input_ids"].shape[1] :])
            # Layer 0 on the whole text: where the new tokens' queries must point, whatever a cache has dropped.
            tap = {"positions after eviction": taps["layer 0 query"]}
            whole = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
            record(model, tap, lambda: model(**whole), lambda name, t: self.keep(name, t[:, :, -new_tokens:-1]))
            past = {"past_key_values": DynamicCache(), "use_cache": True, "logits_to_keep": 1}
            self.keep("three turns", converse(lambda block: model(**block, **past).logits[:, -1], self.turns()))

    def turns(self) -> list[Inputs]:
        """The prompt with its picture, and two further questions of ids [1, N]."""
        encode, device = self.processor.tokenizer.encode, self.inputs["input_ids"].device
        start = len(encode(""))  # a BOS, if the tokenizer adds one
        return [self.inputs, *({"input_ids": torch.tensor([encode(t)[start:]], device=device)} for t in FURTHER)]

    def preprocessing(self, folder: Path, prompt: str, picture: Any) -> list[Stage]:
        """Pixels and ids beside those of transformers' own processor, or why they cannot be compared."""
        from transformers import AutoImageProcessor, AutoTokenizer

        def pixels() -> Tensor:
            made = AutoImageProcessor.from_pretrained(folder, backend="pil")(picture, return_tensors="pt")
            return torch.as_tensor(made["pixel_values"]).flatten(0, -4)  # LLaVA-NeXT: [1, tiles, 3, R, R]

        def token_ids() -> Tensor:
            images = int((self.inputs["input_ids"] == self.config.image_token_id).sum())
            text = prompt.replace("<image>", "<image>" * images)
            return torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])

        def beside(name: str, ours: str, make: Callable[[], Tensor]) -> Stage:
            try:
                return difference(name, self.inputs[ours], make(), 1e-5)
            except Exception as error:  # whatever transformers raises for a folder it cannot use
                return Stage(name, note=f"not compared ({type(error).__name__})")

        # Without tokenizer.json transformers would convert tokenizer.model, and its version 5 treats runs of spaces
        # in another way.
        ids = Stage("token ids", note="not compared: no tokenizer.json")
        ids = beside("token ids", "input_ids", token_ids) if (folder / "tokenizer.json").exists() else ids
        return [beside("tiles" if self.tiled else "pixels", "pixel_values", pixels), ids]

    def keep(self, stage: str, tensor: Tensor) -> None:
        """Puts a stage on disk."""
        torch.save(tensor.cpu(), Path(self.scratch.name, f"{stage}.pt"))

    def get(self, stage: str) -> Tensor:
        """A stage from disk; raises LlavaError if there is none of that name."""
        path = Path(self.scratch.name, f"{stage}.pt")
        require(path.exists(), f"The reference has no stage {stage!r}; the names are those of `stages`.")
        return torch.load(path, weights_only=True)


def converse(read: Callable[[Inputs], Tensor], turns: Sequence[Inputs], length: int = 8) -> Tensor:
    """Reads turns, each followed by a greedy answer of `length` tokens: logits [T, V] of all answers.

    read: a block's inputs -> logits [1, V] for the token after it, going on with what it has read before.
    """
    found = []
    for turn in turns:
        logits = read(turn)
        for _ in range(length):
            found.append(logits)
            logits = read({"input_ids": logits.argmax(-1, keepdim=True)})
    return torch.cat(found)


def difference(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Stage:
    """Two tensors in numbers, or how many of the first token ids are equal; another shape and NaN are differences."""
    if found.shape != expected.shape:
        note = f"{list(found.shape)}, expected {list(expected.shape)}"
        return Stage(name, float("inf"), float("inf"), 0.0, False, note)
    found = found.detach().cpu()
    if not found.is_floating_point():
        equal, count = int((found == expected).flatten().long().cumprod(0).sum()), expected.numel()
        return Stage(name, ok=equal == count, note=f"{equal} of {count} equal")
    one, other = found.double().flatten(), expected.double().flatten()
    absolute = float((one - other).abs().max())
    relative = absolute / max(float(other.abs().max()), 1e-30)
    return Stage(name, absolute, relative, float(F.cosine_similarity(one, other, dim=0)), relative <= tolerance)


def compare(
    module: nn.Module,
    taps: dict[str, Tap],
    reference: Reference,
    tolerance: float = TOLERANCE["float32"],
    run: Callable[[], object] | None = None,
) -> list[Stage]:
    """Every stage of `taps` in the order given; `run` (default: `module(**reference.inputs)`) makes them happen.

    Raises LlavaError for a stage that the reference does not have, and for a tap on a module that is not there.
    """
    found: dict[str, Stage] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if name not in found:  # the first time that it is computed
            found[name] = difference(name, tensor, reference.get(name), tolerance)

    record(module, taps, run or (lambda: module(**reference.inputs)), keep)
    return [found[name] for name in taps if name in found]


@torch.no_grad()
def verify(model: Llava, reference: Reference, tolerance: float = TOLERANCE["float32"]) -> list[Stage]:
    """All that there is to compare: preprocessing, stages, greedy tokens, three turns, positions after eviction."""
    inputs, taps, get = reference.inputs, stages(model, reference.config), reference.get
    found = reference.preprocessed + compare(model, taps, reference, tolerance)
    if reference.tiled:
        packed, expected = model.image_features(inputs["pixel_values"], inputs["image_sizes"]), get("packed features")
        ends = reference.config.tiling(inputs["image_sizes"][0].tolist()).newlines  # of rows, among the tokens
        at = [stage.name for stage in found].index("merged embeddings")
        found.insert(at, difference("newline", packed[ends], expected[ends], tolerance))
        found.insert(at + 1, difference("packed features", packed, expected, tolerance))
    tokens, said, turns = get("greedy tokens"), get("three turns"), reference.turns()
    new = tokens.shape[1]
    cache = model.new_cache(sum(turn["input_ids"].shape[1] for turn in turns[1:]) + len(said))
    logits = converse(lambda block: model.read(**block, cache=cache), turns)
    evicting, queries = model.new_cache(new, PrefixKV(0.2)), list[Tensor]()
    model.read(**inputs, cache=evicting)

    def decode() -> None:
        for token in tokens.to(logits.device).unbind(1)[:-1]:
            model.read(token[:, None], evicting)

    # Layer 0's query depends only on the token and its position.
    record(model, {"query": taps["layer 0 query"]}, decode, lambda _, query: queries.append(query))
    cached = {
        "greedy tokens": (model.generate(**inputs, max_new_tokens=new, eos_token_id=()).token_ids, tokens),
        "three turns": (logits, said),
        "three turns, tokens": (logits.argmax(-1), said.argmax(-1)),
        "positions after eviction": (torch.cat(queries, dim=2), get("positions after eviction")),
    }
    return found + [difference(name, *pair, tolerance) for name, pair in cached.items()]


def first_difference(found: Sequence[Stage]) -> tuple[Stage, str] | None:
    """The first stage that differs and its likely causes; None if all agree."""
    for stage in found:
        if not stage.ok:
            return stage, next((text for end, text in CAUSES.items() if end in stage.name), "the arithmetic before it")
    return None


def lines(found: Sequence[Stage]) -> Iterator[str]:
    """The table, and what to look at first."""
    yield f"{'stage':26} {'largest':>12} {'relative':>12} {'cosine':>14}"
    yield from (*map(str, found), "")
    first = first_difference(found)
    if first is None:
        skipped = sum(stage.note.startswith("not compared") for stage in found)
        left_out = f"; {skipped} could not be compared" if skipped else ""
        yield f"All {len(found) - skipped} stages agree with transformers{left_out}."
    else:
        yield f"The first stage that differs is {first[0].name}. Look at {first[1]}."


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if all agrees, 1 if a stage differs; others as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m minillava.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(TINY), help="folder or Hub id (default: the embedded)")
    parser.add_argument("--image", default=str(EXAMPLE))
    parser.add_argument("--prompt", help="with one <image> (default: a question in the checkpoint's own form)")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tolerance", type=float, help="largest difference, relative to a stage's largest number")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args(arguments)

    def work() -> int:
        from weights import find, find_device, load_model

        if args.new_tokens < 2:
            raise LlavaError(f"--new-tokens is {args.new_tokens}; expected 2 or more.")
        find_device(args.device)
        folder, dtype = find(args.model), getattr(torch, args.dtype)
        reference = Reference(folder, args.image, args.prompt, dtype, args.device, args.new_tokens)
        model = load_model(folder, args.device, dtype)
        found = verify(model, reference, args.tolerance if args.tolerance is not None else TOLERANCE[args.dtype])
        print(json.dumps([asdict(stage) for stage in found]) if args.json else "\n".join(lines(found)))
        return 1 if first_difference(found) else 0

    return run_command("verify", work)


if __name__ == "__main__":
    sys.exit(main())
