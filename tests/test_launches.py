"""What a run would launch on a GPU that is not there: operators one each, primitives as their kernels, views never."""

from __future__ import annotations

import torch

import reattend.passes  # noqa: F401 - fills the registry
from reattend.codegen.launches import Launched, Launches
from reattend.compiler.functional import attention
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.scan import scan


def test_operators_and_views() -> None:
    x, y = torch.randn(4, 8), torch.randn(8)
    with Launches() as run:
        z = (x.t().reshape(4, 8)[:2] + y).relu_()
        torch.empty_like(z)
        z @ x.t()
    assert run.found == [
        Launched("clone", 2 * 4 * 32),  # the reshape of a transpose
        Launched("add", 4 * (16 + 8 + 16)),
        Launched("relu_", 4 * 16),
        Launched("mm", 4 * (16 + 32 + 8)),
    ]
    assert run.bytes == sum(each.bytes for each in run.found)


def test_what_is_the_same_for_all_is_read_once() -> None:
    one = torch.randn(1, 8)
    with Launches() as run:
        one.expand(100, 8) + one.expand(100, 8)
    assert run.found == [Launched("add", 4 * (8 + 800))]


def test_a_primitive_is_its_kernels_and_gives_what_it_gives_here() -> None:
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 8192, 16)
    wanted = attend(q, k, k, keep=lambda i, j: j % 2 == 0)
    with Launches() as run:
        found = attend(q, k, k, keep=lambda i, j: j % 2 == 0)
    assert torch.equal(wanted, found)
    assert [each.name for each in run.found if each.generated] == ["attend: share", "attend: join"]
    share = next(each for each in run.found if each.name == "attend: share")
    assert share.bytes > k.nbytes  # keys and values are one tensor, read once


def test_where_there_is_no_kernel_torch_is_counted() -> None:
    q = torch.randn(1, 2, 8, 4).double()
    with Launches() as run:
        scan(q, q, q)
    assert run.found and not any(each.generated for each in run.found)


def test_agents_are_two_attends() -> None:
    q = torch.randn(2, 2, 64, 16)
    with Launches() as run:
        attention(q, q, q, "agent", agent_num=4, grid=(8, 8))
    assert [each.name for each in run.found if each.generated] == ["attend: forward"] * 2
