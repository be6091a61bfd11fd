"""Several processes: one outcome of compiling, one threshold and one audit for all ranks.

Attention parallelism itself is the model's (diffusers' context parallelism, tensor parallelism,
FSDP): the backend sees each rank's own graph. What is here is given a ``torch.distributed`` process
group and needs no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cef_compile.errors import RankError
from cef_compile.policy import Bands, Decision
from cef_compile.report import Audit, GatheredAudit


@dataclass
class Outcome:
    """How a step went on one rank.

    Attributes:
        decisions: what was decided, by name; has to be the same on all ranks.
        error: what was raised, as text; empty where nothing was.
    """

    decisions: dict[str, str] = field(default_factory=dict)
    error: str = ""


def spelled(decided: Decision | Bands) -> str:
    """A decision, or those of a schedule: equal texts for equal decisions."""
    if not isinstance(decided, Decision):
        return "; ".join(f"from {level:g}: {spelled(decision)}" for level, decision in decided)
    if decided.is_dense:
        return f"dense ({decided.reason})"
    given = ((f.name, getattr(decided, f.name), f.default) for f in fields(decided))
    return ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)


def check_group(group: Any) -> dist.ProcessGroup | None:
    """``group`` if it is a process group that this rank belongs to, or None.

    Raises:
        TypeError: it is something else.
        ValueError: this rank is not in it.
    """
    if group is None:
        return None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not contain this rank; give each rank a group that it is in")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group, such as dist.group.WORLD after"
            f" init_process_group, or None; got {group!r}"
        )
    return group


@contextmanager
def together(group: dist.ProcessGroup | None) -> Iterator[Outcome]:
    """A block that all ranks of ``group`` pass, or none.

    Without this an error on one rank would leave the others waiting for it in a collective. The
    ranks meet once, at the end of the block: they must enter as many blocks, in the same order.

    Args:
        group: the ranks; None for this process alone, and then nothing is exchanged.

    Yields:
        the outcome of this rank, to be given its decisions.

    Raises:
        RankError: another rank has failed, or has decided otherwise.
    """
    mine = Outcome()
    if group is None:
        yield mine
        return
    failure = None
    try:
        yield mine
    except Exception as error:
        failure = error
        mine.error = f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, mine, group=group)
    if failure is not None:
        raise failure
    _check(mine, dict(zip(dist.get_process_group_ranks(group), outcomes, strict=True)))


def _check(mine: Outcome, outcomes: dict[int, Outcome]) -> None:
    for rank, other in outcomes.items():
        if other.error:
            raise RankError(f"rank {rank} failed: {other.error}")
    for rank, other in outcomes.items():
        for name in mine.decisions.keys() | other.decisions.keys():
            here, there = (o.decisions.get(name, "unknown there") for o in (mine, other))
            if here != there:
                raise RankError(
                    f"the ranks decide differently on {name}: {here} on this rank, {there} on rank"
                    f" {rank}. Give every rank the same policy, policy file and arguments."
                )


def mean_over_ranks(group: dist.ProcessGroup | None, curve: Tensor, weight: float) -> Tensor:
    """A curve, mean over the ranks. Waits for no device where the group's backend does not.

    Args:
        group: the ranks; None for this process alone.
        curve: float32 ``[n]``.
        weight: of this rank: its number of query rows.
    """
    if group is None:
        return curve
    weighted = F.pad(curve, (0, 1), value=1.0) * weight
    dist.all_reduce(weighted, group=group)
    return weighted[:-1] / weighted[-1]


def gather_audit(
    audit: Audit, group: dist.ProcessGroup | None = None, dst: int = 0
) -> GatheredAudit | None:
    """The audits of all ranks as one; every rank of the group has to call it.

    A node's recall is the mean over its rows on all ranks, whether these hold its heads (Ulysses,
    tensor parallel), its queries (ring) or its branches (CFG parallel).

    Args:
        audit: this rank's. Synchronises with the device.
        group: the ranks; None for all.
        dst: global rank that gets the result.

    Returns:
        the audit of the whole model on ``dst``; None on the others.

    Raises:
        ValueError: on ``dst``, where the ranks have not run the same calls.
    """
    here = dist.get_rank() == dst
    audits: list[Any] | None = [None] * dist.get_world_size(group) if here else None
    dist.gather_object(audit, audits, dst=dst, group=group)
    if audits is None:
        return None
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    return GatheredAudit(dict(zip(ranks, audits, strict=True)))
