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
from torch import Tensor, nn

from minillava import TINY
from minillava.checks import LlavaError
from minillava.config import LlavaConfig
from minillava.model import Attention, Llava
from minillava.processor import open_image
from prefixkv import PrefixKV

EXAMPLE = TINY / "examples" / "scene_1.png"
QUESTION = "Describe the image in detail."
FURTHER = ("And what else?", "How many are there, and where?")  # the turns that continue its cache
# Relative to a stage's largest number: what a different order of summation makes of some 30 layers.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
CAUSES = {  # by how a stage's name ends
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
Pick = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Tensor]  # module, arguments, keyword arguments, output


def output(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> Tensor:
    """What a module returns, or the first part of it."""
    return made[0] if isinstance(made, (tuple, list)) else made


def entering(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> Tensor:
    """What a module is given: its first argument."""
    return arguments[0] if arguments else keywords["hidden_states"]


def projected(part: int) -> Pick:
    """Of an attention: query, key or value (0, 1, 2), made once more from what the module was given."""

    def pick(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> Tensor:
        if isinstance(module, Attention):
            return module.project(*arguments[:2])[part]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        projections = (module.q_proj, module.k_proj, module.v_proj)
        heads = [p(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in projections]
        return (*apply_rotary_pos_emb(heads[0], heads[1], *keywords["position_embeddings"]), heads[2])[part]

    return pick


@dataclass(frozen=True)
class Tap:
    """Where a stage can be seen: a submodule, and which tensor when it has run (default: its output)."""

    module: str
    pick: Pick = output


@dataclass(frozen=True)
class Stage:
    """How far one stage is from the reference."""

    name: str
    absolute: float  # the largest difference
    relative: float  # as a share of the reference's largest number
    cosine: float
    ok: bool
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

    def tap(ending: str, pick: Pick = output, vision: bool = False) -> Tap:  # names begin as the version has them
        return Tap(next(name for name in names if name.endswith(ending) and ("vision" in name) == vision), pick)

    layer = config.vision_feature_layer
    depth = layer if layer >= 0 else config.vision.num_hidden_layers + 1 + layer
    taps = {"patch embedding": tap("patch_embedding", vision=True)}
    taps |= {f"vision layer {i}": tap(f"layers.{i}", vision=True) for i in range(depth)}
    taps |= {"projector": tap("multi_modal_projector"), "merged embeddings": tap("layers.0", entering)}
    for i in range(config.text.num_hidden_layers):
        taps[f"layer {i} norm"] = tap(f"layers.{i}.input_layernorm")
        for part, name in enumerate(("query", "key", "value")):
            taps[f"layer {i} {name}"] = tap(f"layers.{i}.self_attn", projected(part))
        taps[f"layer {i} attention"] = tap(f"layers.{i}.self_attn.o_proj")
        taps[f"layer {i} MLP"] = tap(f"layers.{i}.mlp")
    return taps | {"final norm": tap(".norm"), "logits": tap("lm_head")}


@torch.no_grad()
def record(
    model: nn.Module, taps: dict[str, Tap], run: Callable[[], object], keep: Callable[[str, Tensor], None]
) -> None:
    """Calls `keep` with every stage's tensor, the first time that it is computed, while `run` runs."""
    seen: set[str] = set()
    hooks = []
    for stage, tap in taps.items():

        def hook(
            module: nn.Module, arguments: Any, keywords: Any, made: Any, stage: str = stage, tap: Tap = tap
        ) -> None:
            if stage not in seen:
                seen.add(stage)
                keep(stage, tap.pick(module, arguments, keywords, made).detach())

        try:
            module = model.get_submodule(tap.module)
        except AttributeError:
            raise LlavaError(
                f"The stage {stage!r} is tapped at {tap.module!r}; the model has no such module."
            ) from None
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()


class QueryRecorder(PrefixKV):
    """PrefixKV that remembers layer 0's query of every new token: it depends only on token and position."""

    def __init__(self, budget: float):
        super().__init__(budget)
        self.queries: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        if layer == 0:
            self.queries.append(query)
        return None


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
            from transformers import AutoModelForImageTextToText, logging
        except ImportError:
            raise LlavaError("transformers is not installed; verify needs it: pip install transformers.") from None
        from weights import load_processor, read_config  # it stands on minillava, not the other way round

        folder = Path(folder)
        self.config = read_config(folder)
        self.processor = load_processor(folder)
        self.tiled = len(self.config.image_grid_pinpoints) > 0  # LLaVA-NeXT
        picture = open_image(image)
        prompt = prompt or self.processor.chat([(QUESTION, None)], 1)
        self.inputs = {name: t.to(device) for name, t in self.processor([prompt], [picture]).items()}
        self.scratch = tempfile.TemporaryDirectory(prefix="verify-")
        self.others = self.preprocessing(folder, prompt, picture)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval()  # goes when this function ends, before ours is loaded
        pixels = self.inputs["pixel_values"].to(dtype)
        inputs = {**self.inputs, "pixel_values": pixels}
        record(model, stages(model, self.config), lambda: model(**inputs), self.keep)
        with torch.no_grad():
            if self.tiled:
                made = model.model.get_image_features(pixels, self.inputs["image_sizes"], output_hidden_states=True)
                packed = torch.cat(list(made.pooler_output))
                self.keep("packed features", packed)
                self.keep("newline", packed[self.newlines()])
            made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
            self.tokens = made[:, inputs["input_ids"].shape[1] :].cpu()
            # Layer 0 on the whole text: where the new tokens' queries must point, whatever a cache has dropped.
            text = {**inputs, "input_ids": made, "attention_mask": torch.ones_like(made)}
            tap = {"positions after eviction": stages(model, self.config)["layer 0 query"]}
            record(model, tap, lambda: model(**text), lambda name, t: self.keep(name, t[:, :, -new_tokens:-1]))
            past = None

            def read(ids: Tensor) -> Tensor:
                nonlocal past
                block = inputs if past is None else {"input_ids": ids, "past_key_values": past}
                made = model(**block, use_cache=True, logits_to_keep=1)
                past = made.past_key_values
                return made.logits[:, -1]

            self.keep("three turns", converse(read, self.turns()))

    def turns(self) -> list[Tensor]:
        """The prompt and two further questions: ids [1, N] each."""
        encode, prompt = self.processor.tokenizer.encode, self.inputs["input_ids"]
        start = len(encode(""))  # a BOS, if the tokenizer adds one
        return [prompt, *(torch.tensor([encode(text)[start:]], device=prompt.device) for text in FURTHER)]

    def preprocessing(self, folder: Path, prompt: str, picture: Any) -> dict[str, Tensor | str]:
        """Pixels and ids of transformers' own processor, or the sentence that it raised."""
        from transformers import AutoImageProcessor, AutoTokenizer

        def attempt(make: Callable[[], Tensor]) -> Tensor | str:
            try:
                return make()
            except Exception as error:  # whatever transformers raises for a folder it cannot use
                return f"not compared ({type(error).__name__})"

        def pixels() -> Tensor:
            made = AutoImageProcessor.from_pretrained(folder, backend="pil")(picture, return_tensors="pt")
            return torch.as_tensor(made["pixel_values"]).flatten(0, -4)  # LLaVA-NeXT: [1, tiles, 3, R, R]

        def ids() -> Tensor:
            images = int((self.inputs["input_ids"] == self.config.image_token_id).sum())
            text = prompt.replace("<image>", "<image>" * images)
            return torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])

        # Without tokenizer.json transformers would convert tokenizer.model, and its version 5 treats runs of spaces
        # in another way.
        usable = (folder / "tokenizer.json").exists()
        return {"pixels": attempt(pixels), "token ids": attempt(ids) if usable else "not compared: no tokenizer.json"}

    def newlines(self) -> list[int]:
        """LLaVA-NeXT: where among the picture's tokens a row ends."""
        return self.config.tiling(self.inputs["image_sizes"][0].tolist()).newlines

    def keep(self, stage: str, tensor: Tensor) -> None:
        """Puts a stage on disk."""
        torch.save(tensor.cpu(), Path(self.scratch.name) / f"{stage}.pt")

    def get(self, stage: str) -> Tensor | None:
        """A stage from disk, None if transformers has none of that name."""
        path = Path(self.scratch.name) / f"{stage}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None


def converse(read: Callable[[Tensor], Tensor], turns: Sequence[Tensor], length: int = 8) -> Tensor:
    """Reads turns [1, N], each followed by a greedy answer of `length` tokens: logits [T, V] of all answers.

    read: ids [1, N] -> logits [1, V] for the token after them, going on with what it has read before.
    """
    found = []
    for turn in turns:
        logits = read(turn)
        for _ in range(length):
            found.append(logits)
            logits = read(logits.argmax(-1, keepdim=True))
    return torch.cat(found)


def difference(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Stage:
    """Two tensors in numbers; another shape, NaN and infinity are differences."""
    if found.shape != expected.shape:
        note = f"{list(found.shape)}, expected {list(expected.shape)}"
        return Stage(name, float("inf"), float("inf"), 0.0, False, note)
    one, other = found.detach().cpu().double().flatten(), expected.double().flatten()
    absolute = float((one - other).abs().max())
    relative = absolute / max(float(other.abs().max()), 1e-30)
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return Stage(name, absolute, relative, cosine, relative <= tolerance)


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
        expected = reference.get(name)
        if expected is None:
            raise LlavaError(f"The reference has no stage {name!r}; the names are those of `stages`.")
        found[name] = difference(name, tensor, expected, tolerance)

    record(module, taps, run or (lambda: module(**reference.inputs)), keep)
    return [found[name] for name in taps if name in found]


@torch.no_grad()
def verify(model: Llava, reference: Reference, tolerance: float = TOLERANCE["float32"]) -> list[Stage]:
    """All that there is to compare: preprocessing, every stage, greedy tokens, positions after eviction."""
    ids, pixels = reference.inputs["input_ids"], reference.inputs["pixel_values"]
    found = []
    for name, ours, allowed in (("pixels", pixels, 1e-5), ("token ids", ids, 0.0)):
        theirs = reference.others[name]
        shown = "tiles" if name == "pixels" and reference.tiled else name
        if isinstance(theirs, str):
            found.append(Stage(shown, 0.0, 0.0, 1.0, True, theirs))
        else:
            found.append(difference(shown, ours, theirs, allowed))
    found += compare(model, stages(model, reference.config), reference, tolerance)
    if reference.tiled:
        packed = model.image_features(pixels.to(model.lm_head.weight.dtype), reference.inputs["image_sizes"])
        at = next(i for i, stage in enumerate(found) if stage.name == "merged embeddings")
        for name, ours in (("packed features", packed), ("newline", packed[reference.newlines()])):
            expected = reference.get(name)
            assert expected is not None  # kept for every tiled picture
            found.insert(at, difference(name, ours, expected, tolerance))
    new = reference.tokens.shape[1]
    made = model.generate(**reference.inputs, max_new_tokens=new, eos_token_id=()).token_ids.cpu()
    equal = int((made == reference.tokens).long().cumprod(1).sum())
    found.append(Stage("greedy tokens", 0.0, 0.0, 1.0, equal == new, f"{equal} of {new} equal"))
    turns, said = reference.turns(), reference.get("three turns")
    if said is not None:  # a reference of your own may have none
        cache = model.new_cache(sum(turn.shape[1] for turn in turns[1:]) + len(said))
        logits = converse(
            lambda ids: model.read(**({"input_ids": ids} if cache.key else reference.inputs), cache=cache), turns
        )
        equal = int((logits.argmax(-1).cpu() == said.argmax(-1)).long().cumprod(0).sum())
        found.append(difference("three turns", logits, said, tolerance))
        found.append(Stage("three turns, tokens", 0.0, 0.0, 1.0, equal == len(said), f"{equal} of {len(said)} equal"))
    recorder = QueryRecorder(0.2)
    cache = model.new_cache(new, recorder)
    model.read(**reference.inputs, cache=cache)
    for token in reference.tokens.to(ids.device).unbind(1)[:-1]:
        model.read(token[:, None], cache)
    expected = reference.get("positions after eviction")
    if recorder.queries and expected is not None:
        queries = torch.cat(recorder.queries, dim=2)
        found.append(difference("positions after eviction", queries, expected, tolerance))
    return found


def first_difference(found: Sequence[Stage]) -> tuple[Stage, str] | None:
    """The first stage that differs and its likely causes; None if all agree."""
    for stage in found:
        if not stage.ok:
            return stage, next((text for end, text in CAUSES.items() if end in stage.name), "the arithmetic before it")
    return None


def lines(found: Sequence[Stage]) -> Iterator[str]:
    """The table, and what to look at first."""
    yield f"{'stage':26} {'largest':>12} {'relative':>12} {'cosine':>14}"
    yield from map(str, found)
    first = first_difference(found)
    yield ""
    if first is None:
        yield f"All {len(found)} stages agree with transformers."
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
