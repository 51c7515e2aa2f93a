"""What hooks make of a checkpoint's state, and what else in it follows."""

from typing import Any

import torch
from torch import Tensor

from lightning_peft.storage.after_hooks import follow


def followed(state: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    injection = {"adapters": {}, "active": "", "train_also": [*read], "base": {}}
    checkpoint = {"state_dict": dict(state), "lightning_peft": {"injections": {"": injection}}}
    follow(checkpoint, read)
    return checkpoint


def names(checkpoint: dict[str, Any]) -> list[str]:
    listed: list[str] = checkpoint["lightning_peft"]["injections"][""]["train_also"]
    return listed


A, B = "net.a.peft.default.lora_A", "net.b.weight"
TENSORS: dict[str, Tensor] = {A: torch.ones(1), B: torch.zeros(1)}


def test_an_adapter_that_was_taken_out_is_put_back() -> None:
    assert followed({B: TENSORS[B]}, TENSORS)["state_dict"] == TENSORS


def test_what_else_was_taken_out_is_not() -> None:
    assert followed({A: TENSORS[A]}, TENSORS)["state_dict"] == {A: TENSORS[A]}


def test_a_value_that_was_changed_is_not() -> None:
    changed = {**TENSORS, A: torch.full((1,), 3.0)}
    assert followed(changed, TENSORS)["state_dict"] == changed


def test_names_follow_by_the_part_that_has_another_one() -> None:
    new = {name.replace("net.", "body.inner."): tensor for name, tensor in TENSORS.items()}
    checkpoint = followed(new, TENSORS)
    assert checkpoint["state_dict"] == new
    assert names(checkpoint) == [*new]


def test_the_state_of_optimizers_follows_and_what_is_no_parameter_s_stays() -> None:
    injection = {"adapters": {}, "active": "", "train_also": [], "base": {}}
    groups = [{"params": [A], "param_names": [A], "lr": 0.1}]
    optimizers = [{"state": {A: {"step": 1}, 7: {"own": 2}}, "param_groups": groups}, {"wrapped": 3}]
    new = {name.replace("net.", "body."): tensor for name, tensor in TENSORS.items()}
    checkpoint = {"state_dict": new, "lightning_peft": {"injections": {"": injection}}, "optimizer_states": optimizers}
    follow(checkpoint, TENSORS)
    name = A.replace("net", "body")
    groups = [{"params": [name], "param_names": [name], "lr": 0.1}]
    expected = [{"state": {name: {"step": 1}, 7: {"own": 2}}, "param_groups": groups}, {"wrapped": 3}]
    assert checkpoint["optimizer_states"] == expected


def test_one_part_of_two_may_be_renamed() -> None:
    new = {A.replace("net.a", "net.first"): TENSORS[A], B: TENSORS[B]}
    assert names(followed(new, TENSORS)) == [*new]


def test_an_adapter_that_was_taken_out_is_put_back_under_the_new_name() -> None:
    more = {**TENSORS, "net.a.bias": torch.ones(1)}
    new = {"body.a.bias": more["net.a.bias"], "body.b.weight": more[B]}
    assert followed(new, more)["state_dict"] == {A.replace("net", "body"): more[A], **new}


def test_one_object_in_two_places_is_not_renamed() -> None:
    tied = {A: TENSORS[A], "net.c.peft.default.lora_A": TENSORS[A], "net.a.count": 0, "net.b.count": 0}
    state = {name: value for name, value in tied.items() if "a" not in name.split(".")}
    checkpoint = followed(state, tied)
    assert checkpoint["state_dict"] == {A: TENSORS[A], **state}
    assert names(checkpoint) == [*tied]
