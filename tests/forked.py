"""Python programs in processes of their own, without the seconds that each needs to import torch and transformers.

A server imports the libraries once, and nothing of this project. `run` asks it to fork a child, which becomes the
program: its working directory, environment, `sys.argv` and `sys.path` are those of `python ARGUMENTS`. With
`run_together`, several run at once.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

OUTPUTS = ("stdout", "stderr")
FORKS = hasattr(os, "fork") and sys.platform != "darwin"  # macOS's libraries do not stand a fork


@functools.cache
def server() -> subprocess.Popen:
    """This process's server; it ends with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process that has threads cannot be forked
    environment.pop("PYTHONPATH", None)  # each child has one of its own
    made = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(made.communicate)  # it ends where its input does
    return made


def run(arguments, cwd, env=None, check=False):
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)`, without input."""
    (done,) = run_together([arguments], cwd, [dict(os.environ if env is None else env)])
    assert done.returncode == 0 or not check, done.stderr
    return done


def run_together(programs, cwd, environments):
    """Several programs at the same time; returns when all have ended, what `run` returns for each."""
    with tempfile.TemporaryDirectory() as folder:
        requests = []
        for number, (arguments, env) in enumerate(zip(programs, environments)):
            place = Path(folder, str(number))
            place.mkdir()
            arguments = [str(argument) for argument in arguments]
            requests.append({"arguments": arguments, "cwd": str(cwd), "env": env, "folder": str(place)})
        if FORKS:
            process = server()
            process.stdin.write(json.dumps(requests) + "\n")
            process.stdin.flush()
            codes = json.loads(process.stdout.readline())
        else:
            started = [start(**request) for request in requests]
            codes = [process.wait() for process in started]
        texts = [[Path(request["folder"], name).read_text("utf-8") for name in OUTPUTS] for request in requests]
    return [SimpleNamespace(returncode=code, stdout=out, stderr=err) for code, (out, err) in zip(codes, texts)]


def start(arguments, cwd, env, folder):
    """A process of its own, where there are no forks."""
    out, err = (open(Path(folder, name), "w") for name in OUTPUTS)  # noqa: SIM115
    with out, err:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def become(request) -> None:
    """What a child does: it runs `python -m NAME ...`, `python -c CODE ...` or `python FILE ...`."""
    import importlib
    import runpy
    import traceback

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        errors = "backslashreplace" if name == "stderr" else "strict"
        opened = open(descriptor, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    first, *rest = request["arguments"]
    script = first not in ("-m", "-c")
    # `python -m` takes the working directory's name when it starts, `python -c` the one at each import.
    sys.path[0] = os.path.dirname(os.path.realpath(first)) if script else os.getcwd() if first == "-m" else ""
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    importlib.invalidate_caches()
    code = 0
    try:
        if script:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
        elif first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


def main() -> None:
    import gc

    import hypothesis.strategies
    import numpy
    import PIL.Image
    import pytest
    import safetensors.torch
    import sentencepiece
    import torch
    import transformers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

    assert hypothesis and numpy and PIL and pytest and safetensors and sentencepiece and transformers
    assert CLIPVisionConfig and LlamaConfig and LlavaForConditionalGeneration
    torch.set_num_threads(1)
    gc.freeze()  # a child's collections need not look at what is here
    while line := sys.stdin.readline():
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                become(request)
            children.append(child)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


if __name__ == "__main__":
    main()
