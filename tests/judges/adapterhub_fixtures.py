"""Writes ``data/adapterhub.safetensors``: what AdapterHub's package computes, for adapterhub.py.

Beside it, in ``data/adapterhub_files.json``, is what stands in the directories that it saves: configurations and names.
Of prefix tuning the same is in ``data/adapterhub_prefixes.safetensors``, with attn_implementation="eager": with "sdpa",
its default, the package masks the prefix, or the text, wrongly.
With directories for arguments, which `lightning-peft export --for adapterhub` has written for the models of the first
file (named FAMILY-CASE), it loads these, and prints how far what they compute is from the first file.

Runs in an environment of its own, since that package wants an older transformers:
``pip install adapters==1.3.0 transformers==4.57.6 torch safetensors``, then
``python tests/judges/adapterhub_fixtures.py``.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import adapters
import torch
import transformers as t
from adapters import (
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path(__file__).parent / "data" / "adapterhub.safetensors"
SAVED = FILE.with_name("adapterhub_files.json")
PREFIXES = FILE.with_name("adapterhub_prefixes.safetensors")
SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
# adapterhub.py builds the same models with the same arguments.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**SMALL, "max_position_embeddings": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20, "vocab_size": 11}
             | {"n_positions": 8}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_ff": 20, "num_layers": 1, "num_heads": 2}
           | {"d_kv": 8, "vocab_size": 11, "decoder_start_token_id": 0}),
}  # fmt: skip


def configs(family: str) -> dict[str, adapters.BnConfig]:
    """The package's configurations, with its defaults for what is not given."""
    cross = {"cross_adapter": family == "t5"}
    found = {
        "houlsby": DoubleSeqBnConfig(reduction_factor=4, scaling=0.5, **cross),
        "pfeiffer": SeqBnConfig(reduction_factor=4),
        "compacter": CompacterConfig(reduction_factor=2, **cross),
        # Its default is Pfeiffer's placement. The method's authors put the adapter before the residual connection.
        "compacter++": CompacterPlusPlusConfig(reduction_factor=2, original_ln_before=False),
    }
    # In models that normalise before a block it reads the hidden state before the norm: see adapterhub.py.
    return {**found, "parallel": ParBnConfig(reduction_factor=4)} if family == "bert" else found


PREFIX_CASES = {
    "prefix": PrefixTuningConfig(prefix_length=3, flat=True),
    "prefix of an mlp": PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
}


def draw(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Give parameters values that float32 has, so that the file can be half as large."""
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) * 0.3)


def build(family: str, **attention: str) -> nn.Module:
    name, config, options = MODELS[family]
    options = {**options, **attention}
    model: nn.Module = getattr(t, name)(getattr(t, config)(**options)).double().eval()
    return model


def norms(model: nn.Module) -> dict[str, Tensor]:
    kinds = {n for n, m in model.named_modules() if type(m).__name__.endswith("Norm")}
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in kinds}


def compute(model: nn.Module, family: str, case: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the test needs of one configuration."""
    adapters.init(model)
    model.add_adapter("a", config=configs(family)[case])
    model.train_adapter("a")
    model.double().eval()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and (".a." in n)}
    assert own
    draw(model, own)
    judged = {**own, **norms(model)}
    for parameter in judged.values():
        parameter.requires_grad_(True)
    # T5's softmax was one of float32 then; it is not any more.
    as_it_is = mock.patch.object(torch.Tensor, "float", lambda tensor: tensor)
    with as_it_is if family == "t5" else nullcontext():
        logits = model(**inputs).logits
    logits.square().sum().backward()
    return {
        "logits": logits.detach(),
        **{f"adapter/{n}": p.detach().float() for n, p in own.items()},
        **{f"gradient/{n}": p.grad for n, p in judged.items()},
    }


def saved(family: str, case: str) -> dict[str, Any]:
    """What the package writes beside an adapter, and the names of its tensors."""
    model = build(family)
    adapters.init(model)
    model.add_adapter("a", config=configs(family)[case])
    with TemporaryDirectory() as directory:
        model.save_adapter(directory, "a", with_head=False)
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        names = list(torch.load(Path(directory) / "pytorch_adapter.bin", weights_only=True))
    return {"config": config, "names": names}


def prefixes() -> None:
    """Write what the package computes and saves with prefixes, beside the models of the first file."""
    bases, content, files = load_file(FILE), {}, json.loads(SAVED.read_text())
    torch.manual_seed(0)
    for family in ("gpt2", "llama"):
        for case, config in PREFIX_CASES.items():
            model = build(family, attn_implementation="eager")
            start = f"{family}/base/"
            model.load_state_dict(
                {n.removeprefix(start): v for n, v in bases.items() if n.startswith(start)}, strict=False
            )
            model.tie_weights()
            adapters.init(model)
            model.add_adapter("a", config=config)
            model.set_active_adapters("a")
            model.double().eval()
            draw(model, {n: p for n, p in model.named_parameters() if ".a." in n})
            logits = model(input_ids=bases[f"{family}/input/input_ids"]).logits
            with TemporaryDirectory() as directory:
                model.float().save_adapter(directory, "a", with_head=False)
                tensors = torch.load(Path(directory) / "pytorch_adapter.bin", weights_only=True)
                said = json.loads((Path(directory) / "adapter_config.json").read_text())
            files[f"{family}/{case}"] = {"config": said, "names": list(tensors)}
            content[f"{family}/{case}/logits"] = logits.detach()
            content |= {f"{family}/{case}/adapter/{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(content, PREFIXES)
    SAVED.write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")


def difference(directory: Path) -> float:
    """How far what an adapter that was written elsewhere computes is from what this package's computed."""
    family, case = directory.name.split("-", 1)
    content = load_file(FILE) | load_file(PREFIXES)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): v for name, v in content.items() if name.startswith(prefix)}

    model = build(family, **({"attn_implementation": "eager"} if case in PREFIX_CASES else {}))
    model.load_state_dict(under(f"{family}/base/"), strict=False)
    model.tie_weights()
    adapters.init(model)
    model.load_adapter(str(directory), set_active=True, use_safetensors=True)
    as_it_is = mock.patch.object(torch.Tensor, "float", lambda tensor: tensor)
    with as_it_is if family == "t5" else nullcontext():
        logits = model.double().eval()(**under(f"{family}/input/")).logits
    return float((logits - content[f"{family}/{case}/logits"]).abs().max())


def main() -> None:
    if sys.argv[1:]:
        for argument in sys.argv[1:]:
            print(argument, difference(Path(argument)))
        return
    found = {f"{family}/{case}": saved(family, case) for family in MODELS for case in configs(family)}
    SAVED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    torch.manual_seed(0)
    content: dict[str, Tensor] = {}
    for family in MODELS:
        model = build(family)
        draw(model, dict(model.named_parameters()))
        base = {n: p.detach() for n, p in model.named_parameters()}
        inputs = {"input_ids": torch.randint(11, (2, 4))}
        if family == "t5":
            inputs["decoder_input_ids"] = torch.randint(11, (2, 3))
        content |= {f"{family}/base/{n}": p.float() for n, p in base.items()}
        content |= {f"{family}/input/{n}": ids for n, ids in inputs.items()}
        for case in configs(family):
            fresh = build(family)
            fresh.load_state_dict(base, strict=False)
            fresh.tie_weights()
            content |= {f"{family}/{case}/{n}": v for n, v in compute(fresh, family, case, inputs).items()}
    versions = {"adapters": adapters.__version__, "transformers": t.__version__}
    save_file({n: v.contiguous() for n, v in content.items()}, FILE, metadata=versions)
    print(FILE, FILE.stat().st_size, "bytes")
    prefixes()


if __name__ == "__main__":
    main()
