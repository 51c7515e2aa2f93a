"""Prints how far every method is from each judge, the matrix of methods and families, and lines of code by method.

``PYTHONPATH=tests python tests/judges/judges.py``.

The judges are HF PEFT, what AdapterHub's package computed (``adapterhub_fixtures.py``), and
the papers' equations.
"""

import inspect
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import test_adapterhub
import test_bottleneck
import test_deltas
import test_hf_parity
import test_methods
import test_virtual_tokens
import torch
from families import ALL_FAMILIES, build, outputs
from torch import Tensor, nn

from lightning_peft import IA3, LayerNormTuning, LoRA, PEFTMethod, inject, save_adapter

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Row = tuple[float, float, float]
"""Largest differences: of logits in float64, of gradients in float64 (relative), of logits in float32 (relative)."""


def of_peft() -> dict[str, list[tuple[str, PEFTMethod]]]:
    """Every method that HF PEFT has, with the families on which the tests compare it."""
    targets = test_deltas.TARGETS
    found: dict[str, list[tuple[str, PEFTMethod]]] = {
        "lora": [
            (family, LoRA(r=4, alpha=12, target_modules=targets[family])) for family in targets if targets[family]
        ],
        "ia3": [(family, IA3()) for family in test_hf_parity.IA3_TARGETS],
        "layer_norm_tuning": [(family, LayerNormTuning()) for family in ("llama", "gpt2", "bert")],
    }
    for name, (ours, _, families) in test_deltas.METHODS.items():
        found.setdefault(name.split()[0], []).extend((family, ours(targets[family])) for family in families)
    for name, method in test_virtual_tokens.METHODS.items():
        found[name] = [(family, method) for family in test_virtual_tokens.FAMILIES]
    return found


def against_peft(family: str, method: PEFTMethod, dtype: torch.dtype, folder: Path) -> tuple[float, float]:
    """Give the differences of logits and gradients, both relative to the largest one, and to 1 if that is larger."""
    model, inputs = build(family.split()[0])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain = outputs(model.to(dtype), inputs)
    inject(model, method)
    test_deltas.shift(model)
    save_adapter(model, folder)
    ours = outputs(model, inputs)
    assert (ours - plain).abs().max() > 1e-6
    judge = _judge(family.split()[0], model, method, folder).to(dtype)
    theirs = outputs(judge, inputs)[:, -ours.shape[1] :] if ours.dim() == 3 else outputs(judge, inputs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    pairs = list(zip(_gradients(model), _gradients(judge), strict=True))
    assert pairs
    return _relative(ours, theirs), max(_relative(a, b) for a, b in pairs)


def _judge(family: str, model: nn.Module, method: PEFTMethod, folder: Path) -> nn.Module:
    if method in test_virtual_tokens.METHODS.values():
        judge: nn.Module = test_virtual_tokens.trainable_judge(family, folder, model).to(next(model.parameters()).dtype)
        (ours,), (theirs,) = ([p for p in m.parameters() if p.requires_grad] for m in (model, judge))
        theirs.data.copy_(ours.detach())
        return judge
    base = build(family)[0].to(next(model.parameters()).dtype)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False).eval()


def _gradients(model: nn.Module) -> list[Tensor]:
    """Values in order of size, of tensors in order of size: judges name and store them in other ways."""
    # HF PEFT makes the divisor of AdaLoRA's scale trainable.
    found = [p.grad for name, p in model.named_parameters() if p.grad is not None and "ranknum" not in name]
    return [g.flatten().sort()[0] for g in sorted(found, key=lambda g: (g.numel(), round(float(g.norm()), 4)))]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def peft_row(name: str) -> Row:
    found: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
    for family, method in of_peft()[name]:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                found[dtype].append(against_peft(family, method, DTYPES[dtype], Path(folder) / "adapter"))
    wide, narrow = found["float64"], found["float32"]
    return max(row[0] for row in wide), max(row[1] for row in wide), max(row[0] for row in narrow)


def adapterhub_row(case: str) -> Row:
    rows = [test_adapterhub.differences(family, name) for family, name in test_adapterhub.CASES if name == case]
    return max(r["logits"] for r in rows), max(r["gradients"] for r in rows), max(r["float32"] for r in rows)


def equation_row(name: str) -> Row:
    cases = [case for case in test_bottleneck.CASES if case.split()[0] == name]
    wide, narrow = ([test_bottleneck.differences(case, dtype) for case in cases] for dtype in DTYPES.values())
    return max(r["logits"] for r in wide), max(r["gradients"] for r in wide), max(r["logits"] for r in narrow)


def rows() -> Iterator[tuple[str, str, Row]]:
    for name in of_peft():
        yield name, f"HF PEFT {peft.__version__}", peft_row(name)
    for case in test_adapterhub.METHODS:
        yield case, "AdapterHub", adapterhub_row(case)
    for name in dict.fromkeys(case.split()[0] for case in test_bottleneck.CASES):
        yield name, "equation", equation_row(name)


def matrix() -> dict[str, tuple[int, Counter[str]]]:
    """By method: on how many families ``test_methods.py`` takes it through its whole life, and why not on others."""
    refused: dict[str, Counter[str]] = {name: Counter() for name in test_methods.METHODS}
    for (name, family), reason in test_methods.REFUSED.items():
        assert family in ALL_FAMILIES
        refused[name][reason] += 1
    return {name: (len(ALL_FAMILIES) - reasons.total(), reasons) for name, reasons in refused.items()}


def lines() -> dict[str, int]:
    """Lines of each method's file."""
    files = {name: Path(str(inspect.getsourcefile(cls))) for name, cls in test_methods.OURS.items()}
    return {name: len(file.read_text().splitlines()) for name, file in files.items()}


def main() -> None:
    head: tuple[Any, ...] = ("method", "judge", "float64 logits", "float64 gradients", "float32 logits")
    print("{:<20} {:<16} {:>15} {:>18} {:>15}".format(*head))
    for name, judge, row in rows():
        print(f"{name:<20} {judge:<16} {row[0]:>15.1e} {row[1]:>18.1e} {row[2]:>15.1e}", flush=True)
    counts = matrix()
    passed, refused = sum(p for p, _ in counts.values()), sum(r.total() for _, r in counts.values())
    print(f"\n{len(counts)} methods on {len(ALL_FAMILIES)} families: {passed} pass, {refused} are refused")
    for name, (count, reasons) in counts.items():
        print(f"{name:<32} {count:>3} pass  {'; '.join(f'{n} refused: {why}' for why, n in reasons.items())}".rstrip())
    print("\nlines of each method's file")
    for name, count in lines().items():
        print(f"{name:<20} {count:>4}")


if __name__ == "__main__":
    main()
