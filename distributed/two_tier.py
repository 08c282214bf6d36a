"""Two tiers: gradients are shared in every step inside a group of ranks, and models in every block across the groups.

P. Ladkat et al., "Two tiered distributed training algorithm for acoustic modeling", Interspeech 2019.
"""
# N ranks, M ranks in a group (group_size), G = N/M groups, η block momentum

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.block_agreement import Report, Verdict, check_request, pool
from teacherstudent.distributed.block_fold import fold_tiers
from teacherstudent.distributed.block_fragment import Fragment
from teacherstudent.distributed.block_settings import find_problems, is_integer_from
from teacherstudent.distributed.bmuf import BMUF
from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.exact import ExactAveraging, take_exact_step
from teacherstudent.distributed.grad_scaler import tell_scaler
from teacherstudent.distributed.groups import Groups
from teacherstudent.distributed.gtc import GTC
from teacherstudent.distributed.gtc_options import GTCOptions
from teacherstudent.distributed.gtc_state import ranks_to_fold
from teacherstudent.distributed.optimizers import STATE_KEY, DistributedOptimizer
from teacherstudent.distributed.step_problems import find_loss_problem

INNER_METHODS: dict[str, type[DistributedOptimizer]] = {"gtc": GTC, "exact": ExactAveraging}


class TwoTier(DistributedOptimizer):
    """GTC or exact averaging inside each group of `group_size` consecutive ranks, and BMUF across the groups.

    group_size     M ranks that share every step: those of a node, where the exchange is fast. It divides N; under
                   the usual launchers consecutive ranks are on one node
    inner          "gtc" or "exact", what the ranks of a group do
    inner_options  its options, such as {"density": 1e-2}
    block_options  those of BMUF, such as block_steps=50. N there is the number of groups: η is 1 − 1/G by default

    **A group is one worker of BMUF.** Its ranks hold the same model, bit for bit. Its weight in a block is what its
    ranks' steps weighed, its loss (`report_loss`, `outlier_factor`) their mean. A gradient that is not finite on any
    rank makes its group skip the step, and no other. A group whose model is not finite is left out of the average by
    common decision and starts again from the common model, its residuals and velocities at zero. Otherwise residuals
    live on from block to block; a step that GTC delays is applied before its block ends. `warmup_steps` averages
    gradients exactly over all N ranks.

    **Between groups** every rank exchanges a share of the update, 1/M, with the ranks of its place in the other
    groups, and gets the other shares from its own group: an update crosses once between two nodes, over all of their
    ranks' connections (groups.Groups, which says why not otherwise). metrics()["bytes_between_groups"] counts it.

    **A tier of one member is left out**, not computed: with group_size=1 this is BMUF, and with one group GTC or
    ExactAveraging, bit for bit; one worker alone has its inner optimiser only. With one group, `request` is heard
    every `block_steps` steps, for a few bytes; options of a tier that is left out are named in a warning.

    Raises ValueError on every rank where group_size does not divide the number of ranks, `inner` or an option is
    unknown or out of range, or anything differs between ranks; and what BMUF and GTC raise. A state goes on with
    another number of groups, but neither with one alone nor in groups of another size.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        group_size: int,
        inner: str = "gtc",
        inner_options: Mapping[str, Any] | None = None,
        initial_weights: str = "broadcast",
        model: torch.nn.Module | None = None,
        **block_options: Any,
    ) -> None:
        inner_options = dict(inner_options or {})
        settings = {"group_size": group_size, "inner": inner, "inner_options": inner_options, **block_options}
        problems = [
            *find_group_problems(group_size, comm.size),
            *find_inner_problems(inner, inner_options, optimizer, is_used=group_size != 1),
            *find_block_problems(block_options, optimizer),
        ]
        super().__init__(optimizer, comm, settings, problems, initial_weights, model)
        self.group_size = group_size
        self.num_groups = comm.size // group_size
        self.block_steps = {**options_of(BMUF), **block_options}["block_steps"]
        self._requests: set[str] = set()
        self._agreed: Set[str] = frozenset()
        method = INNER_METHODS[inner if group_size > 1 else "exact"]
        self._inside: DistributedOptimizer | None = None
        self._across: BMUF | None = None
        if self.num_groups == 1:
            options = inner_options if group_size > 1 else {}
            self._inside = method(optimizer, comm, initial_weights="check", **options)
        elif group_size == 1:
            self._across = BMUF(optimizer, comm, initial_weights="check", **block_options)
        else:
            group, place = divmod(comm.rank, group_size)
            self._inside = method(optimizer, comm.split(group), initial_weights="check", **inner_options)
            groups = Groups(comm.split(group), comm.split(place))
            self._across = GroupBMUF(self, self._inside, groups, **block_options)
        self._join({"inside": self._inside, "across": self._across})
        warn_of_what_is_left_out(comm.size, group_size, inner_options, block_options)

    def _join(self, tiers: Mapping[str, DistributedOptimizer | None]) -> None:
        """What the tiers count is one account, and the buffers belong to all of them."""
        self._tiers = {name: tier for name, tier in tiers.items() if tier is not None}
        for tier in self._tiers.values():
            sent = self._counters["bytes_sent"] + tier._counters["bytes_sent"]
            self._counters |= {**tier._counters, "bytes_sent": sent}
        self._share_counters()
        present = list(self._tiers.values())
        self._first, self._outer = present[0], present[-1]  # who takes the gradients, and who the steps
        self._outer._untrained = self._untrained

    def synchronize(self) -> None:
        """Close a partial block and leave W in the model. Collective; the next block starts from W."""
        if self._inside is not None:
            self._meet()
        self._outer.synchronize()
        if self._across is None:
            self._hear_requests()

    @contextlib.contextmanager
    def global_weights(self) -> Iterator[None]:
        """The model holds W inside the `with` block, and the group's own weights again after it. Not collective."""
        with self._across.global_weights() if self._across else contextlib.nullcontext():
            yield

    def begin_step(self, *, weight: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """With inner_options={"overlap": True}: as begin_step of GTC."""
        if not isinstance(self._inside, GTC):
            raise ValueError(
                "begin_step() belongs to inner='gtc' with overlap, in groups of 2 or more; leave it out"
            )
        if not (self._across and self._across._is_warming_up):
            self._inside.begin_step(weight=weight, scaler=scaler)

    def report_loss(self, loss: float | Tensor) -> None:
        """The mean loss of this rank's batch whose `step` comes next. Only `outlier_factor` makes use of it."""
        if self._across:
            self._across.report_loss(loss)

    def _find_problem(self, weight: Any) -> str:
        across = self._across
        return super()._find_problem(weight) or find_loss_problem(across._reported_loss if across else None)

    def request(self, what: str) -> None:
        """Ask all ranks for a "stop" or a "checkpoint"; they hear of it at the end of the present block."""
        check_request("request", what)
        (self._across or self)._requests.add(what)

    def agreed(self, what: str) -> bool:
        """Whether any rank had requested this when the last block ended: the same answer on every rank."""
        check_request("agreed", what)
        return what in (self._across or self)._agreed

    def metrics(self) -> dict[str, float]:
        """Those of both tiers together."""
        metrics = super().metrics()
        seconds = metrics["seconds_in_exchange"] + sum(t._seconds_in_exchange for t in self._tiers.values())
        for tier in self._tiers.values():
            metrics |= tier.metrics()
        return {**metrics, "seconds_in_exchange": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_counters()

    # ---- the step -----------------------------------------------------------------------------------------

    def _unscale(self) -> None:
        """Leave it to the tier that takes the gradients: some may have left during backward, unscaled."""
        scale = getattr(self, "grad_scale", None)
        self._first.grad_scale = scale  # type: ignore[attr-defined]
        self._first._unscale()

    def _take_step(self, weight: int) -> None:
        num_nonfinite = self._counters["skipped_nonfinite"]
        self._first._problem = self._problem  # an error on every rank of the group
        self._outer._take_step(weight)
        if self._across is None and self._counters["steps"] % self.block_steps == 0:
            self._hear_requests()
        tell_scaler(self, self._counters["skipped_nonfinite"] > num_nonfinite, self.comm.device)

    def _hear_requests(self) -> None:
        with self._exchanging():
            self._agreed = pool(self.comm, Report(requests=self._requests)).requests
        self._requests = set()

    def _meet(self) -> None:
        """The ranks of a group must agree that all of them have come to `synchronize`, and none to `step`."""
        try:
            self._first._agree_to_synchronize()
        except ValueError as error:
            if self._across is None:
                raise
            self._across._problem = str(error)  # an error on every rank, when the groups agree

    def _share_counters(self) -> None:
        """All tiers count in one place."""
        for tier in self._tiers.values():
            tier._counters = self._counters

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _hidden_state(self) -> dict[str, Any]:
        tiers = {name: tier.state_dict()[STATE_KEY] for name, tier in self._tiers.items()}
        return {"group_size": self.group_size, "tiers": tiers}

    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        saved = hidden["tiers"]
        kinds = {name: state["kind"] for name, state in saved.items()}
        own_kinds = {name: type(tier).__name__ for name, tier in self._tiers.items()}
        if (hidden["group_size"], kinds) != (self.group_size, own_kinds):
            raise ValueError(
                f"this TwoTier state was saved in groups of {hidden['group_size']}, by {' and '.join(kinds.values())}, "
                f"and is loaded in groups of {self.group_size}, by {' and '.join(own_kinds.values())}; keep the "
                "group_size, the inner method and more than one group"
            )
        for name, tier in self._tiers.items():
            tier._share()
            tier._load_hidden_state(saved[name])
        if self._across and self._inside and hidden["size"] != self.comm.size and not hidden.get("is_folded"):
            self._across._report_lost("inner", "gtc", forget(self._inside))

    def ranks_to_load(self, saved_size: int) -> list[int]:
        return ranks_to_fold(self.comm.rank, self.comm.size, saved_size)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """What waits in groups that are no more goes to those that are: see fold_tiers."""
        state, hidden = states[0], states[0].get(STATE_KEY, {})
        if hidden.get("group_size") == self.group_size and hidden["size"] != self.comm.size:
            state = fold_tiers(states, self.comm.rank, self.comm.size, self.group_size)
        self.load_state_dict(state)


class GroupBMUF(BMUF):
    """BMUF whose workers are groups: what a worker does alone, a group does together."""

    def __init__(
        self, everybody: DistributedOptimizer, inside: DistributedOptimizer, groups: Groups, **options: Any
    ) -> None:
        self._everybody = everybody
        self._inside = inside
        self._groups = groups
        super().__init__(inside.inner, groups, initial_weights="check", **options)

    def _take_exact_step(self, weight: int) -> None:
        take_exact_step(self._everybody, weight)

    def _learn(self, weight: int) -> bool:
        skipped, self._problem = self._num_skipped(), ""
        try:
            self._inside._take_step(weight)
        except (
            ValueError
        ) as error:  # on every rank of the group: the other groups hear of it at the block's end
            self._problem = str(error)
            return False
        return weight > 0 and self._num_skipped() == skipped

    def _num_skipped(self) -> float:
        return self._counters["skipped_nonfinite"] + self._counters["skipped_empty"]

    def _close_block(self, fragment: Fragment, ahead: bool, later: bool) -> None:
        self._inside.synchronize()  # a delayed step belongs to this block
        super()._close_block(fragment, ahead, later)

    def _decide(self, report: Report) -> Verdict:
        with self._inside._exchanging():
            report = pool(self._inside.comm, report)
        self._requests = set(report.requests)
        return super()._decide(report)

    def _average_buffers(self) -> None:
        self._everybody._average_buffers()

    def _start_again(self) -> None:
        super()._start_again()
        forget(self._inside)

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        bytes_before = self._groups.across.bytes_sent
        with super()._exchanging():
            yield
        num_bytes = self._groups.across.bytes_sent - bytes_before
        self._counters["bytes_between_groups"] = self._counters.get("bytes_between_groups", 0) + num_bytes


def forget(inside: DistributedOptimizer) -> int:
    """What waits in a group is lost; of how many elements."""
    hidden = inside._hidden_state() if isinstance(inside, GTC) else {"residuals": [], "velocities": []}
    num_elements = sum(int(residual.count_nonzero()) for residual in hidden["residuals"])
    for buffer in (*hidden["residuals"], *hidden["velocities"]):
        buffer.zero_()
    return num_elements


def options_of(method: type[DistributedOptimizer]) -> dict[str, Any]:
    """The options that a method takes as keywords, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    options = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    return {name: default for name, default in options.items() if name not in ("initial_weights", "model")}


def find_group_problems(group_size: Any, num_ranks: int) -> Iterator[str]:
    if not is_integer_from(group_size, 1):
        yield f"group_size is {group_size!r}; give a whole number of workers, at least 1"
    elif num_ranks % group_size:
        yield (
            f"group_size is {group_size}, which does not divide the {num_ranks} workers; give the number of workers "
            "of a node, and as many on every node"
        )


def find_inner_problems(
    inner: str, options: dict[str, Any], optimizer: torch.optim.Optimizer, is_used: bool
) -> list[str]:
    if inner not in INNER_METHODS:
        return [f"inner is {inner!r}; choose one of {', '.join(INNER_METHODS)}"]
    known = options_of(INNER_METHODS[inner])
    problems = find_unknown("inner_options", options, known)
    if problems or inner != "gtc" or not is_used:
        return problems
    return GTCOptions(**{**known, **options}).find_problems(optimizer.param_groups)


def find_block_problems(options: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    known = options_of(BMUF)
    return find_unknown("BMUF", options, known) or find_problems({**known, **options}, optimizer)


def find_unknown(whose: str, options: dict[str, Any], known: dict[str, Any]) -> list[str]:
    unknown = sorted(set(options) - set(known))
    there_is = f"there is {', '.join(known)}" if known else "there is none"
    return [f"{whose} has no option {', '.join(map(repr, unknown))}; {there_is}"] if unknown else []


def warn_of_what_is_left_out(
    num_ranks: int, group_size: int, inner_options: dict[str, Any], block_options: dict[str, Any]
) -> None:
    """Once, at the start: where nothing is exchanged, and options that have no tier."""
    remarks = []
    if num_ranks == 1:
        remarks.append(
            "one worker has neither a group nor other groups: the inner optimizer is left as it is"
        )
    idle = sorted(inner_options) if group_size == 1 else []
    idle += sorted(set(block_options) - {"block_steps"}) if num_ranks == group_size else []
    if idle:
        remarks.append(
            f"{', '.join(idle)} without effect: {num_ranks // group_size} group(s) of {group_size}"
        )
    if remarks:
        warnings.warn(f"TwoTier: {'; '.join(remarks)}", stacklevel=3)
