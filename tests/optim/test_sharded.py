"""Elementwise rules on parameters of which each rank holds a part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lmlosses.optim.memory import state_bytes
from tests.optim.test_all import CASES, FLAT, STEPS, Case, gradients, run, start, take_step

ROOT = Path(__file__).parents[2]
RANKS = 2
SHAPES = ((5, 3), (4,), (1, 2))  # an odd number of rows, and a rank that holds nothing
ELEMENTWISE = {
    name: case
    for name, case in CASES.items()
    # a cautious rule counts over a tensor; Sophia's curvature comes out of a sharded model
    if case.takes("foreach") and not name.startswith(("cautious", "Sophia"))
}


def sharded_run(
    case: Case, mesh: dist.DeviceMesh, *, foreach: bool, resumed: bool
) -> list[Tensor]:
    whole = start(case, SHAPES)
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    optimizer = case.build(params, foreach=foreach, weight_decay=0.1)
    for step in range(STEPS):
        if resumed and step == 2:
            saved = optimizer.state_dict()
            optimizer = case.build(params, foreach=foreach, weight_decay=0.1)
            optimizer.load_state_dict(saved)
        for param, grad in zip(params, gradients(whole, step), strict=True):
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        take_step(optimizer)
    for state in optimizer.state.values():
        assert all(isinstance(t, DTensor) for name, t in state.items() if name != "step")
    held = state_bytes(optimizer).by_name
    here = sum(param.to_local().numel() for param in params)
    assert all(held[name] == 8 * here for name in held if name != "step")
    return [param.detach().full_tensor() for param in params]


def work(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {
        (name, foreach, resumed): sharded_run(case, mesh, foreach=foreach, resumed=resumed)
        for name, case in ELEMENTWISE.items()
        for foreach, resumed in ((False, False), (True, False), (False, True))
    }
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_move_their_parts_as_one_would_move_the_whole(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(RANKS)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0] * RANKS
    found = torch.load(tmp_path / "found.pt")
    for (name, _, _), moved in found.items():
        params = start(ELEMENTWISE[name], SHAPES)
        expected = run(ELEMENTWISE[name].build(params, weight_decay=0.1), params)
        for mine, theirs in zip(moved, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SOAP"])
def test_rules_that_read_whole_tensors_refuse_parts(name, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}",
                            rank=0, world_size=1)  # fmt: skip
    try:
        mesh = init_device_mesh("cpu", (1,))
        part = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        with pytest.raises(TypeError, match=f"{name} reads whole tensors and takes no sharded"):
            FLAT[name].build([part])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
