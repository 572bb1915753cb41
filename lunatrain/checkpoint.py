"""Checkpoints: whole or absent, checksummed, weights only.

A checkpoint is the zip file that torch.save makes, with the SHA-256 of its bytes as the zip's comment. So it is one
file, torch.load opens it as it is, and a changed bit is found before anything is believed.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lunatrain.errors import CheckpointError

FORMAT = "lunatrain-checkpoint"
VERSION = 1
LAST, BEST = "last.pt", "best.pt"
_NO_COMMENT = b"\x00\x00"
_HASH_BYTES = 64
_AVERAGED = "module."
"""What torch puts before the names of averaged weights."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read, and where it came from."""

    path: Path
    state: dict[str, Any]
    fault: str | None = None
    """Why it is not the newest one of its run."""

    @property
    def weights(self) -> dict[str, Any]:
        """Those that were validated: averaged ones where there are any, else those of the last step."""
        averaged = self.state.get("averaged")
        if averaged is None:
            return dict(self.state["model"])
        return {name.removeprefix(_AVERAGED): value for name, value in averaged.items() if name.startswith(_AVERAGED)}


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it, rename it; the one before stays until then.

    Parameters
    ----------
    path : Path
        Final name.
    state : mapping
        Tensors, numbers, texts, lists and dictionaries of these.
    """
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT, "version": VERSION}, buffer)
    data = buffer.getvalue()
    assert data.endswith(_NO_COMMENT), "torch.save wrote a zip with a comment"
    body = data[: -len(_NO_COMMENT)]
    digest = hashlib.sha256(body).hexdigest().encode()
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(body + len(digest).to_bytes(2, "little") + digest)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Loaded:
    """Read and check a checkpoint; nothing in it is executed.

    Raises
    ------
    CheckpointError
        Not there, damaged, or no checkpoint of this project.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}. Name a run or a checkpoint that is there"
        raise CheckpointError(message) from error
    body, length, digest = data[: -_HASH_BYTES - 2], data[-_HASH_BYTES - 2 : -_HASH_BYTES], data[-_HASH_BYTES:]
    is_ours = len(body) > 0 and int.from_bytes(length, "little") == _HASH_BYTES
    if not is_ours or hashlib.sha256(body).hexdigest().encode() != digest:
        message = f"{path} is damaged or no checkpoint of lunatrain: its checksum does not match. Use another one"
        raise CheckpointError(message)
    try:
        state = torch.load(io.BytesIO(body + _NO_COMMENT), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that is wrong but signed can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        message = f"{path} cannot be loaded: {reason}. Use another one"
        raise CheckpointError(message) from error
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        message = f"{path} is no checkpoint of format {VERSION}; use the lunatrain that made it"
        raise CheckpointError(message)
    return Loaded(path, state)


def load_newest(run: Path) -> Loaded | None:
    """The last good checkpoint of a run, with what is wrong with a later one; None where there is none.

    Raises
    ------
    CheckpointError
        There are some, and all are damaged.
    """
    faults: list[CheckpointError] = []
    for name in (LAST, BEST):
        if (run / name).exists():
            try:
                return replace(load_checkpoint(run / name), fault=str(faults[0]) if faults else None)
            except CheckpointError as error:
                faults.append(error)
    if faults:
        raise faults[0]
    return None
