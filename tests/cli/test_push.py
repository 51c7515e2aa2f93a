"""Model cards, which huggingface_hub reads, and ``push``, to a fake hub on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from families import build
from huggingface_hub import ModelCard

from lightning_peft import LoRA, PEFTError, SeriesAdapter, inject, save_adapter
from lightning_peft.cli.tools.push import push


def saved(path: Path, method: Any, **options: Any) -> Path:
    model = build("llama")[0]
    model.config._name_or_path = "someone/small-llama"
    inject(model, method)
    save_adapter(model, path, **options)
    return path


def test_a_card_says_what_a_hub_wants_to_know(tmp_path: Path) -> None:
    given = {"data": "my/questions", "metrics": {"accuracy": 0.93}}
    path = saved(tmp_path / "adapter", LoRA(r=4, target_modules=["q_proj"]), card=given)
    card = ModelCard.load(path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/small-llama")
    assert (card.data.pipeline_tag, card.data.datasets) == ("text-generation", ["my/questions"])
    for said in ("| r | 4 |", "| accuracy | 0.93 |", "| target_modules | ", "in 4 tensors", "lightning_peft 0."):
        assert said in card.text
    own = saved(tmp_path / "own", SeriesAdapter(bottleneck=4), card=True)
    assert ModelCard.load(own / "README.md").data.library_name == "lightning_peft"
    assert not (saved(tmp_path / "plain", LoRA(r=4)) / "README.md").exists()
    with pytest.raises(PEFTError, match="A card was given 'licence'; it takes 'data' and 'metrics'"):
        saved(tmp_path / "other", LoRA(r=4), card={"licence": "mit"})
    assert not (tmp_path / "other").exists()


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if type(self).refuses:
            self.answer({"error": "no such user"}, 401)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/{made['organization']}/{made['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/someone/adapter/commit/{'a' * 40}", "commitOid": "a" * 40}
            )

    def do_GET(self) -> None:
        self.answer({"id": "someone/adapter", "sha": "b" * 40, "siblings": [], "tags": [], "private": False})

    def answer(self, content: Any, code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    Hub.files, Hub.refuses = {}, False
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_sent(hub: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter", LoRA(r=4, target_modules=["q_proj"]))
    (path / "trainer_state.ckpt").write_bytes(b"of the run")
    push(str(path), "someone/adapter", endpoint=hub)
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lightning_peft.json"}
    assert Hub.files.keys() == expected
    for name in expected - {"README.md"}:
        assert Hub.files[name] == (path / name).read_bytes()
    assert b'library_name: "peft"' in Hub.files["README.md"]


def test_a_hub_that_refuses_or_is_not_there(hub: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter", LoRA(r=4, target_modules=["q_proj"]))
    Hub.refuses = True
    with pytest.raises(PEFTError, match=r"was not sent to 'someone/adapter' at .*Log in with `hf auth login`"):
        push(str(path), "someone/adapter", endpoint=hub)
    with pytest.raises(PEFTError, match=r"was not sent to 'some one' at"):
        push(str(path), "some one", endpoint=hub)
    with pytest.raises(PEFTError, match=r"was not sent to 'someone/adapter' at http://127.0.0.1:9"):
        push(str(path), "someone/adapter", endpoint="http://127.0.0.1:9")
    with pytest.raises(PEFTError, match="does not exist"):
        push(str(tmp_path / "nothing"), "someone/adapter", endpoint=hub)
