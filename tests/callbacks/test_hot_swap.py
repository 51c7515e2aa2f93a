"""The adapter of a run on a server: a fake one on loopback keeps what it is told, and what it finds at the path."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Regression, loader, trainer
from safetensors.torch import load_file

from lightning_peft import DoRA, LoRA, PEFTError, PEFTStrategy, inject
from lightning_peft.callbacks import HotSwap, send_adapter


class Server(HTTPServer):
    """As vLLM and SGLang: an adapter is loaded once under a name, and unloaded if it is there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.configs: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.refuses = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append(self.path)
        name, loaded = content["lora_name"], self.server.loaded
        if self.path.endswith("/unload_lora_adapter"):
            self.answer(200 if loaded.pop(name, None) else 404, "unloaded")
        elif self.server.refuses or name in loaded:
            self.answer(400, "LoRA rank 8 is greater than max_lora_rank 4.")
        else:
            folder = Path(content["lora_path"])
            loaded[name] = load_file(folder / "adapter_model.safetensors")
            self.server.configs.append(json.loads((folder / "adapter_config.json").read_text()))
            self.answer(200, "loaded")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(("kind", "lead"), [("vllm", "/v1/"), ("sglang", "/")])
def test_a_run_sends_what_it_has_learnt(kind: str, lead: str, server: Server, tmp_path: Path) -> None:
    module = Regression()
    swap = HotSwap(url(server), "policy", str(tmp_path / "adapter"), server=kind, every_n_steps=2)
    strategy = PEFTStrategy(LoRA(r=2, alpha=6), merge_on_train_end=False)
    run = trainer(tmp_path, strategy, callbacks=[swap], max_steps=5)
    run.fit(module, loader())
    names = [f"{lead}{word}_lora_adapter" for word in ("unload", "load")]
    assert server.calls == names * 3  # at the start, after steps 2 and 4
    assert len({str(config) for config in server.configs}) == 1
    config, tensors = server.configs[-1], server.loaded["policy"]
    assert (config["r"], config["lora_alpha"]) == ((8, 8) if kind == "vllm" else (2, 2))
    send_adapter(module, url(server), name="policy", path=tmp_path / "adapter", server=kind)
    last = server.loaded["policy"]
    assert any(not torch.equal(last[name], tensor) for name, tensor in tensors.items())  # step 5 is in it
    adapter: Any = module.net[0].peft.default
    a, b = (next(t for n, t in last.items() if f".0.lora_{letter}" in n) for letter in "AB")
    assert (b @ a - 3 * adapter.lora_B @ adapter.lora_A).abs().max() <= 1e-6


def test_a_server_that_refuses_or_is_not_there(server: Server, tmp_path: Path) -> None:
    model = Regression()
    inject(model, LoRA(r=2))
    send = {"name": "policy", "path": tmp_path / "adapter"}
    server.refuses = True
    with pytest.raises(PEFTError, match=r"answered 400: LoRA rank 8 is greater than max_lora_rank 4.*--enable-lora"):
        send_adapter(model, url(server), **send)  # type: ignore[arg-type]
    with pytest.raises(PEFTError, match=r"cannot be reached: .*refused.*Start the server first"):
        send_adapter(model, "http://127.0.0.1:9", **send)  # type: ignore[arg-type]
    with pytest.raises(PEFTError, match=r"an address such as http"):
        send_adapter(model, "localhost:8000", **send)  # type: ignore[arg-type]
    with pytest.raises(PEFTError, match=r"server='triton' was given; adapters are sent to vllm or sglang"):
        send_adapter(model, url(server), server="triton", **send)  # type: ignore[arg-type]


def test_a_run_ends_before_its_first_step_if_nobody_serves_it(server: Server, tmp_path: Path) -> None:
    for method, address, message in (
        (LoRA(r=2), "http://127.0.0.1:9", "cannot be reached"),
        (DoRA(r=2), url(server), "use_dora"),
    ):
        swap = HotSwap(address, "policy", str(tmp_path / "adapter"))
        run = trainer(tmp_path, PEFTStrategy(method), callbacks=[swap])
        with pytest.raises(PEFTError, match=message):
            run.fit(Regression(), loader())
        assert run.global_step == 0
    assert not server.calls
