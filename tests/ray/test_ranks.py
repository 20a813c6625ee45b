"""Ranks as Ray actors on a local cluster: `make test-ray`."""

# ruff: noqa: E402
from __future__ import annotations

import pytest

ray = pytest.importorskip("ray", reason="needs the extra ray")

from whet.config import MachineConfig
from whet.launch.ranks import RankSetup
from whet.launch.ray import RayRanks
from whet.training.group import GroupFailure

SETUP = RankSetup(world=2, store=("", 0), device="cpu", threads=1, products="mkl", frugal=False, collective_s=60)


def test_two_ranks_one_dies_and_new_ones_come() -> None:
    ranks = RayRanks(MachineConfig.model_validate({"trainer": {"gpus": 2}}), SETUP)
    try:
        ranks.start(300)
        assert ranks.call("reseed", [(3,)] * 2, 60) == [None, None]
        ray.kill(ranks._actors[1])
        with pytest.raises(GroupFailure, match="trainer rank 1: The actor died") as caught:
            ranks.call("reseed", [(3,)] * 2, 60)
        assert caught.value.rank == 1
        ranks.start(300)
        assert ranks.call("reseed", [(4,)] * 2, 60) == [None, None]
    finally:
        ranks.stop()
        ray.shutdown()
