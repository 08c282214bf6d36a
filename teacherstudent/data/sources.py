"""The `corpus` step of data that were brought along: what [data] names, checked and as shards of cuts.

Each part (human, unlabelled, dev, test) is one of

    a folder of cuts.000000.jsonl, … (or .jsonl.gz)   used in place
    cuts.jsonl or cuts.jsonl.gz, or a folder that holds it
    a lhotse Shar folder (cuts.000000.jsonl.gz with recording.000000.tar, …)
    a Kaldi data folder (wav.scp, and segments, text, utt2spk where there are any)
    a folder of WAV and FLAC files at any depth, with transcripts.txt where the part is labelled, and utt2spk

All but the first are imported: corpus/PART/cuts.000000.jsonl, … of data.shard_utterances cuts each, dealt at random so
that every shard is a sample of the whole part (a shard of Shar stays one). Audio stays where it is, except that of a
Shar, which is unpacked; lexicon and language model are used in place. What cannot be used is listed in
corpus/PART/skipped.jsonl with the reason, and `prepare` counts it. Manifests and lists of files are hashed at every
run, so that changed data are noticed; the contents of audio files are not.
"""

import json
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from teacherstudent.config import Config
from teacherstudent.data.conditions import list_audio
from teacherstudent.data.data_folders import (
    KALDI_FILES,
    TRANSCRIPTS,
    WAV_SCP,
    Listing,
    Row,
    extract_shar,
    find_audio,
    list_audio_folder,
    list_kaldi,
    list_shar,
    make_cut,
    overshoots,
)
from teacherstudent.data.dataset import brought_folder, lexicon_path, source_shards
from teacherstudent.data.extraction import Unusable
from teacherstudent.data.manifests import LABELLED_PARTS, PARTS, read_entries
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file, hash_text, write_json, write_text

Kind = Literal["cuts", "manifest", "shar", "kaldi", "audio"]
_LANGUAGE_MODELS = ("lm.arpa", "lm.arpa.gz", "lm_text.txt")
_READERS = 8  # threads that read headers of audio files, one shard at a time
_OPEN_FILES = 256  # shards that are written at a time


def brings_data(config: Config) -> bool:
    """Whether the configuration names data, so that none are made."""
    return bool(config.data.folder or any(getattr(config.data, part) for part in PARTS))


def import_data(experiment: Experiment) -> list[Path]:
    """Import the parts that are not sharded cuts; returns all manifests that the experiment reads.

    Raises ValueError, before anything is written, for parts and files that are missing or of no known kind.
    """
    folders = {}
    for part in PARTS:
        folder = brought_folder(experiment, part)
        if folder is None:
            raise ValueError(
                f"data.{part} is not set: where data are brought along all of {', '.join(PARTS)} are, each by "
                "data.PART, or all as folders in data.folder"
            )
        folders[part] = folder
    kinds = {part: recognise(folder, part) for part, folder in folders.items()}
    _check_alignments(experiment.config, kinds)
    find_texts(experiment)
    outputs: list[Path] = []
    for part, folder in folders.items():
        made = experiment.path("corpus", part)
        if kinds[part] == "cuts":
            shutil.rmtree(made, ignore_errors=True)  # of data that had another form before
        else:
            _import_part(experiment, part, folder, kinds[part])
            outputs += [made / "source.json", made / "skipped.jsonl"]
        outputs += source_shards(experiment, part)
    return outputs


def _check_alignments(config: Config, kinds: Mapping[str, Kind]) -> None:
    without = [part for part in LABELLED_PARTS if kinds[part] in ("kaldi", "audio")]
    if without and config.align.source == "cuts":
        raise ValueError(
            f"align.source = 'cuts', but Kaldi folders and audio files hold no alignments: {', '.join(without)}. "
            'align.source = "transcripts" makes them from the transcripts; "kaldi", "ctm" and "textgrid" read those in '
            "align.folder"
        )


def find_texts(experiment: Experiment) -> list[Path]:
    """The lexicon and the language model, if one was brought along. Raises ValueError for one that is not there."""
    data = experiment.config.data
    texts = [lexicon_path(experiment)]
    if data.language_model:
        texts.append(Path(data.language_model))
    elif data.folder:
        texts += [path for name in _LANGUAGE_MODELS if (path := Path(data.folder, name)).is_file()][:1]
    for path in texts:
        if not path.is_file():
            raise ValueError(
                f"no {path}: data that are brought along need a lexicon, `WORD PHONE PHONE …` a line: lexicon.txt in "
                "data.folder, or data.lexicon; and data.language_model where it is set"
            )
    return texts


def recognise(folder: Path, part: str) -> Kind:
    """What lies there. Raises ValueError for nothing that is known."""
    if folder.is_file() and folder.name.endswith((".jsonl", ".jsonl.gz")):
        return "manifest"
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}: the data need the parts {', '.join(PARTS)}, and lexicon.txt; set data.folder (or "
            f"data.{part}), or leave it out and the corpus step makes speech"
        )
    if any(folder.glob("recording.*.tar")):
        return "shar"
    if any(folder.glob("cuts.*.jsonl")) or any(folder.glob("cuts.*.jsonl.gz")):
        return "cuts"
    if _find_manifest(folder).is_file():
        return "manifest"
    if (folder / WAV_SCP).is_file():
        return "kaldi"
    if (folder / TRANSCRIPTS).is_file() or list_audio(folder):
        return "audio"
    raise ValueError(
        f"{folder} holds nothing that can be read as a part of the data: lhotse cuts (cuts.*.jsonl), a lhotse Shar "
        f"folder, a Kaldi data folder ({WAV_SCP}), or WAV and FLAC files with {TRANSCRIPTS} are needed"
    )


def _find_manifest(path: Path) -> Path:
    if path.is_file():
        return path
    return next((found for found in (path / "cuts.jsonl", path / "cuts.jsonl.gz") if found.is_file()),
                path / "cuts.jsonl")  # fmt: skip


def _import_part(experiment: Experiment, part: str, folder: Path, kind: Kind) -> None:
    """Into a folder that gets its name when it is whole; nothing is done when it comes from the same data."""
    made = experiment.path("corpus", part)
    data, seed = experiment.config.data, experiment.config.seed
    source = {
        "kind": kind,
        "shard_utterances": data.shard_utterances,
        "seed": seed,
        "files": _describe(folder, kind),
    }
    if (made / "source.json").is_file() and json.loads((made / "source.json").read_text()) == source:
        return
    partial_folder = made.with_name(f".{part}.partial")
    for old in (partial_folder, made):
        shutil.rmtree(old, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    print(f"corpus: importing {part} from {folder}", flush=True)
    skipped: list[tuple[str, str]] = []
    if kind == "shar":
        skipped = _import_shar(folder, partial_folder)
    elif kind == "manifest":
        _import_manifest(_find_manifest(folder), partial_folder, partial(_deal, experiment, part))
    else:
        listing = (list_kaldi if kind == "kaldi" else list_audio_folder)(folder, part in LABELLED_PARTS)
        skipped = _import_rows(folder, listing, partial_folder, partial(_deal, experiment, part))
    lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in skipped]
    write_text(partial_folder / "skipped.jsonl", "".join(lines))
    write_json(partial_folder / "source.json", source)
    partial_folder.replace(made)


def _describe(folder: Path, kind: Kind) -> dict[str, str]:
    """Hashes of what the import reads, but of audio only names and sizes; missing audio may come back."""
    if kind == "manifest":
        return {_find_manifest(folder).name: hash_file(_find_manifest(folder))}
    if kind == "shar":
        pairs = list_shar(folder)
        sizes = [f"{recordings.name} {recordings.stat().st_size}" for _, recordings in pairs]
        return {cuts.name: hash_file(cuts) for cuts, _ in pairs} | {"recordings": hash_text("\n".join(sizes))}
    names = KALDI_FILES if kind == "kaldi" else (TRANSCRIPTS, "utt2spk")
    found = {name: hash_file(folder / name) for name in names if (folder / name).is_file()}
    if kind == "kaldi":
        audio = {name: folder / place for name, place in find_audio(folder).items()}
    else:
        audio = {path.relative_to(folder).as_posix(): path for path in list_audio(folder)}
    sizes = [f"{name} {path.stat().st_size if path.is_file() else None}" for name, path in audio.items()]
    return found | {"audio": hash_text("\n".join(sizes))}


def _deal(experiment: Experiment, part: str, num_utterances: int) -> Iterator[np.ndarray]:
    """The numbers of the utterances of each shard, ascending: as many in each, drawn at random from the whole part."""
    size = experiment.config.data.shard_utterances
    order = np.random.default_rng([experiment.config.seed, zlib.crc32(f"import {part}".encode())])
    numbers = order.permutation(num_utterances)
    for shard in np.array_split(numbers, max(1, -(-num_utterances // size))):
        yield np.sort(shard)


Deal = Callable[[int], Iterator[np.ndarray]]


def _import_rows(folder: Path, listing: Listing, output: Path, deal: Deal) -> list[tuple[str, str]]:
    """Returns what was left out."""
    if not listing.rows:
        examples = {reason: name for name, reason in reversed(listing.skipped)}
        counts = Counter(reason for _, reason in listing.skipped).most_common(5)
        reasons = "; ".join(
            f"{count} x {reason}, for instance {examples[reason]}" for reason, count in counts
        )
        raise ValueError(f"{folder} holds no utterance that can be used{f' ({reasons})' if reasons else ''}")
    skipped, num_overshooting = list(listing.skipped), 0

    def read(row: Row) -> tuple[str, bool] | Unusable:
        try:
            cut = make_cut(folder, row)
        except Unusable as error:
            return error
        return json.dumps(cut.to_dict()) + "\n", overshoots(row, cut)

    with ThreadPoolExecutor(_READERS) as pool:
        for number, chosen in enumerate(deal(len(listing.rows))):
            rows, lines = [listing.rows[index] for index in chosen], []
            for row, found in zip(rows, pool.map(read, rows)):
                if isinstance(found, Unusable):
                    skipped.append((row.id, str(found)))
                else:
                    lines.append(found[0])
                    num_overshooting += found[1]
            write_text(output / f"cuts.{number:06d}.jsonl", "".join(lines))
    if num_overshooting:
        warnings.warn(
            f"{folder / 'segments'}: {num_overshooting} segments end after their recording, by less than half a "
            "second: they end with it",
            stacklevel=4,
        )
    return skipped


def _import_manifest(manifest: Path, output: Path, deal: Deal) -> None:
    """Lines are dealt as they are; of every utterance only the number of its shard is held in memory."""
    num_utterances = sum(1 for _ in read_entries(manifest))
    if not num_utterances:
        raise ValueError(f"{manifest} holds no cut")
    shard_of = np.zeros(num_utterances, np.int32)
    num_shards = 0
    for number, chosen in enumerate(deal(num_utterances)):
        shard_of[chosen], num_shards = number, number + 1
    for first in range(0, num_shards, _OPEN_FILES):
        last = min(first + _OPEN_FILES, num_shards)
        files = [
            (output / f"cuts.{number:06d}.jsonl").open("w", encoding="utf-8") for number in range(first, last)
        ]
        for number, entry in zip(shard_of.tolist(), read_entries(manifest), strict=True):
            if first <= number < last:
                files[number - first].write(json.dumps(entry) + "\n")
        for file in files:
            file.close()


def _import_shar(folder: Path, output: Path) -> list[tuple[str, str]]:
    """Returns what was left out."""
    skipped = []
    for number, (cuts, recordings) in enumerate(list_shar(folder)):
        lines = []
        for name, cut in extract_shar(cuts, recordings, output / "audio" / f"{number:06d}"):
            if isinstance(cut, Unusable):
                skipped.append((name, str(cut)))
            else:
                lines.append(json.dumps(cut.to_dict()) + "\n")
        write_text(output / f"cuts.{number:06d}.jsonl", "".join(lines))
    return skipped
