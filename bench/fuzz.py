"""Hostile input: thousands of damaged files and odd values, each must end well: `python -m bench.fuzz`.

A case damages one file of two small checkpoints, a picture or a plan, or gives odd arguments, and does what a user
would do. It ends well if it runs clean or is refused in one sentence. All else is a failure: another exception, a
crash, more than 10 seconds of computing or 1 GB, a hang, a file written where none belongs. A case follows from its
seed and number.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

import demo
import weights
from bench.parity import GRIDS, random_model, save_original
from minillava import TINY
from minillava.checks import LlavaError
from minillava.command import run_command
from minillava.processor import open_image
from prefixkv import PrefixKV

SECONDS, MEMORY = 10, 1 << 30
ENDS = {0: "ran", 2: "were refused"}  # exit codes of a case's process; with any other it failed
TARGETS = (
    "hub/config.json", "hub/model.safetensors.index.json", "hub/model-00001-of-00002.safetensors",
    "hub/generation_config.json", "hub/tokenizer.json", "hub/tokenizer_config.json", "hub/chat_template.jinja",
    "hub/preprocessor_config.json", "original/config.json", "original/pytorch_model.bin", "original/tokenizer.model",
    "original/tokenizer_config.json", "original/added_tokens.json", "original/clip-vit-test/config.json",
    "original/clip-vit-test/preprocessor_config.json", "picture", "plan.json", "arguments",
)  # fmt: skip
SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_pad": True, "resample": 3}
CONTENTS: dict[str, Any] = {  # of the files that are neither made by others nor those of the embedded checkpoint
    "hub/chat_template.jinja": "{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}",
    "hub/preprocessor_config.json": {**SIZE, "image_grid_pinpoints": GRIDS},
    "original/added_tokens.json": {"<image>": 512},
    "original/clip-vit-test/preprocessor_config.json": SIZE,
    "plan.json": {"budget": 0.5, "ratios": [0.25, 0.75, 0.5, 0.5], "model": "model", "samples": 3},
}
PICTURES = tuple(f"picture.{kind}" for kind in ("png", "jpg", "gif", "bmp", "webp", "tiff"))

# ---------------------------------------------------------------- damages

WHOLE = (  # instead of a file; the last two claim to be pictures of 400,000 x 250,000 and of 2**31 - 1 x 2**31 - 1
    b"", b"null", b"[]", b"3", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{", b"{% include '/etc/passwd' %}",
    b"{{" + b"(" * 10**4, b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"{{ 'x' * 10**10 }}", b"{{ 1 / 0 }}",
    b"{{ messages.__class__.mro() }}",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\x06\x1a\x80\0\x03\xd0\x90\x08\x02\0\0\0\xc9\xa2\xc9\x0e\0\0\0\0IDAT",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0\x9b\xab\x9c1\0\0\0\0IDAT",
)  # fmt: skip
VALUES: tuple[Any, ...] = (  # instead of a value in JSON
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 10**6, 2**31, 2**63, 10**18, 10**400, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "../../../etc/passwd", "/dev/zero", "ß" * 3, [], [[]], {}, {"a": 1}, [1, 2, 3], "NaN",
    "llava", [-1],
)  # fmt: skip
TENSORS: tuple[Callable[[Any], Any], ...] = (  # instead of a tensor
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t[..., :1].clone(), lambda t: t.to("meta"), lambda t: t.to_sparse(),
    lambda t: t.long(), lambda t: t.to(torch.complex64), lambda t: t.double(), lambda t: t[:0], lambda t: {},
)  # fmt: skip
LENGTHS = tuple(number.to_bytes(8, "little") for number in (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1))
OPTIONS = ("--model", "--image", "--prompt", "--budget", "--max-new-tokens", "--temperature", "--top-p", "--top-k",
           "--seed", "--device", "--dtype", "--plan", "--method", "--kv-bits")  # fmt: skip
TEXTS = ("0", "-1", "1", "0.5", "1.5", "nan", "inf", "1e400", "x", "", "9" * 11, "é", "a" * 10**4, "<image>" * 3,
         "word " * 2 * 10**5, "/dev/zero", "/", "auto", "cover")  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (list or object, key) in a tree; of a long one, those of the first forty keys."""
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree if isinstance(tree, dict) else range(len(tree)))[:40]
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def damage(rng: random.Random, turn: int, path: Path) -> None:
    """Damages a file: all of it, values in JSON, which come in turn so that each is met, tensors, or bytes."""
    data, kind = path.read_bytes(), rng.random()
    if kind < (0.6 if path.suffix == ".jinja" else 0.1):
        data = rng.choice(WHOLE)
    elif kind < 0.8 and path.suffix == ".json":
        tree = json.loads(data)
        for number in range(rng.choice((1, 1, 2, 3))):
            found = places(tree)
            if not found:
                break
            node, key = found[(3 * turn + number) % len(found)]
            value = copy.deepcopy(rng.choice((node.pop(key), *VALUES)))
            if isinstance(node, list):
                node.insert(key, value)
            elif rng.random() < 0.8:
                node[rng.choice((key, key, key, "\x1b[2J\n"))] = value
        data = json.dumps(tree).encode()
    elif kind < 0.8 and path.suffix == ".bin":
        state = torch.load(path)
        for name in rng.sample(sorted(state), rng.choice((1, len(state), len(state)))):
            state[name] = TENSORS[turn % len(TENSORS)](state[name])
        return torch.save(state, path)
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(rng.choice((16, 64, 512, len(data) + 1)))  # headers are short and matter most
            piece = data[at : at + rng.choice((1, 1, 8, 40, len(data)))]
            new = rng.choice((b"", piece * 2, bytes(len(piece)), rng.randbytes(len(piece)), *LENGTHS))
            data = data[:at] + new + data[at + len(piece) :]
    path.write_bytes(data)


# ---------------------------------------------------------------- cases


def make_seeds(folder: Path) -> None:
    """A LLaVA-NeXT in shards, a LLaVA in the original layout with its weights as pickles, and all the rest."""
    words: dict[str, Any] = {"text": {"vocab_size": 576}, "image_token_index": 512}
    random_model("LLaVA-NeXT, Mistral", **words).save_pretrained(folder / "hub", max_shard_size="700KB")
    save_original(random_model("CLIP, Llama", **words), folder / "original", 512)
    for path in list(folder.glob("original/**/*.safetensors")):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    for name, content in CONTENTS.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in TARGETS:
        if "/tokenizer" in name:
            shutil.copy(TINY / Path(name).name, folder / name)
    for name in PICTURES:
        Image.linear_gradient("L").resize((12, 9)).convert("RGB").save(folder / name)


def use(rng: random.Random, folder: Path, name: str) -> int:
    """Does with the damaged file what a user would do with it; returns the exit code of a command, or 0."""
    model = str(folder / ("original" if name.startswith("original") else "hub"))
    picture = str(folder / (name if name in PICTURES else PICTURES[0]))
    ask = ["--model", model, "--image", picture, "--max-new-tokens", "2"]
    if name == "arguments":
        odd = [text for _ in range(rng.choice((1, 1, 2, 3))) for text in (rng.choice(OPTIONS), rng.choice(TEXTS))]
        return demo.main([*ask, *odd, *rng.choice(([], ["--json"]))])
    if "/" in name and rng.random() < 0.5:
        convert = ["convert", model, str(folder / "new")]
        main, arguments = rng.choice(((demo.main, ask), (weights.main, ["inspect", model]), (weights.main, convert)))
        return main(arguments)
    loaded, processor = weights.load(model, dtype=None)
    inputs = processor(processor.chat([("What?", None)], 1), [open_image(picture)])
    compressor = PrefixKV(plan=weights.read_plan(folder / "plan.json"))
    processor.decode(loaded.generate(**inputs, max_new_tokens=3, compressor=compressor).token_ids)
    return 0


def run_case(number: int, seed: int, folder: Path) -> None:
    """Damages a file in `folder`, uses it, and ends the process: with a code in ENDS, or with a traceback."""
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # not those of the clock: other programs may run
    rng, turn, name = random.Random(f"{seed} {number}"), number // len(TARGETS), TARGETS[number % len(TARGETS)]
    if name == "picture":
        name = PICTURES[turn % len(PICTURES)]
    if name != "arguments":
        damage(rng, turn, folder / name)
    before = sorted(folder.rglob("*"))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = use(rng, folder, name)
    except ValueError as error:  # prefixkv.py knows no LlavaError
        ours = "prefixkv.py" in traceback.extract_tb(error.__traceback__)[-1].filename or isinstance(error, LlavaError)
        if not ours or len(str(error).splitlines()) != 1:
            raise
        code = 2
    if code == 0:
        shutil.rmtree(folder / "new", ignore_errors=True)  # what `convert` was asked for
    assert sorted(folder.rglob("*")) == before, "a file was written or removed"
    sys.exit({0: 0, 1: 2, 2: 2}[code])  # 1: `inspect` has found what does not fit


def fuzz(cases: Iterable[int], seed: int) -> Counter[str]:
    """How many cases ended how: with one of ENDS, or "failed", which stderr says more about."""
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        seeds, folder = Path(scratch, "seeds"), Path(scratch, "case")
        make_seeds(seeds)
        for number in cases:
            shutil.copytree(seeds, folder)
            process = multiprocessing.get_context("fork").Process(target=run_case, args=(number, seed, folder))
            process.start()
            process.join(12 * SECONDS)
            process.kill()
            process.join()
            shutil.rmtree(folder)
            ends[ENDS.get(process.exitcode or 0, "failed")] += 1
            if process.exitcode not in ENDS:
                target = TARGETS[number % len(TARGETS)]
                print(f"case {number}, {target}: its process ended with {process.exitcode}", file=sys.stderr)
    return ends


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if every case ended well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run one case again")
    args = parser.parse_args(arguments)
    ends = fuzz(range(args.cases) if args.only is None else [args.only], args.seed)
    print(", ".join(f"{ends[end]} {end}" for end in (*ENDS.values(), "failed")))
    return 1 if ends["failed"] else 0


if __name__ == "__main__":
    sys.exit(run_command("bench.fuzz", main))
