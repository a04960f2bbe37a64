"""Hostile input: thousands of damaged files and odd values, each must end well: `python -m bench.fuzz`.

A case takes a small valid checkpoint with a picture, a plan and a data file, damages one of them (bytes flipped, cut,
repeated; JSON values replaced by nasty ones), and does with it what a user would do. It ends well if it runs clean or
raises our own error with one sentence. Anything else fails: another exception, a crash, more than 10 seconds, more
than 1 GB of memory, a file written where none belongs. Cases follow from (seed, number); a failure is kept with its
number in `--out` and can be run again with `--only`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import sentencepiece
import torch
from PIL import Image

import demo
import weights
from bench import quality
from minillava.checks import LlavaError
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.convert import config_dict, hub_name, save_weights
from minillava.model import Llava
from minillava.processor import open_image
from prefixkv import Plan, PrefixKV

SECONDS, MEMORY = 10, 1 << 30
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 10**6, 2**31, 2**63, 10**18, 10**400, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "../../../etc/passwd", "/dev/zero", "ß" * 3, [], [[]], {}, {"a": 1}, [1, 2, 3], "NaN",
    "llava", [-1],
)  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """A tiny valid checkpoint in two shards, with everything a folder can hold."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: What is it? ASSISTANT: a red cat"] * 8), model_writer=made, model_type="bpe",
        vocab_size=300, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    config = LlavaConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=8, patch_size=4),
        text=TextConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128),
        image_token_id=310,
    )  # fmt: skip
    save_weights(Llava(config), folder / "model.safetensors", torch.float32)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_dict(config, "float32")))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = {"added_tokens_decoder": {"310": {"content": "<image>"}},
                 "chat_template": [{"name": "default", "template": TEMPLATE}]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "added_tokens.json").write_text('{"<image>": 310}')
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_pad": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiled(folder: Path) -> None:
    """A tiny LLaVA-NeXT with SigLIP, Qwen2, a byte-level BPE in tokenizer.json and a chat template."""
    import tokenizers

    folder.mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["What is it? a red cat"] * 8, trainer)
    model.add_special_tokens(["<image>"])
    model.save(str(folder / "tokenizer.json"))
    config = LlavaConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=8, patch_size=4, hidden_act="gelu_pytorch_tanh",
                            model_type="siglip_vision_model"),
        text=TextConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, model_type="qwen2"),
        image_token_id=model.get_vocab()["<image>"], vision_feature_select_strategy="full",
        vision_feature_layer=-1, image_grid_pinpoints=((8, 16), (16, 8), (16, 16)),
    )  # fmt: skip
    torch.manual_seed(0)
    save_weights(Llava(config), folder / "model.safetensors", torch.float32)
    (folder / "config.json").write_text(json.dumps(config_dict(config, "float32")))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "image_grid_pinpoints":
            [[8, 16], [16, 8], [16, 16]], "image_processor_type": "LlavaNextImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(size))


def make_original(folder: Path, checkpoint: Path) -> None:
    """The checkpoint of `make_checkpoint` in the original LLaVA's layout: a pickle, and CLIP in a folder of its own."""
    (folder / "clip").mkdir(parents=True)
    model, parts = weights.load_model(checkpoint), {"clip": {}, "": {}}  # type: ignore[var-annotated]
    for name, tensor in model.state_dict().items():
        part = "clip" if name.startswith("vision_tower.") else ""
        name = hub_name(name).removeprefix("vision_tower.").removeprefix("language_model.")
        for layer, place in (("linear_1", "0"), ("linear_2", "2")):
            name = name.replace(f"multi_modal_projector.{layer}", f"model.mm_projector.{place}")
        parts[part][name] = tensor[:310] if len(tensor) == 320 else tensor
    for part, state in parts.items():
        torch.save(state, folder / part / "pytorch_model.bin")
    config = config_dict(model.config, "float32")
    text = {**config["text_config"], "vocab_size": 310, "model_type": "llava"}  # type: ignore[dict-item]
    settings = {"mm_vision_tower": "clip", "mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
                "mm_use_im_start_end": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**text, **settings}))
    (folder / "clip" / "config.json").write_text(json.dumps(config["vision_config"]))
    for name, place in (("preprocessor_config.json", "clip"), ("tokenizer.model", "")):
        shutil.copy(checkpoint / name, folder / place / name)


def make_seeds(folder: Path) -> None:
    """Everything that is damaged: three checkpoints, pictures in several formats, a plan, a data file."""
    (folder / "model").mkdir(parents=True)
    make_checkpoint(folder / "model")
    make_tiled(folder / "tiled")
    make_original(folder / "original", folder / "model")
    picture = Image.effect_noise((12, 9), 80).convert("RGB")
    for kind in ("png", "jpg", "gif", "bmp", "webp", "tiff"):
        picture.save(folder / f"picture.{kind}")
    weights.write_plan(folder / "plan.json", Plan(0.5, [0.25, 0.75], "model", 3))
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    entries = [
        {"image": "picture.png", "conversations": talk},
        {"image": "picture.jpg", "question": "?", "answer": "x"},
    ]
    (folder / "data.json").write_text(json.dumps(entries))


# ---------------------------------------------------------------- damage


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """The data with one to eight changes: bits, bytes, lengths, stretches cut, doubled, zeroed; or cut short."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # Headers are short and matter most.
        size = max(1, min(len(changed), rng.choice((16, 64, 512, len(changed) or 1))))
        at, end = rng.randrange(size), rng.randrange(1, 40)
        kind = rng.randrange(7)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[at % len(changed)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del changed[at : at + end]
        elif kind == 3:
            changed[at:at] = changed[at : at + end]
        elif kind == 4:
            changed[at : at + 8] = rng.choice((0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        elif kind == 5:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(end))
        else:
            del changed[at + 1 :]
    return bytes(changed)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """The JSON with one to three values replaced, removed, doubled or renamed."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []

        def collect(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    collect(node[key])

        if not isinstance(value, (dict, list)):
            break
        collect(value)
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind <= 2:
            node[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(("x", "", "a" * 1000, str(key).upper()))] = copy.deepcopy(node[key])
        else:
            node.append(copy.deepcopy(node[key]))
    text = json.dumps(value if rng.random() < 0.98 else rng.choice(NASTY))
    return text.encode() if rng.random() < 0.99 else b"[" * 10**5


def damage_tensors(rng: random.Random, path: Path) -> None:
    """The pickle with one to all of its tensors made into what no layer takes, or renamed."""
    state = torch.load(path)
    for name in rng.sample(sorted(state), rng.choice((1, 1, 2, len(state)))):
        tensor = state.pop(name)
        dtype = rng.choice((torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64))
        odd: tuple[Any, ...] = (
            tensor.to(dtype),
            tensor.to_sparse(),
            tensor.to("meta"),
            tensor[..., :1],
            tensor[0],
            tensor[:0],
            3,
            {},
        )
        state[name if rng.random() < 0.8 else rng.choice(("", f"\x1b[2J\n{name}", 7))] = rng.choice(odd)
    torch.save(state if rng.random() < 0.95 else list(state), path)


# ---------------------------------------------------------------- use


def use_model(seeds: Path) -> None:
    """Loads the checkpoint and answers a question about a picture."""
    model, processor = weights.load(seeds / "model")
    inputs = processor(processor.chat([("What?", None)], 1), open_image(seeds / "picture.png"))
    made = model.generate(**inputs, max_new_tokens=3, compressor=PrefixKV(0.5))
    processor.decode(made.token_ids)


def use_original(rng: random.Random, seeds: Path) -> None:
    """Converts the checkpoint, or looks into it, or asks it a question with the demo."""
    folder, out = str(seeds / "original"), seeds / "out"
    do = rng.choice((
        partial(weights.main, ["convert", folder, str(out)]), partial(weights.main, ["inspect", folder]),
        partial(demo.main, ["--model", folder, "--image", str(seeds / "picture.png"), "--max-new-tokens", "3",
                            "--dtype", rng.choice(("auto", "float32"))]),
    ))  # fmt: skip
    code = do()
    assert code in (0, 1, 2), f"exit code {code}"
    shutil.rmtree(out, ignore_errors=True)
    if code:
        raise LlavaError("refused")


def use_tiled(seeds: Path) -> None:
    """Loads LLaVA-NeXT, asks a question by its template, and answers it."""
    model, processor = weights.load(seeds / "tiled")
    prompt = processor.chat([("What?", None)], 1)
    inputs = processor(prompt, [open_image(seeds / "picture.png")])
    made = model.generate(**inputs, max_new_tokens=3, compressor=PrefixKV(0.5))
    processor.decode(made.token_ids)


def use_picture(path: Path) -> None:
    _, processor = weights.load(path.parent / "model")
    processor("<image>", [open_image(path)])


def use_plan(seeds: Path) -> None:
    compressor = PrefixKV(plan=weights.read_plan(seeds / "plan.json"))
    model, processor = weights.load(seeds / "model")
    inputs = processor("<image>What?", [open_image(seeds / "picture.png")])
    model.generate(**inputs, max_new_tokens=3, compressor=compressor)


def use_data(seeds: Path) -> None:
    quality.read_samples(seeds / "data.json", seeds, 10)


def use_arguments(rng: random.Random, seeds: Path) -> None:
    """The demo with odd arguments."""
    values = ["0", "-1", "1", "0.5", "1.5", "nan", "inf", "1e400", "x", "", "99999999999", "\u00e9", "a" * 10**4]
    values += ["<image>" * 3, "word " * 2 * 10**5, str(seeds / "plan.json"), "/dev/zero", str(seeds)]
    arguments = ["--model", str(seeds / "model"), "--image", str(seeds / "picture.png"), "--max-new-tokens", "2"]
    names = ("--model", "--image", "--prompt", "--budget", "--max-new-tokens", "--temperature", "--top-p", "--top-k",
             "--seed", "--device", "--dtype", "--plan")  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 3))):
        arguments += [rng.choice(names), rng.choice(values)]
    code = demo.main(arguments + rng.choice(([], ["--json"])))
    assert code in (0, 2), f"exit code {code}"


TARGETS = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.model",
           "tokenizer_config.json", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
           "picture", "plan.json", "data.json", "arguments", "tiled/config.json", "tiled/tokenizer.json",
           "tiled/chat_template.jinja", "tiled/preprocessor_config.json", "original/config.json",
           "original/clip/config.json", "original/pytorch_model.bin")  # fmt: skip


def run_case(number: int, seed: int, pristine: Path, scratch: Path) -> tuple[str, str]:
    """Runs one case in `scratch`; returns its target, and "" if it ended well or what went wrong."""
    rng = random.Random(f"{seed} {number}")
    target = TARGETS[number % len(TARGETS)]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(pristine, scratch)
    use: Callable[[], None]
    if target == "arguments":
        use = lambda: use_arguments(rng, scratch)  # noqa: E731
    else:
        if target == "picture":
            path = scratch / f"picture.{rng.choice(('png', 'jpg', 'gif', 'bmp', 'webp', 'tiff'))}"
            use = lambda: use_picture(path)  # noqa: E731
        elif target == "plan.json":
            path, use = scratch / target, lambda: use_plan(scratch)
        elif target == "data.json":
            path, use = scratch / target, lambda: use_data(scratch)
        elif target.startswith("tiled/"):
            path, use = scratch / target, lambda: use_tiled(scratch)
        elif target.startswith("original/"):
            path, use = scratch / target, lambda: use_original(rng, scratch)
        else:
            path, use = scratch / "model" / target, lambda: use_model(scratch)
        as_json = path.suffix == ".json" and rng.random() < 0.8
        data = path.read_bytes()
        if path.name == "pytorch_model.bin" and rng.random() < 0.7:
            damage_tensors(rng, path)
        else:
            path.write_bytes(damage_json(rng, data) if as_json else damage_bytes(rng, data))
    before = sorted(scratch.rglob("*"))
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            use()
        outcome = "clean"
    except LlavaError as error:
        outcome = "error" if str(error).strip() and "\n" not in str(error) else f"no single sentence: {error!r}"
    except ValueError as error:  # prefixkv.py knows no LlavaError
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.endswith("prefixkv.py")
        outcome = "error" if ours else traceback.format_exc()
    except SystemExit as error:
        outcome = "error" if error.code == 2 else f"exit code {error.code}"
    except BaseException:
        outcome = traceback.format_exc()
    if time.monotonic() - started > SECONDS:
        outcome = f"took {time.monotonic() - started:.0f} s"
    if sorted(scratch.rglob("*")) != before:
        outcome = "wrote or removed a file"
    return target, outcome


def work(numbers: range, seed: int, pristine: Path, report: Path) -> None:
    """Runs cases in a process of its own, with limits; a line of JSON for each, and the number before it starts."""
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    with report.open("a") as file:
        for number in numbers:
            file.write(f"{number}\n")
            file.flush()
            signal.alarm(SECONDS + 1)
            outcome = run_case(number, seed, pristine, report.parent / f"case-{os.getpid()}")
            signal.alarm(0)
            file.write(json.dumps([number, *outcome]) + "\n")
            file.flush()


def fuzz(cases: range, seed: int, seconds: float, processes: int = 1) -> tuple[Counter[tuple[str, str]], list[Any]]:
    """Counts of (target, clean | error | failure), and the failures as [number, target, what happened]."""
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[Any] = []
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        make_seeds(folder / "seeds")
        blocks = [range(start, min(start + 120, cases.stop)) for start in range(cases.start, cases.stop, 120)]
        running: dict[Any, Path] = {}
        while (blocks and time.monotonic() < deadline) or running:
            while blocks and len(running) < processes and time.monotonic() < deadline:
                report = folder / f"report-{blocks[0].start}.jsonl"
                process = context.Process(target=work, args=(blocks.pop(0), seed, folder / "seeds", report))
                process.start()
                running[process] = report
            time.sleep(0.02)
            for process, report in list(running.items()):
                if process.is_alive():
                    continue
                del running[process]
                lines = report.read_text().splitlines()
                for line in lines:
                    if line.startswith("["):
                        number, target, outcome = json.loads(line)
                        kind = outcome if outcome in ("clean", "error") else "failure"
                        counts[target, kind] += 1
                        if kind == "failure":
                            failures.append([number, target, outcome])
                if process.exitcode:
                    number = int(lines[-1])
                    target = TARGETS[number % len(TARGETS)]
                    counts[target, "failure"] += 1
                    failures.append([number, target, f"the process ended with {process.exitcode}"])
    return counts, failures


def table(counts: Counter[tuple[str, str]]) -> str:
    """Markdown: how the cases ended, by what was damaged."""
    kinds = ("clean", "error", "failure")
    lines = ["| damaged | clean runs | clear errors | anything else |", "|---|---|---|---|"]
    for target in TARGETS:
        lines.append(f"| {target} | " + " | ".join(str(counts[target, kind]) for kind in kinds) + " |")
    totals = [sum(counts[target, kind] for target in TARGETS) for kind in kinds]
    return "\n".join([*lines, "| all | " + " | ".join(map(str, totals)) + " |"])


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if every case ended well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new block after this time")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this case again, and show what happens")
    parser.add_argument("--out", type=Path, help="file for the failures, as JSON")
    args = parser.parse_args(arguments)
    cases = range(args.cases) if args.only is None else range(args.only, args.only + 1)
    counts, failures = fuzz(cases, args.seed, args.seconds, args.processes)
    print(table(counts))
    for number, target, outcome in failures[:20]:
        print(f"\ncase {number}, {target}: {outcome}", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(failures, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command("bench.fuzz", main))
