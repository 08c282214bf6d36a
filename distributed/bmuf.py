"""Blockwise model-update filtering: each rank trains alone for a block, then the mean of the models is filtered.

K. Chen and Q. Huo, "Scalable training of deep learning machines by incremental block training with intra-block
parallel optimization and blockwise model-update filtering", ICASSP 2016.

What BMUF is made of: block_agreement.py, what the ranks decide together; block_exchange.py, the mean of their updates;
block_filter.py, the arithmetic; block_state.py, the inner optimiser's state; block_fragment.py, all that for a part of
the model.
"""
# N ranks, W global weights, Δ filtered update, η block momentum, ζ block learning rate, G mean update of a block

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.block_agreement import Report, Tally, Verdict, agree, check_request
from teacherstudent.distributed.block_exchange import make_exchange
from teacherstudent.distributed.block_filter import BlockFilter
from teacherstudent.distributed.block_fold import fold_exchanges
from teacherstudent.distributed.block_fragment import Fragment, split_buckets
from teacherstudent.distributed.block_settings import (
    SETTINGS,
    Progress,
    check_settings,
    find_problems,
    warn_of_lost,
)
from teacherstudent.distributed.block_state import make_local_state
from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.exact import take_exact_step
from teacherstudent.distributed.flat import Bucket, stay_finite
from teacherstudent.distributed.grad_scaler import tell_scaler
from teacherstudent.distributed.gtc_state import ranks_to_fold
from teacherstudent.distributed.optimizers import STATE_KEY, DistributedOptimizer
from teacherstudent.distributed.step_problems import find_loss_problem


class BMUF(DistributedOptimizer):
    """Every `block_steps` steps the ranks average what they have learnt, and filter it.

        G = Σ w·(W_rank − W_start) / Σ w;   Δ ← ηΔ + ζG;   W ← W + Δ;   W_start of the next block = W, or W + ηΔ

    w is a rank's weight summed over its steps of the block. W, Δ and the look-ahead W + ηΔ (Nesterov) are kept
    apart: during training the model holds the rank's own weights, and what is evaluated, exported and carried on is
    W. This is torch.optim.SGD(lr=ζ, momentum=η, nesterov=…) on the pseudo-gradient −G.

    block_steps     steps in a block
    block_momentum  η in [0, 1); by default 1 − 1/N: 0 for one rank, 0.5 for 2, 0.75 for 4, 0.875 for 8, 0.9375 for 16,
                    and that of the new N where a training goes on with another one. The sum of a block's effects is
                    then N times the mean: BMUF wants its own learning rate for each N. With one rank the inner
                    optimiser is all that remains, within one rounding a block; this is said once.
    block_lr        ζ > 0
    nesterov        start the next block from the look-ahead
    warmup_steps    exact averaging for so many steps first; the first block starts from what they have made
    local_state     what becomes of the inner optimiser's state (momentum buffers, moments) at a block's end: "reset"
                    (one rank alone keeps it); "keep", each rank its own; "average", exchanged as the models are;
                    "adam", averaged and re-estimated for where the next block starts (block_state.AdamEstimates; Adam
                    and AdamW)
    outlier_factor  leave out a rank whose mean loss in a block is above so many times the ranks' median; wants
                    `report_loss` before each step
    wire            what an element of an update is sent as: "full", in its own dtype; "bf16", "fp16" or "int8" with
                    error feedback, so that what rounding takes away is sent later
    fragments       cut the model into so many parts whose blocks end one after the other, each after
                    block_steps / fragments steps more: smaller exchanges, as many bytes
    delay_steps     merge the mean so many steps after the block's end. The exchange is under way meanwhile, and what
                    the rank learns meanwhile stays on top and belongs to the next block. A native reduction (NCCL) is
                    hidden whole; of the two rounds of an ordered one, and of any wire but "full", the first, with
                    half of the bytes: the second is made at the merge
    model           the whole model: its buffers come together at each block's end, with those of the last fragment

    A step with weight 0, or with a gradient that is not finite, is left out on its rank alone (a GradScaler lowers its
    scale there alone) and counts towards the
    block's length, so that all ranks reach the block's end together. There they agree by one small all-reduce of
    integers. A rank whose model, optimiser's state or buffers are not finite (also when weighted: its share can be N),
    or an outlier, is left out of the average, starts the next block from the common model without a state of its own,
    is named in a warning on every rank, and counted. Learning rates may change inside a block.

    A state can be loaded with other settings where that goes on as well (find_conflicts says which), and with another
    number of workers: at the last block's start, with what `wire` has kept back where load_state_dicts has all states.

    Raises ValueError on every rank where a setting is out of range, where settings, shapes or initial weights
    differ between ranks, where ranks meet at different steps of their blocks, and what `step` raises: a rank with a
    wrong weight or gradient waits inside `step` for the others to reach the block's end. FloatingPointError on every
    rank where no rank that has trained can be used.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        block_steps: int = 50,
        block_momentum: float | None = None,
        block_lr: float = 1.0,
        nesterov: bool = True,
        warmup_steps: int = 0,
        local_state: str = "reset",
        outlier_factor: float | None = None,
        wire: str = "full",
        fragments: int = 1,
        delay_steps: int = 0,
        initial_weights: str = "broadcast",
        model: torch.nn.Module | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in SETTINGS}
        problems = find_problems(settings, optimizer)
        super().__init__(optimizer, comm, settings, problems, initial_weights, model)
        self.block_steps = block_steps
        self.block_momentum = 1 - 1 / comm.size if block_momentum is None else block_momentum
        self.block_lr = block_lr
        self.nesterov = nesterov
        self.warmup_steps = warmup_steps
        self.local_state = local_state
        self.outlier_factor = outlier_factor
        self.wire = wire
        self.fragments = fragments
        self.delay_steps = delay_steps
        self._fragments = [
            self._make_fragment(buckets) for buckets in split_buckets(self._buckets, fragments)
        ]
        self._stagger()
        self._reported_loss: float | None = None
        self._requests: set[str] = set()
        self._agreed: frozenset[str] = frozenset()
        self._set_aside: list[list[Tensor]] | None = None  # the rank's own weights while the model shows W
        self._counters |= dict.fromkeys(("blocks", "ranks_left_out", "moments_guarded", "residuals_lost"), 0)
        if comm.size == 1 and block_momentum is None:
            warnings.warn(
                "BMUF with one worker: block momentum is 0, which leaves the inner optimizer as it is",
                stacklevel=2,
            )

    def synchronize(self) -> None:
        """Close a partial block and leave W in the model. Collective; the next block starts from W."""
        self._refuse_inside_global_weights()
        if self._is_warming_up:
            self._decide(Report(requests=self._requests))
            self._average_buffers()
            return
        agreed: frozenset[str] = frozenset()
        with torch.no_grad():
            for fragment in self._fragments:
                if fragment.own is not None:
                    self._merge(fragment)
                self._close_block(fragment, ahead=False, later=False)
                agreed |= self._agreed
        self._agreed = agreed
        self._stagger()

    @contextlib.contextmanager
    def global_weights(self) -> Iterator[None]:
        """The model holds W inside the `with` block, and the rank's own weights again after it. Not collective."""
        if self._set_aside is not None or self._is_warming_up:
            yield
            return
        self._set_aside = [fragment.filter.read_own() for fragment in self._fragments]
        for fragment in self._fragments:
            fragment.filter.write(fragment.filter.weights)
        self._untrained.show()
        try:
            yield
        finally:
            self._untrained.hide()
            aside, self._set_aside = self._set_aside, None
            for fragment, own in zip(self._fragments, aside):
                fragment.filter.write(own)

    def report_loss(self, loss: float | Tensor) -> None:
        """The mean loss of the batch whose `step` comes next. Only `outlier_factor` makes use of it."""
        if self.outlier_factor is not None:
            self._reported_loss = float(loss)

    def request(self, what: str) -> None:
        """Ask all ranks for a "stop" or a "checkpoint"; they hear of it at the end of the present block."""
        check_request("request", what)
        self._requests.add(what)

    def agreed(self, what: str) -> bool:
        """Whether any rank had requested this when the last block ended: the same answer on every rank.

        A request is no part of the state: a training that goes on has not been asked to stop.
        """
        check_request("agreed", what)
        return what in self._agreed

    def metrics(self) -> dict[str, float]:
        """Beside the counts: blocks closed, of each fragment; ranks left out of them; steps in the present block;
        elements of second moments that kept their mean; elements of residuals that loading has lost."""
        return {**super().metrics(), "steps_in_block": self._fragments[-1].tally.steps}

    # ---- the step -----------------------------------------------------------------------------------------

    def _take_step(self, weight: int) -> None:
        self._refuse_inside_global_weights()
        if self._is_warming_up:
            self._warm_up(weight)
            return
        loss, self._reported_loss = self._reported_loss, None
        if self._learn(weight):
            for fragment in self._fragments:
                fragment.tally.add(weight, loss)
        self._count_step()
        while self._problem:  # the agreement at the block's end makes it an error on every rank
            self._count_step()

    def _find_problem(self, weight: Any) -> str:
        return super()._find_problem(weight) or find_loss_problem(self._reported_loss)

    def _count_step(self) -> None:
        for fragment in self._fragments:
            fragment.tally.steps += 1
            if fragment.own is not None and fragment.tally.steps >= self.delay_steps:
                self._merge(fragment)
            if fragment.tally.steps >= fragment.num_steps:
                self._close_block(fragment, ahead=self.nesterov, later=self.delay_steps > 0)
                fragment.num_steps = self.block_steps

    def _largest_factor(self) -> float:
        """Outside the warm-up a gradient stays on its rank, as it is."""
        return super()._largest_factor() if self._is_warming_up else 1.0

    @property
    def _is_warming_up(self) -> bool:
        return self._counters["steps"] < self.warmup_steps

    def _warm_up(self, weight: int) -> None:
        self._take_exact_step(weight)
        self._reported_loss = None
        if self._counters["steps"] % self.block_steps == 0:
            self._decide(Report(requests=self._requests))
        if not self._is_warming_up:
            self._start_first_block()
            self._average_buffers()

    def _start_first_block(self) -> None:
        for fragment in self._fragments:
            fragment.filter.take_over()
            fragment.local.begin()

    def _take_exact_step(self, weight: int) -> None:
        take_exact_step(self, weight)

    def _learn(self, weight: int) -> bool:
        """Use the gradients at hand; whether they count."""
        self._counters["steps"] += 1
        if not weight:
            self._counters["skipped_empty"] += 1
            tell_scaler(self, False, self.comm.device)  # there may have been no backward pass
            return False
        if not self._gradients_are_finite():
            self._counters["skipped_nonfinite"] += 1
            return False
        self.inner.step()
        return True

    def _close_block(self, fragment: Fragment, ahead: bool, later: bool) -> None:
        verdict = self._decide(self._report(fragment))
        if self.comm.rank in verdict.left_out:
            self._start_again()
        fragment.tally = Tally()
        if fragment is self._fragments[-1]:
            self._average_buffers()
        if not verdict.has_trained:
            fragment.filter.start_block(ahead)
            return
        end_block = fragment.end_block_later if later else fragment.end_block
        with self._exchanging():
            num_guarded = end_block(verdict.shares[self.comm.rank], ahead)
        self._counters["moments_guarded"] += num_guarded
        self._counters["blocks"] += 1

    def _report(self, fragment: Fragment) -> Report:
        problem = self._problem or self._untrained.find_problem()
        findings = (
            all(stay_finite([update], self.comm.size) for update in fragment.filter.each_update()),
            fragment.local.is_finite(),
            bool(problem) or self._untrained.is_finite(),
        )
        health = 0 if all(findings) else 1 + findings.index(False)
        return Report(fragment.tally, health, self._requests, problem)

    def _start_again(self) -> None:
        for fragment in self._fragments:
            fragment.start_again()
        self._untrained.start_again()

    def _decide(self, report: Report) -> Verdict:
        with self._exchanging():
            verdict = agree(self.comm, report, self.outlier_factor)
        self._requests, self._agreed = set(), verdict.requests
        self._counters["ranks_left_out"] += len(verdict.left_out)
        for rank, reason in sorted(verdict.left_out.items()):
            warnings.warn(
                f"block {self._counters['blocks']:g}: {self.comm.member} {rank} is left out of the average, and starts "
                f"again from the common model: {reason}",
                stacklevel=6,
            )
        return verdict

    def _merge(self, fragment: Fragment) -> None:
        with self._exchanging():
            fragment.merge()

    def _refuse_inside_global_weights(self) -> None:
        if self._set_aside is not None:
            raise RuntimeError(
                "leave optimizer.global_weights() before training on: the model holds W inside it"
            )

    # ---- fragments and checkpoints ------------------------------------------------------------------------

    def _make_fragment(self, buckets: list[Bucket]) -> Fragment:
        filter = BlockFilter(buckets, self.block_momentum, self.block_lr)
        parameters = [piece.parameter for bucket in buckets for piece in bucket.pieces]
        return Fragment(
            filter,
            make_exchange(self.comm, filter.weights, self.wire),
            make_local_state(
                self.local_state, self.inner, self.comm, parameters, self.block_momentum, self.block_lr
            ),
            self.block_steps,
        )

    def _stagger(self) -> None:
        """The first blocks of the fragments end at equal distances."""
        for number, fragment in enumerate(self._fragments):
            fragment.num_steps = self.block_steps * (number + 1) // len(self._fragments)

    def _hidden_state(self) -> dict[str, Any]:
        if self._is_warming_up:
            for fragment in self._fragments:
                fragment.filter.take_over()
        own = self._set_aside or [fragment.filter.read_own() for fragment in self._fragments]
        fragments = [fragment.state_dict() for fragment in self._fragments]
        return {"settings": self._settings(), "fragments": fragments, "own_weights": own}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def ranks_to_load(self, saved_size: int) -> list[int]:
        return ranks_to_fold(self.comm.rank, self.comm.size, saved_size)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """What `wire` has kept back on ranks that are no more goes to those that are: see fold_exchanges."""
        first, hidden = states[0], [state.get(STATE_KEY, {}) for state in states]
        if hidden[0].get("kind") == type(self).__name__ and hidden[0]["size"] != self.comm.size:
            first = {**first, STATE_KEY: fold_exchanges(hidden, self.comm.rank, self.comm.size)}
        self.load_state_dict(first)

    @torch.no_grad()
    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        """Puts the rank's own weights back into the model, whatever the model was loaded with."""
        self._refuse_inside_global_weights()
        goes_on = hidden["size"] == self.comm.size
        if goes_on and hidden["rank"] != self.comm.rank:
            raise ValueError(
                f"rank {self.comm.rank} got the BMUF state of rank {hidden['rank']}; every rank loads its own, since "
                "inside a block each has other weights"
            )
        progress, saved = Progress.of(hidden, goes_on), hidden["settings"]
        check_settings(saved, self._settings(), progress)
        parts = list(zip(self._fragments, hidden["fragments"], hidden["own_weights"]))
        if progress.num_steps < saved["warmup_steps"]:
            for fragment, state, own in parts:
                fragment.load_warm_up(state, own)
            if not self._is_warming_up:
                self._start_first_block()
        elif goes_on:
            for fragment, state, own in parts:
                fragment.load_state_dict(state)
                fragment.filter.write(own)
                if not progress.is_in_block and saved["block_momentum"] != self.block_momentum:
                    fragment.filter.start_block(fragment.filter.is_ahead)
        else:
            self._start_with_other_size(hidden, progress)
        if not (goes_on and progress.is_in_block):
            self._stagger()

    def _start_with_other_size(self, hidden: dict[str, Any], progress: Progress) -> None:
        if progress.num_unshared:
            warnings.warn(
                f"this BMUF state was saved by {hidden['size']} workers inside a block and is loaded by "
                f"{self.comm.size}: the {progress.num_unshared} steps since the last block are lost",
                stacklevel=4,
            )
        self._untrained.start_again()
        fragments = zip(self._fragments, hidden["fragments"])
        num_elements = sum(fragment.load_common_state(state) for fragment, state in fragments)
        self._report_lost("wire", hidden["settings"]["wire"], num_elements)

    def _report_lost(self, option: str, value: str, num_elements: int) -> None:
        self._counters["residuals_lost"] += num_elements
        warn_of_lost(option, value, num_elements)
