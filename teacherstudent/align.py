"""The `align` step: from phone alignments to the phone of every 30 ms frame, and the frames that open a phone.

A frame belongs to the phone that is spoken at its centre; a gap in the alignment is silence. A phone too short
to hold a frame's centre has no frame.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from teacherstudent.dataset import prepared_shards, read_lexicon, read_prepared
from teacherstudent.experiment import Experiment
from teacherstudent.features import FRAME_SHIFT_SECONDS
from teacherstudent.lexicon import SILENCE
from teacherstudent.manifests import LABELLED_PARTS
from teacherstudent.packed import PackedShard, PackedWriter, shard_path
from teacherstudent.progress import hours_bar

ARRAYS = {"phone": ("int16", ()), "first": ("bool", ())}


def align(experiment: Experiment) -> list[Path]:
    """Write align/PART/phones.*.h5 for the labelled parts.

    Raises ValueError for a cut without a phone alignment, or with a phone that the lexicon does not know.
    """
    phones = (SILENCE, *read_lexicon(experiment).phones)
    phone_ids = {phone: index + 1 for index, phone in enumerate(phones)}
    outputs = []
    for part in LABELLED_PARTS:
        experiment.path("align", part).mkdir(parents=True, exist_ok=True)
        paths = prepared_shards(experiment, part)
        seconds = [sum(cut.duration for cut in read_prepared(experiment, part, path)) for path in paths]
        with hours_bar(sum(seconds), f"align {part}") as bar:
            for index, path in enumerate(paths):
                output = shard_path(experiment.path("align", part), "phones", index)
                outputs.append(output)
                features = PackedShard(shard_path(experiment.path("features", part), "features", index))
                lengths = dict(zip(features.ids, features.num_frames))
                with PackedWriter(output, {"phones": list(phones)}, ARRAYS) as writer:
                    for cut in read_prepared(experiment, part, path):
                        phone, first = _frame_phones(cut, int(lengths[cut.id]), phone_ids)
                        writer.write(cut.id, phone=phone, first=first)
                bar.update(seconds[index])
    return outputs


def _frame_phones(cut: Cut, num_frames: int, phone_ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    items = [
        item for supervision in cut.supervisions for item in (supervision.alignment or {}).get("phone", ())
    ]
    if not items:
        raise ValueError(
            f"cut {cut.id} has no phone alignment: each supervision needs alignment={{'phone': [...]}}"
        )
    unknown = {item.symbol for item in items} - set(phone_ids)
    if unknown:
        raise ValueError(f"cut {cut.id}: phones {sorted(unknown)} of its alignment are not in the lexicon")
    items.sort(key=lambda item: item.start)
    starts = [item.start for item in items]
    ends = [item.end for item in items]  # rounded by lhotse: no gap opens between an end and an equal start
    return frame_labels(starts, ends, [phone_ids[item.symbol] for item in items], num_frames)


def frame_labels(
    starts: Sequence[float], ends: Sequence[float], phones: Sequence[int], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Phone of each 30 ms frame and whether the frame is the first of its phone.

    starts, ends: seconds from the utterance's beginning, ascending; phones: their ids; silence has id 1.
    Returns (num_frames,) int16 and (num_frames,) bool.
    """
    centres = np.round((np.arange(num_frames) + 0.5) * FRAME_SHIFT_SECONDS, 8)  # as lhotse rounds its times
    segment = np.searchsorted(np.asarray(starts), centres, side="right") - 1
    covered = (segment >= 0) & (centres < np.asarray(ends)[np.maximum(segment, 0)])
    phone = np.where(covered, np.asarray(phones)[np.maximum(segment, 0)], 1).astype(np.int16)
    place = np.where(phone == 1, -1, segment)  # silence beside silence is one, aligned or a gap
    return phone, np.diff(place, prepend=-2) != 0
