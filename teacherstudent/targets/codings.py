"""The two codings of the target store: how the k best of each frame become packed arrays, and come back.

`compact` (target_codec.py) is the default; `plain` is for whoever wants to read arrays and nothing else. Both give
the same senones, and log-posteriors within what the header states. docs/store.md describes them.
"""
# T frames, S senones, K kept

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from teacherstudent.data.packed import BLOCK_FRAMES, Arrays
from teacherstudent.posteriors import TopK
from teacherstudent.targets import target_codec
from teacherstudent.targets.target_codec import Decoded

_MAX_SENONES_OF_16_BITS = 1 << 16
_RECORD_BLOCK_BYTES = 8192  # about 256 frames under one checksum


@dataclass(frozen=True)
class Coding:
    """One way of writing targets. A row of its arrays is a frame (plain), or a byte of a record (compact)."""

    name: str
    block_rows: int
    layout: Callable[[int, int], dict[str, tuple[DTypeLike, tuple[int, ...]]]]  # of k, S
    encode: Callable[[TopK, int], Arrays]  # of S
    # of many utterances end to end: the rows and the offsets of each (N + 1,), k, S; and the offsets of its frames
    decode: Callable[[Arrays, NDArray[np.int64], int, int], tuple[Decoded, NDArray[np.int64]]]
    facts: Mapping[str, Any]  # for the header


def _plain_layout(k: int, num_senones: int) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
    id_type = "uint16" if num_senones <= _MAX_SENONES_OF_16_BITS else "uint32"
    return {"ids": (id_type, (k,)), "log_posteriors": ("float16", (k,)), "dropped": ("float16", ())}


def _encode_plain(best: TopK, num_senones: int) -> Arrays:
    ids = best.ids.cpu().numpy()
    with np.errstate(over="ignore"):  # below -65504, where e to the power of it is 0, becomes -inf
        log_posteriors = best.log_posteriors.cpu().numpy().astype("float16")
    order = np.lexsort((ids, -log_posteriors), axis=1)  # rounding makes equals: by senone again
    (id_type, _), dropped = _plain_layout(0, num_senones)["ids"], best.dropped.cpu().numpy()
    return {
        "ids": np.take_along_axis(ids, order, axis=1).astype(id_type),
        "log_posteriors": np.take_along_axis(log_posteriors, order, axis=1),
        "dropped": dropped.astype("float16"),
    }


def _decode_plain(
    arrays: Arrays, offsets: NDArray[np.int64], k: int, num_senones: int
) -> tuple[Decoded, NDArray[np.int64]]:
    values: NDArray[np.float32] = arrays["log_posteriors"].astype(np.float32)
    values -= values[:, :1]
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return Decoded(arrays["ids"].astype(np.int32), values, arrays["dropped"].astype(np.float32)), offsets


def _compact_layout(k: int, num_senones: int) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
    return {"records": ("uint8", ())}


def _encode_compact(best: TopK, num_senones: int) -> Arrays:
    ids, log_posteriors, dropped = (tensor.cpu().numpy() for tensor in best)
    return {"records": target_codec.encode(ids, log_posteriors, dropped, num_senones)}


def _decode_compact(
    arrays: Arrays, offsets: NDArray[np.int64], k: int, num_senones: int
) -> tuple[Decoded, NDArray[np.int64]]:
    return target_codec.decode(arrays["records"], offsets, k, num_senones)


PLAIN = Coding(
    "plain",
    BLOCK_FRAMES,
    _plain_layout,
    _encode_plain,
    _decode_plain,
    {
        "log_posteriors": "float16 natural logarithm under the whole softmax, rounded to nearest",
        "dropped": "float16 probability",
        # of x: at most the larger of the first two; of a probability p: max p |ln p| 2^-11 = 2^-11 / e
        "worst_error": {
            "relative_nats": 2.0**-11,
            "absolute_nats": 2.0**-25,
            "below": "less than -65504 may become -inf",
            "probability": 1.8e-4,
            "dropped": 2.0**-12,
        },
    },
)
COMPACT = Coding(
    "compact",
    _RECORD_BLOCK_BYTES,
    _compact_layout,
    _encode_compact,
    _decode_compact,
    {
        "log_posteriors": f"multiples of 1/{target_codec.LEVELS_PER_NAT} nat below the frame's highest",
        "dropped": f"(code / {target_codec.DROPPED_STEPS})², one byte",
        "worst_error": {
            # before renormalising, relative to the highest; after it at most twice as much: the sum moves too
            "relative_nats": target_codec.MAX_LEVEL_ERROR_NATS,
            "renormalised_nats": 2 * target_codec.MAX_LEVEL_ERROR_NATS,
            "below": "more than 127.9 nats below the frame's highest becomes -inf",
            # Hoeffding's lemma: errors within a range r cost at most r² / 8
            "divergence_nats": (2 * target_codec.MAX_LEVEL_ERROR_NATS) ** 2 / 8,
            "dropped": round(target_codec.MAX_DROPPED_ERROR, 6),
        },
    },
)
CODINGS = {coding.name: coding for coding in (COMPACT, PLAIN)}
