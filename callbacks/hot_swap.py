"""The running adapter of a training run, sent to a server between steps, as reinforcement learning needs it."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, read_tensors, write_json, write_tensors
from lightning_peft.files.writing import atomic_directory
from lightning_peft.formats.configuration import read_config
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.formats.serving import serving_copy
from lightning_peft.formats.serving.readers import rank_for
from lightning_peft.storage.saving import save_adapter

_ENDPOINTS = {"vllm": "/v1/{}_lora_adapter", "sglang": "/{}_lora_adapter"}
_GONE = (400, 404)
"""How servers answer that there is no such adapter to unload."""


def send_adapter(
    model: nn.Module, url: str, *, name: str, path: str | os.PathLike[str], server: str = "vllm", timeout: float = 60.0
) -> None:
    """Have a server load the running adapter of ``model`` in place of what it has under that name.

    The adapter alone is written to ``path``, as a copy that servers scale alike, and the server is told to load it from
    there: vLLM with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``, SGLang with ``--enable-lora``. If a
    model is in pieces on several processes, each of them has to call this; the first writes and sends.

    Args:
        model: A model with adapters of ``LoRA``, merged or not.
        url: Of the server, such as ``http://127.0.0.1:8000``.
        name: What the server is to call the adapter: requests name it as their model.
        path: A directory that the server reads too.
        server: ``vllm`` or ``sglang``.
        timeout: Seconds to wait for an answer.

    Raises:
        PEFTError: The adapter is no plain LoRA, the server is not known or not there, or it refuses.
    """
    if server not in _ENDPOINTS:
        raise PEFTError(f"server={server!r} was given; adapters are sent to {' or '.join(_ENDPOINTS)}.")
    place = Path(path).resolve()
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        # What the first process reads is its own: another one would replace it meanwhile.
        with TemporaryDirectory() as elsewhere:
            save_adapter(model, Path(elsewhere) / "trained")
        return
    save_adapter(model, place / "trained")
    config, tensors = read_config(place / "trained"), read_tensors(place / "trained" / TENSOR_FILE)
    rank = rank_for(server, config, {key: tuple(t.shape) for key, t in tensors.items()}, str(place / "trained"), None)
    config, tensors = serving_copy(config, tensors, str(place / "trained"), rank=rank)
    with atomic_directory(place / "served") as directory:
        write_tensors(directory / TENSOR_FILE, tensors)
        write_json(directory / CONFIG_FILE, config)
        write_json(directory / MARKER, {"version": 1, "exported": str(place / "trained")})
    endpoint = url.rstrip("/") + _ENDPOINTS[server]
    _post(endpoint.format("unload"), {"lora_name": name}, timeout, _GONE)
    _post(endpoint.format("load"), {"lora_name": name, "lora_path": str(place / "served")}, timeout)


class HotSwap(Callback):
    """Sends the running adapter to a server when training starts and after every so many steps.

    Args:
        url: Of the server; see :func:`send_adapter`.
        name: What the server is to call the adapter.
        path: A directory that the server reads too.
        server: ``vllm`` or ``sglang``.
        every_n_steps: After how many optimizer steps to send it again.
        timeout: Seconds to wait for an answer.
    """

    def __init__(
        self,
        url: str,
        name: str,
        path: str,
        server: str = "vllm",
        every_n_steps: int = 1,
        timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise PEFTError(f"HotSwap: every_n_steps={every_n_steps} was given; it is at least 1.")
        self._every, self._sent = every_n_steps, -1
        self._options: dict[str, Any] = {"name": name, "path": path, "server": server, "timeout": timeout}
        self._url = url

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send what training starts from: a server that is not there is noticed before the first step."""
        self._send(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Send the adapter if it has made enough steps."""
        if trainer.global_step != self._sent and trainer.global_step % self._every == 0:
            self._send(trainer, pl_module)

    def _send(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sent, reason = trainer.global_step, ""
        try:
            send_adapter(pl_module, self._url, **self._options)
        except PEFTError as error:
            reason = str(error)
        # The first process alone knows of the server; the others are not to wait for it.
        if reason := trainer.strategy.broadcast(reason):
            raise PEFTError(reason)


def _post(url: str, content: dict[str, str], timeout: float, taken: tuple[int, ...] = ()) -> None:
    """Post ``content`` as JSON; an answer with one of the codes ``taken`` is as good as none.

    Raises:
        PEFTError: The server is not there, or it refuses.
    """
    if not url.startswith(("http://", "https://")):
        raise PEFTError(f"{url!r} was given for a server; an address such as http://127.0.0.1:8000 was expected.")
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return
    except urllib.error.HTTPError as error:
        if error.code in taken:
            return
        said = error.read(500).decode(errors="replace").strip()
        raise PEFTError(
            f"{url} answered {error.code}: {said or error.reason}. vLLM takes adapters with --enable-lora and the "
            "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, SGLang with --enable-lora; the rank has to fit its largest."
        ) from error
    except OSError as error:  # urllib's own among them
        reason = getattr(error, "reason", error)
        raise PEFTError(f"{url} cannot be reached: {reason}. Start the server first, or mend url.") from error
