"""A server of adapters on loopback: it keeps what it is told, and what it finds at the path that it is told."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


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


@contextmanager
def serving() -> Iterator[Server]:
    """Run one, in a thread."""
    found = Server()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"
