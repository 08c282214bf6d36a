"""A network's opinion of utterances: batches of similar lengths, long recordings in pieces, the numeric mode.

What comes out for a shard depends on its utterances, the network and the settings alone: never on who asks, nor on
what else is computed at the same time.

# B batch, T frames, F features, C cells, D directions, S senones, K kept
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacherstudent.data.feature_reader import ReadableShard
from teacherstudent.posteriors import TopK, top_k
from teacherstudent.training.batches import collate
from teacherstudent.training.models import AcousticModel

_SLICE_FRAMES = 1024  # whose logits are held at a time
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, arm
_CPU_INFO = Path("/proc/cpuinfo")


# -- numeric modes -------------------------------------------------------------------------------------------


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the processor itself multiplies matrices of bfloat16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not _CPU_INFO.is_file():
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    return flags is not None and not _BFLOAT16_FLAGS.isdisjoint(flags[1].split())


def to_numeric_mode(model: AcousticModel, mode: str, device: torch.device | str = "cpu") -> AcousticModel:
    """The model on the device, changed in place. bf16: the LSTM layers' weights and activations; normalisation and
    output layer stay float32, since logits rounded to 8 bits swap neighbours and make ties.

    Raises ValueError where the processor has no bfloat16.
    """
    if mode == "bf16":
        if not has_bfloat16(device):
            raise ValueError(
                "this store is labelled in bf16, which this processor does not have: leave it to workers that do, or "
                "label all of it with label.numeric_mode = 'fp32'"
            )
        model.layers.to(torch.bfloat16)
    return model.to(device).eval()


_precision_lock = threading.Lock()
_num_in_bfloat16 = 0
_former_precision = ""


@contextmanager
def computing(mode: str) -> Iterator[None]:
    """In bf16 the float32 output layer may multiply in bfloat16 too (and add in float32), where that is faster.

    torch has one switch for the whole process: it is turned back when the last of several threads is done.
    """
    global _num_in_bfloat16, _former_precision
    if mode != "bf16":
        yield
        return
    with _precision_lock:
        if not _num_in_bfloat16:
            _former_precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
        _num_in_bfloat16 += 1
    try:
        yield
    finally:
        with _precision_lock:
            _num_in_bfloat16 -= 1
            if not _num_in_bfloat16:
                torch.set_float32_matmul_precision(_former_precision)


# -- batches -------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """How long utterances are divided. context_frames: on each side of a piece, computed and thrown away."""

    chunk_frames: int
    context_frames: int

    def divide(self, num_frames: int) -> list[tuple[int, int, int, int]]:
        """(first, start, stop, last) of each piece: start … stop is what it is for, first … last what is read."""
        starts = range(0, num_frames, self.chunk_frames)
        stops = [min(start + self.chunk_frames, num_frames) for start in starts]
        context = self.context_frames
        return [
            (max(0, start - context), start, stop, min(num_frames, stop + context))
            for start, stop in zip(starts, stops)
        ]


def plan_batches(
    num_frames: Sequence[int] | np.ndarray, batch_frames: int, chunk_frames: int
) -> list[list[int]]:
    """The utterances (by number) of each batch, longest first: at most batch_frames with padding, or one utterance.

    One of more than chunk_frames is alone.
    """
    lengths = np.asarray(num_frames, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        size = 1 if longest > chunk_frames else max(1, batch_frames // max(1, longest))
        batches.append(order[start : start + size].tolist())
        start += size
    return batches


@torch.inference_mode()
def find_best(
    model: AcousticModel, values: Sequence[np.ndarray], k: int, batch_frames: int, pieces: Pieces
) -> list[TopK | str]:
    """Of each utterance (T, F) of a batch, longest first, the k highest posteriors, on the CPU; or why it has none."""
    if len(values) == 1 and len(values[0]) > pieces.chunk_frames:
        return [_find_best_of_long(model, values[0], k, batch_frames, pieces)]
    return _best_of_rows(model, _encode(model, values), k)


def _find_best_of_long(
    model: AcousticModel, values: np.ndarray, k: int, batch_frames: int, pieces: Pieces
) -> TopK | str:
    divided = pieces.divide(len(values))
    longest = max(last - first for first, _, _, last in divided)
    size = max(1, batch_frames // longest)
    found: list[TopK] = []
    for begin in range(0, len(divided), size):
        batch = sorted(divided[begin : begin + size], key=lambda piece: piece[0] - piece[3])
        rows = _encode(model, [values[first:last] for first, _, _, last in batch])
        rows = [row[start - first : stop - first] for row, (first, start, stop, _) in zip(rows, batch)]
        best = dict(zip((start for _, start, _, _ in batch), _best_of_rows(model, rows, k)))
        for start in sorted(best):
            if isinstance(part := best[start], str):
                return part
            found.append(part)
    return TopK(*(torch.cat(parts) for parts in zip(*found)))


def _encode(model: AcousticModel, values: Sequence[np.ndarray]) -> list[Tensor]:
    """The last hidden layer (T, C * D) of each utterance, longest first."""
    batch = collate(values, [])
    hidden = model.encode(_send(batch.features, model.output.weight.device), batch.lengths)
    return [row[:length] for row, length in zip(hidden, batch.lengths.tolist())]


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU out of pinned memory, while the next batch is made."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _best_of_rows(model: AcousticModel, rows: Sequence[Tensor], k: int) -> list[TopK | str]:
    """Of hidden layers (T, C * D): without their padding, a slice at a time."""
    try:
        best = _best_of(model, torch.cat(list(rows)), k)
    except ValueError:  # a frame that is not finite: of which utterance?
        return [_best_or_reason(model, row, k) for row in rows]
    lengths = [len(row) for row in rows]
    return [TopK(*parts) for parts in zip(*(part.split(lengths) for part in best))]


def _best_or_reason(model: AcousticModel, row: Tensor, k: int) -> TopK | str:
    try:
        return _best_of(model, row, k)
    except ValueError:
        return "the teacher's output is not finite"


def _best_of(model: AcousticModel, hidden: Tensor, k: int) -> TopK:
    """(T, C * D) -> the k best of each frame, narrow: a shard's are held until all of it is there."""
    found = [
        top_k(model.output(part.to(model.output.weight.dtype)), k) for part in hidden.split(_SLICE_FRAMES)
    ]
    ids, log_posteriors, dropped = (torch.cat(parts).cpu() for parts in zip(*found))
    return TopK(ids.to(torch.int32), log_posteriors, dropped)


@torch.inference_mode()
def infer(
    model: AcousticModel, shard: ReadableShard, batch_frames: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """(utterance id, logits (T, S)) of every utterance of a shard, in its order; each of them whole."""
    values = {name: arrays["values"] for name, arrays in shard}
    names = list(values)
    logits: dict[str, Tensor] = {}
    lengths = [len(array) for array in values.values()]
    for members in plan_batches(lengths, batch_frames, max(lengths, default=0)):
        batch = collate([values[names[number]] for number in members], [])
        output = model(batch.features.to(device), batch.lengths)
        for number, row, length in zip(members, output, batch.lengths.tolist()):
            logits[names[number]] = row[:length].cpu().clone()
    yield from ((name, logits[name]) for name in names)
