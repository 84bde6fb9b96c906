import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from apportion.train.checkpoint import flatten_state, random_state, restore_state, set_random_state


def through_files(state: Any, folder: Path) -> Any:
    tensors, tree = flatten_state(state)
    save_file(tensors, folder / "state.safetensors")
    return restore_state(load_file(folder / "state.safetensors"), json.loads(json.dumps(tree, allow_nan=False)))


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[1].parameters(), "lr": 3e-3, "betas": (0.8, 0.95)},
    ]
    foreach = {"foreach": True, "single": False}.get(kind)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=foreach, amsgrad=kind == "amsgrad")
    if kind == "momentum":
        optimizer = torch.optim.SGD(groups[0]["params"], lr=0.1, momentum=0.9)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [3])


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 5, dtype=next(model.parameters()).dtype)
        model(inputs).square().sum().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["foreach", "single", "amsgrad", "bfloat16", "momentum"])
def test_an_optimizer_restored_from_files_continues_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = build(kind)
    train(model, optimizer, scheduler, 5)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state()}
    restored = through_files(state, tmp_path)
    assert same(state, restored)
    train(model, optimizer, scheduler, 5)

    again, second, schedule = build(kind)
    again.load_state_dict(weights)
    second.load_state_dict(restored["optimizer"])
    schedule.load_state_dict(restored["scheduler"])
    set_random_state(restored["random"])
    train(again, second, schedule, 5)
    assert same(model.state_dict(), again.state_dict())
    assert same(optimizer.state_dict(), second.state_dict())


def test_the_step_of_adamw_stays_a_tensor_and_its_betas_a_tuple(tmp_path: Path) -> None:
    model, optimizer, scheduler = build("foreach")
    train(model, optimizer, scheduler, 2)
    restored = through_files(optimizer.state_dict(), tmp_path)
    assert isinstance(restored["state"][0]["step"], torch.Tensor)
    assert restored["state"][0]["step"].item() == 2.0
    assert restored["param_groups"][1]["betas"] == (0.8, 0.95)


def test_a_scheduler_of_a_lambda_is_kept(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    assert same(scheduler.state_dict(), through_files(scheduler.state_dict(), tmp_path))


def test_every_generator_continues_with_the_numbers_it_would_have_drawn(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, list[float], list[float]]:
        return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist(), torch.rand(3, generator=own).tolist()

    own = torch.Generator().manual_seed(5)
    draw()
    state = through_files({"global": random_state(), "own": own.get_state()}, tmp_path)
    expected = draw()
    draw()
    set_random_state(state["global"])
    own.set_state(state["own"])
    assert draw() == expected


def test_a_state_from_another_number_of_devices_is_refused() -> None:
    state = random_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    with pytest.raises(ValueError, match="the checkpoint was written with"):
        set_random_state(state)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())


@given(
    st.recursive(
        leaves,
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
        max_leaves=12,
    )
)
def test_whatever_is_nested_comes_back_with_its_types(state: object) -> None:
    tensors, tree = flatten_state(state)
    assert same(restore_state(tensors, json.loads(json.dumps(tree, allow_nan=False))), state)


def test_negative_zero_nan_and_the_smallest_float_survive() -> None:
    _, tree = flatten_state([-0.0, math.nan, math.inf, 5e-324])
    zero, nan, infinity, smallest = restore_state({}, json.loads(json.dumps(tree, allow_nan=False)))
    assert math.copysign(1, zero) == -1
    assert math.isnan(nan)
    assert (infinity, smallest) == (math.inf, 5e-324)


def test_tensors_that_share_memory_are_saved_and_training_writes_into_none_of_them(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    tensors, tree = flatten_state({"whole": whole, "tied": whole, "turned": whole.T, "row": whole[1]})
    whole.zero_()
    save_file(tensors, tmp_path / "t.safetensors")
    restored = restore_state(load_file(tmp_path / "t.safetensors"), tree)
    assert restored["tied"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert restored["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert restored["row"].tolist() == [3.0, 4.0, 5.0]


def test_what_cannot_be_saved_is_refused_with_its_place() -> None:
    with pytest.raises(TypeError, match="the state holds a function at '/hooks/0'"):
        flatten_state({"hooks": [lambda: None]})
    with pytest.raises(ValueError, match="two tensors of the state are both called '0'"):
        flatten_state({0: torch.zeros(1), "0": torch.zeros(1)})
