"""Files: the folder of a checkpoint, as given or downloaded; files written whole or not at all; free memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from minillava.checks import LlavaError

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # no pickles, nothing executable
PICKLES = ["*.bin", *DOWNLOADED[1:]]  # for repositories that have nothing else; read as plain tensors


def find(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: as given, or downloaded from the Hub (and kept in its cache)."""
    name = str(path_or_id)
    if os.path.isdir(name):  # unlike Path.is_dir, no error for a name that is too long for any file
        return Path(name)
    if os.path.exists(name):
        raise LlavaError(f"{name} is a file; expected the folder of a checkpoint, or a Hub id.")
    if not re.fullmatch(HUB_ID, name):
        raise LlavaError(f"There is no folder {name:.200}, and it is not a Hub id such as llava-hf/llava-1.5-7b-hf.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=PICKLES))
        return folder
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LlavaError(
            f"There is no folder {name}, and the Hub could not give a checkpoint of that name ({reason}). "
            "Check the id and the network, or download it and pass the folder."
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new name beside `path`. What is written there takes the place of `path`, or goes if that fails."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes) -> None:
    """Writes a file, whole or not at all; raises LlavaError where that cannot be done. A link is followed."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise LlavaError(f"{path:.200} is no file that can be written; choose another place.")
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise LlavaError(f"{path!s:.200} cannot be written ({error.strerror}); choose another place.") from None


def write_json(path: Path, value: object) -> None:
    """Writes JSON, whole or not at all."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def free_memory() -> int | None:
    """Bytes that a program may take without the system swapping; None where Linux' /proc is not there."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
