"""Utterances whose phones are known, in an experiment and in the files of other aligners, written by other code."""

import dataclasses
import gzip
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from teacherstudent.config import Config, Data
from teacherstudent.data.features import num_stacked_frames
from teacherstudent.data.manifests import LABELLED_PARTS
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.experiment import Experiment

PHONES = ("SIL", "A", "B", "K")  # Kaldi's 1, 2, 3, 4
LEXICON = "ab A B\nba B A\nka K A\na A\n"
SAMPLING_RATE = 16000

# Topologies by kind of model: (phones, states); a state is (class of entering, class of staying, next states).
CHAIN = [((1, 2, 3, 4), [(0, 1, [0, 1]), (-1, -1, [])])]
_THREE = [(0, 0, [0, 1]), (1, 1, [1, 2]), (2, 2, [2, 3]), (-1, -1, [])]
_SILENCE = [
    (0, 0, [0, 1, 2, 3]),
    *((n, n, [1, 2, 3, 4]) for n in (1, 2, 3)),
    (4, 4, [4, 5]),
    (-1, -1, []),
]
GMM = [((2, 3, 4), _THREE), ((1,), _SILENCE)]
TOPOLOGIES = {"gmm": GMM, "chain": CHAIN}
NEVER_LOOPED = {"gmm": [((1, 2, 3, 4), _THREE)], "chain": CHAIN}  # the same without silence's own way


def topology_text(topology) -> str:
    lines = ["<Topology>"]
    for phones, states in topology:
        lines += ["<TopologyEntry>", "<ForPhones>", " ".join(map(str, phones)), "</ForPhones>"]
        for number, (entering, staying, following) in enumerate(states):
            line = f"<State> {number} "
            if entering >= 0:
                same = topology is not CHAIN
                line += (
                    f"<PdfClass> {entering} "
                    if same
                    else f"<ForwardPdfClass> {entering} <SelfLoopPdfClass> {staying} "
                )
            line += " ".join(f"<Transition> {state} {1 / len(following):.6g}" for state in following)
            lines.append(f"{line} </State>")
        lines.append("</TopologyEntry>")
    return "\n".join([*lines, "</Topology>", ""])


def states_of(topology, phone: int):
    return next(states for phones, states in topology if phone in phones)


def transition_ids(topology) -> dict[tuple[int, int, int], int]:
    """Kaldi's number of (phone, state, place among its transitions), for one pdf a phone and class."""
    keys = [
        (phone, state, place)
        for phone in range(1, len(PHONES) + 1)
        for state, (_, _, following) in enumerate(states_of(topology, phone))
        for place in range(len(following))
    ]
    return {key: number for number, key in enumerate(keys, 1)}


def _int(value: int) -> bytes:
    return b"\x04" + struct.pack("<i", value)


def _ints(values: Sequence[int]) -> bytes:
    return b"\x04" + struct.pack(f"<i{len(values)}i", len(values), *values)


def _float(value: float) -> bytes:
    return b"\x04" + struct.pack("<f", value)


def model_bytes(topology, binary: bool) -> bytes:
    """final.mdl as Kaldi writes it, with an acoustic model after it that is none of our business."""
    two = topology is CHAIN
    tuples = [
        (phone, state, 10 * phone + entering, *((10 * phone + staying,) if two else ()))
        for phone in range(1, len(PHONES) + 1)
        for state, (entering, staying, _) in enumerate(states_of(topology, phone)[:-1])
    ]
    name = "Tuples" if two else "Triples"
    logs = [-0.5] * (len(transition_ids(topology)) + 1)
    if not binary:
        rows = "".join(" ".join(map(str, row)) + " \n" for row in tuples)
        return (
            f"<TransitionModel> \n{topology_text(topology)}<{name}> {len(tuples)} \n{rows}</{name}> \n<LogProbs> \n"
            f" [ {' '.join(map(str, logs))} ]\n</LogProbs> \n</TransitionModel> \n<DIMENSION> 39 <NUMPDFS> 9 \n"
        ).encode()
    members = sorted(phone for phones, _ in topology for phone in phones)
    entry_of = [
        -1,
        *(next(i for i, (phones, _) in enumerate(topology) if phone in phones) for phone in members),
    ]
    out = b"\0B<TransitionModel> <Topology> " + _ints(members) + _ints(entry_of)
    out += (_int(-1) if two else b"") + _int(len(topology))
    for _, states in topology:
        out += _int(len(states))
        for entering, staying, following in states:
            out += _int(entering) + (_int(staying) if two else b"") + _int(len(following))
            out += b"".join(_int(state) + _float(1 / len(following)) for state in following)
    out += b"</Topology> " + f"<{name}> ".encode() + _int(len(tuples))
    out += b"".join(_int(value) for row in tuples for value in row) + f"</{name}> <LogProbs> FV ".encode()
    out += _int(len(logs)) + struct.pack(f"<{len(logs)}f", *logs) + b"</LogProbs> </TransitionModel> "
    return out + b"<DIMENSION> " + _int(39) + bytes(range(256))


def spell(topology, runs: Sequence[tuple[int, int]], reorder: bool) -> list[int]:
    """Transition ids of (phone, frames) one after the other, each as long as its states at least."""
    ids = transition_ids(topology)
    found = []
    for phone, frames in runs:
        states = states_of(topology, phone)
        path = list(range(len(states) - 1))
        stays = [0] * len(path)
        for extra in range(frames - len(path)):
            stays[extra % len(path)] += 1
        for state, stay in zip(path, stays):
            following = states[state][2]
            onward = [ids[phone, state, following.index(state + 1)]]
            staying = [ids[phone, state, following.index(state)]] * stay if stay else []
            found += onward + staying if reorder else staying + onward
    return found


def write_archive(path: Path, alignments: Mapping[str, Sequence[int]], binary: bool) -> None:
    out = b""
    for key, ids in alignments.items():
        if binary:
            out += key.encode() + b" \0B" + _int(len(ids)) + b"".join(map(_int, ids))
        else:
            out += f"{key} {''.join(f'{value} ' for value in ids)}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(out))


def write_phones_txt(folder: Path, phones: Sequence[str] = PHONES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<eps>", *phones, "#0"]
    (folder / "phones.txt").write_text("".join(f"{name} {number}\n" for number, name in enumerate(names)))


def write_textgrid(
    path: Path, duration: float, tiers: Mapping[str, Sequence[tuple[float, float, str]]]
) -> None:
    """Long format; what lies between intervals has an empty label, as Praat wants it."""
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {duration:.10g}",
    ]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for number, (name, segments) in enumerate(tiers.items(), 1):
        filled, now = [], 0.0
        for start, end, label in segments:
            filled += [(now, start, "")] * (start > now) + [(start, end, label)]
            now = end
        filled += [(now, duration, "")] * (duration > now)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += [
            "        xmin = 0",
            f"        xmax = {duration:.10g}",
            f"        intervals: size = {len(filled)}",
        ]
        for place, (start, end, label) in enumerate(filled, 1):
            lines += [f"        intervals [{place}]:", f"            xmin = {start:.10g}"]
            lines += [f"            xmax = {end:.10g}", f'            text = "{label}"']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_cut(name: str, num_samples: int, items=None, words=None, text="a", start=0.0, **custom) -> MonoCut:
    """items, words: (symbol, start, end) of its alignment; start: in the recording, which is longer then."""
    duration = num_samples / SAMPLING_RATE
    kinds = {"phone": items, "word": words}
    alignment = {
        kind: [AlignmentItem(symbol, begin, round(end - begin, 8)) for symbol, begin, end in given]
        for kind, given in kinds.items()
        if given is not None
    }
    length = round(start * SAMPLING_RATE) + num_samples
    return MonoCut(
        id=name,
        start=start,
        duration=duration,
        channel=0,
        supervisions=[
            SupervisionSegment(
                f"{name}-said", f"{name}-rec", 0, duration, text=text, alignment=alignment or None
            )
        ],
        recording=Recording(
            f"{name}-rec",
            [AudioSource("file", [0], f"{name}.wav")],
            SAMPLING_RATE,
            length,
            length / SAMPLING_RATE,
        ),
        custom=custom or None,
    )


def make_experiment(
    where: Path, shards: Sequence[Sequence[MonoCut]], word_positions: bool = False, senones=None, **align
) -> Experiment:
    """Prepared, with these cuts in every labelled part; **align: settings."""
    config = Config(folder=str(where))
    lexicon = where.with_name(f"{where.name}-lexicon.txt")
    lexicon.parent.mkdir(parents=True, exist_ok=True)
    lexicon.write_text(LEXICON)
    config = dataclasses.replace(
        config,
        data=Data(lexicon=str(lexicon), word_positions=word_positions),
        align=dataclasses.replace(config.align, **{"jobs": 1, **align}),
        senones=senones or config.senones,
    )
    experiment = Experiment(config)
    experiment.create()
    for part in LABELLED_PARTS:
        for number, cuts in enumerate(shards):
            output = shard_path(experiment.path("features", part), "features", number)
            with PackedWriter(output, {}, {"values": ("float16", (192,))}) as writer:
                for cut in cuts:
                    frames = num_stacked_frames(round(cut.duration * SAMPLING_RATE), SAMPLING_RATE)
                    writer.write(cut.id, values=np.zeros((frames, 192), np.float16))
            lines = "".join(json.dumps(cut.to_dict()) + "\n" for cut in cuts)
            output.with_name(f"cuts.{number:06d}.jsonl").write_text(lines)
    return experiment
