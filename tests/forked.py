"""Python programs in processes of their own, without the seconds that each needs to import torch and transformers.

A server imports the libraries once, and nothing of this project. `run` asks it to fork a child, which becomes the
program: its working directory, environment, `sys.argv` and `sys.path` are those of `python ARGUMENTS`.
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

FORKS = hasattr(os, "fork") and sys.platform != "darwin"  # macOS's libraries do not stand a fork


@functools.cache
def server() -> subprocess.Popen:
    """This process's server; it ends with it."""
    made = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(made.kill)
    return made


def run(arguments, cwd, env=None, check=False):
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)`."""
    arguments, env = [str(argument) for argument in arguments], dict(os.environ if env is None else env)
    if not FORKS:
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=env, check=check, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as folder:
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "folder": folder}
        process = server()
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    assert code == 0 or not check, err
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def become(request) -> None:
    """What a child does: it runs `python -m NAME ...`, `python -c CODE ...` or `python FILE ...`."""
    import importlib
    import runpy
    import traceback

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        setattr(sys, name, open(descriptor, "w", encoding=encoding, closefd=False))  # noqa: SIM115
    first, *rest = request["arguments"]
    script = first not in ("-m", "-c")
    sys.path[0] = os.path.dirname(os.path.abspath(first)) if script else request["cwd"]
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    importlib.invalidate_caches()
    sys.argv = [first, *rest] if script else rest
    code = 0
    try:
        if script:
            runpy.run_path(first, run_name="__main__")
        elif first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import numpy
    import PIL.Image
    import pytest
    import safetensors.torch
    import sentencepiece
    import torch
    import transformers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

    assert numpy and PIL and pytest and safetensors and sentencepiece and transformers
    assert CLIPVisionConfig and LlamaConfig and LlavaForConditionalGeneration
    torch.set_num_threads(1)  # with threads of its own, a process cannot be forked
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
