"""Replicas that train alone: pairs, the mean they keep, windows; two processes: tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.callbacks import LocalTrainCallback, gossip_pairs, mixing_matrix
from hf_ext.callbacks.local_train import fingerprint
from tests.callbacks.runs import build, equal, logged, parameters, tiny_model


@pytest.mark.parametrize("nodes", [2, 5, 8])
def test_gossip_keeps_the_mean_and_names_no_node_twice(nodes: int) -> None:
    draw = torch.Generator().manual_seed(nodes)
    theta = torch.randn(nodes, 7, generator=draw, dtype=torch.float64)
    mean = theta.mean(0)
    for number in range(20):
        pairs = gossip_pairs(nodes, number, 0.7, seed=4)
        assert pairs == gossip_pairs(nodes, number, 0.7, seed=4)
        named = [node for pair in pairs for node in pair]
        assert len(named) == len({*named})
        matrix = mixing_matrix(nodes, pairs)
        for total in (matrix.sum(0), matrix.sum(1)):
            torch.testing.assert_close(total, torch.ones(nodes, dtype=torch.float64))
        theta = matrix @ theta
        torch.testing.assert_close(theta.mean(0), mean, rtol=0.0, atol=1e-6)
    spread = theta.std(0).max()
    assert spread < (1e-12 if nodes == 2 else 0.1)


def test_every_pair_comes_up_and_as_often_as_it_should() -> None:
    rounds = [gossip_pairs(4, number, 0.25, seed=1) for number in range(2000)]
    seen = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert len(seen) == 6
    # 2 pairs of a matching, each with probability 0.25: 1000 of 2000 rounds, within five deviations.
    assert sum(map(len, rounds)) == pytest.approx(1000, abs=140)
    assert [gossip_pairs(4, number, 0.0) for number in range(50)] == [[]] * 50
    assert all(len(gossip_pairs(5, number, 1.0)) == 2 for number in range(50))
    assert rounds != [gossip_pairs(4, number, 0.25, seed=2) for number in range(2000)]


def test_one_process_trains_as_without_it_and_keeps_its_optimizer(tmp_path: Path) -> None:
    ends = []
    callback = LocalTrainCallback(local_steps=3, comm_schedule="late_window", late_window=[0.5, 0.5])
    for callbacks in ([], [callback]):
        trainer = build(tmp_path, *callbacks, save_strategy="no")
        trainer.train()
        ends.append(parameters(trainer))
    assert equal(*ends)
    assert logged(trainer, "local_train/rounds") == [0, 0, 1, 1, 1, 2, 2, 2, 3, 4]
    assert logged(trainer, "local_train/exchanges") == [0.0] * 10


def test_a_window_without_a_round_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"comm_schedule": "late_window", "local_steps": 4}
    with pytest.raises(ValueError, match=r"late_window must be one that some round of 4 steps ends in.*0\.9"):
        build(tmp_path, LocalTrainCallback(**settings), save_strategy="no").train()
    again = LocalTrainCallback(**settings, late_window=[0.75, 0.1])  # the second round ends at 0.8
    build(tmp_path, again, save_strategy="no").train()
    assert LocalTrainCallback(comm_schedule="late_window", late_window=(0.5, 0.1)).settings()[  # pyright: ignore
        "late_window"
    ] == [0.5, 0.1]


def test_a_fingerprint_sees_one_bit() -> None:
    model = tiny_model()
    before = fingerprint(model)
    assert before == fingerprint(tiny_model())
    with torch.no_grad():
        weight = next(model.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert fingerprint(model) != before
