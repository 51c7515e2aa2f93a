"""Keys of HF PEFT's configurations: what is not known is named, and what would change the outputs is refused."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from families import build
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from strangers import unsealed

from lightning_peft import AdaLoRA, DoRA, LoHa, LoRA, PEFTError, PEFTMethod, VeRA, inject, load_adapter, save_adapter
from lightning_peft.core.view import ModelView
from lightning_peft.formats import counterpart
from lightning_peft.formats.counterpart import UNSAID, Counterpart
from lightning_peft.formats.hf import read_content
from lightning_peft.formats.keys import COMMON


@pytest.mark.parametrize("of", counterpart._COUNTERPARTS, ids=lambda of: type(of).__name__)
def test_every_key_of_hf_peft_is_read_or_refused(of: Counterpart) -> None:
    """A key that a newer release of HF PEFT has is to be looked at."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[of.peft_type]]
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert fields.keys() <= COMMON | of.keys | of.plain.keys()
    # What HF PEFT writes where nothing was asked for is never refused.
    for key in fields.keys() & of.plain.keys():
        default = fields[key] if fields[key] is not dataclasses.MISSING else {}
        assert default in of.plain[key], key


def written(path: Path, method: PEFTMethod, **keys: Any) -> Path:
    model, _ = build("llama")
    inject(model, method)
    save_adapter(model, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return unsealed(path)


REFUSED: dict[str, tuple[PEFTMethod, dict[str, Any]]] = {
    "DoRA": (DoRA(r=2), {"alora_invocation_tokens": [3]}),
    "QALoRA": (LoRA(r=2), {"use_qalora": True}),
    "layers twice": (LoRA(r=2), {"layer_replication": [[0, 2], [1, 2]]}),
    "AdaLoRA": (AdaLoRA(init_r=2, target_r=1), {"use_rslora": True}),
    "LoHa": (LoHa(r=2), {"rank_pattern": {"q_proj": 1}}),
    "VeRA": (VeRA(r=2), {"bias": "all"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_outputs_is_refused(name: str, tmp_path: Path) -> None:
    method, keys = REFUSED[name]
    path = written(tmp_path / "a", method, **keys)
    model, _ = build("llama")
    with pytest.raises(PEFTError, match=f"uses {next(iter(keys))}=.* has not here"):
        load_adapter(model, path)
    assert not ModelView(model).slots


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a", LoRA(r=2), use_newest="yes", not_asked_for=None, off=False)
    with pytest.warns(UserWarning, match="says use_newest='yes', which is not known here") as caught:
        load_adapter(build("llama")[0], path)
    assert "off" not in str(caught[0].message)


def test_nothing_is_said_of_what_hf_peft_writes(tmp_path: Path) -> None:
    model, _ = build("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(build("llama")[0], tmp_path)


def test_what_this_package_says_beside_is_known() -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], UNSAID: {"init": "pissa"}}
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {name.format(i, k): (4, 32) if k == "A" else (32, 4) for i in range(2) for k in "AB"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_content(ModelView(build("llama")[0]), config, shapes, "a file")
