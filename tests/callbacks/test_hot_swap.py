"""The adapter of a run on a server: a fake one on loopback keeps what it is told, and what it finds at the path."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import Server, serving, url
from modules import Regression, loader, trainer

from lightning_peft import DoRA, LoRA, PEFTError, PEFTStrategy, inject
from lightning_peft.callbacks import HotSwap, send_adapter


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


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
