"""Laws of the report: one page, all that is there, honest about the rest."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch

from teacherstudent.config import Config, Distributed, Schedule, Student, to_toml
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.decoding.speed import write_speeds
from teacherstudent.reporting.report import write_report
from teacherstudent.reporting.report_data import Findings, read_curves, senone_phones
from teacherstudent.store import TargetWriter
from teacherstudent.training.schedule import Plan
from teacherstudent.tying.senones import Inventory

torch.set_num_threads(1)

NUM_SENONES = 60
CONDITIONS = {"all": 0, "clean": -3, "20dB": -1, "10dB": 4}
STUDENTS = {
    "human-only": {"schedule": {"mode": "human-only"}, "optimisation": {"method": "exact"}},
    "gtc": {"optimisation": {"method": "gtc"}},
    "bmuf": {"optimisation": {"method": "bmuf"}},
}
LABELS = {
    "teacher": "teacher",
    "human-only-final": "human only, as many updates",
    "human-only-early": "human only, early-stopped",
    "gtc": "machine and human, GTC",
    "bmuf": "machine and human, BMUF",
}
RATES = {"teacher": 9.1, "human-only-final": 14.8, "human-only-early": 15.2, "gtc": 11.6, "bmuf": 12.4}
_UNSURE = "Where an interval holds zero, these test speakers cannot tell the two apart."
REDUCTIONS = {"gtc": (21.6, [12.2, 30.4]), "bmuf": (16.2, [5.8, 26.1])}

SPEEDS = {
    name: {
        "parameters": 78_600_000 if name == "teacher" else 24_300_000,
        "network_frames_per_second": 1000.0 if name == "teacher" else 3456.0,
        "network_real_time_factor": 0.0333,
        "real_time_factor": 0.0456,
    }
    for name in LABELS
}


def write_config(folder):
    student = Student(schedule=Schedule(steps=400, validate_every_steps=40), variants=STUDENTS)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(Config(), student=student, distributed=Distributed(workers=2))
    (folder / "config.toml").write_text(to_toml(config))


def write_results(folder, reductions=REDUCTIONS, labels=LABELS):
    systems = {}
    for name, rate in RATES.items():
        conditions = {}
        for condition, more in CONDITIONS.items():
            value = rate + more
            counts = {"words": 4000, "substitutions": 300, "insertions": 60, "deletions": 120, "errors": 480}
            interval = [value - 1.4, value + 1.5]
            conditions[condition] = counts | {
                "word_error_rate": value,
                "interval": interval,
                "utterances": 500,
            }
        systems[name] = {
            "kind": "teacher" if name == "teacher" else "student",
            "label": labels[name],
            "method": "exact",
            "learning_rate": 0.5,
            "parameters": 78_600_000 if name == "teacher" else 24_300_000,
            "acoustic_scale": 0.7,
            "word_penalty": 0.25,
            "frame_error": {"dev": 30.1, "test": 31.7},
            "frame_cross_entropy": {"dev": 1.21, "test": 1.34},
            "conditions": conditions,
            "by": {"speaker": {"anne & co": conditions["clean"], "bo": conditions["20dB"]}},
        }
    comparisons = [
        {"system": name, "baseline": "human-only-final", "relative_reduction": value, "interval": interval}
        | {"p_value": 0.0123, "matched_pairs": {"statistic": 2.4, "p_value": 0.0164}}
        for name, (value, interval) in reductions.items()
    ]
    results = {
        "systems": systems,
        "comparisons": comparisons,
        "baseline": "human-only-final",
        "left_out": {"dev": 0, "test": 3},
        "without_labels": {"dev": 1, "test": 2},
    }
    (folder / "evaluate").mkdir(exist_ok=True)
    write_speeds(folder / "evaluate" / "speed.json", SPEEDS, "teacher")
    (folder / "evaluate" / "results.json").write_text(json.dumps(results, sort_keys=True))


def write_log(path, draw, sources, steps=400, bytes_a_step=0, density=None):
    path.parent.mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        for source in sources:
            loss = 1.2 + 3 * np.exp(-step / 90) + 0.08 * draw.normal()
            line = {"step": step, "source": source, "loss": loss, "frame_error": None, "learning_rate": 0.1}
            lines.append(line | {"hours": step / 60, "bytes_sent": step * bytes_a_step, "density": density})
        if step % 40 == 0:
            dev = 1.4 + 3 * np.exp(-step / 90)
            figures = {"dev_loss": dev, "dev_frame_error": 22 * dev}
            lines.append({"step": step, "source": "human", **figures})
            lines.append({"step": step, "source": "machine", "held_out_loss": dev})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_logs(folder, draw):
    write_log(folder / "teacher" / "log.jsonl", draw, ["human"], bytes_a_step=6_000_000)
    write_log(folder / "students" / "human-only" / "log.jsonl", draw, ["human"], bytes_a_step=2_000_000)
    both = ["machine", "human"]
    write_log(folder / "students" / "gtc" / "log.jsonl", draw, both, bytes_a_step=21_000, density=0.01)
    write_log(folder / "students" / "bmuf" / "log.jsonl", draw, both, bytes_a_step=200_000)


def write_speech(folder, draw):
    """Features of both parts, targets, an inventory: tones that rise and senones that follow one another."""
    lengths = {"too-short": 20, "utterance <7>": 110}
    for part in ("human", "unlabelled"):
        with PackedWriter(
            shard_path(folder / "features" / part, "features", 0), {}, {"values": ("float16", (192,))}
        ) as writer:
            for name, length in lengths.items():
                time, band = np.arange(3 * length)[:, None], np.arange(64)
                ridge = np.exp(-((band - 12 - 40 * (np.sin(time / 40) ** 2)) ** 2) / 30)
                log_mel = -9 + 7 * ridge + 0.4 * draw.normal(size=(3 * length, 64))
                writer.write(name, values=log_mel.reshape(length, 192).astype("float16"))
    with TargetWriter(
        shard_path(folder / "targets", "targets", 0),
        NUM_SENONES,
        20,
        {"teacher": "abc<", "numeric_mode": "fp32"},
    ) as writer:
        for name, length in lengths.items():
            place = np.arange(length)[:, None] / length * NUM_SENONES
            near = -((np.arange(NUM_SENONES) - place) ** 2) / 40 + 0.3 * draw.normal(
                size=(length, NUM_SENONES)
            )
            writer.write(name, torch.from_numpy(near))
    make_inventory().save(folder / "senones" / "inventory.json")


def make_inventory():
    """30 phones of two states, no questions: a senone each, but the two states of the last phone share a tree."""
    phones = ("SIL", *(f"p{number}" for number in range(1, 30)))
    roots = (*((~(2 * number), ~(2 * number + 1)) for number in range(29)), (0, 0))
    return Inventory(
        phones, ((0,),), ((0, 0, ~58, ~59),), roots, NUM_SENONES, np.full(NUM_SENONES, 1 / NUM_SENONES)
    )


def make_experiment(folder):
    draw = np.random.default_rng(0)
    write_config(folder)
    (folder / "senones").mkdir()
    write_speech(folder, draw)
    write_logs(folder, draw)
    write_results(folder)
    (folder / "steps").mkdir()
    record = {"inputs": {}, "outputs": {"teacher/best.pt": "0" * 64, "teacher/final.pt": "1" * 64}}
    (folder / "steps" / "teacher.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("report") / "experiment")


@pytest.fixture(scope="module")
def text(experiment):
    path = write_report(experiment)
    assert path == experiment / "report.html"
    return path.read_text(encoding="utf-8")


def plain(text):
    return re.sub(
        r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<(style|svg).*?</\1>", "", text, flags=re.DOTALL))
    )


class Checker(html.parser.HTMLParser):
    """Every element that is opened is closed, in order; ids and what refers to them."""

    EMPTY = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        links = [given.get("href"), given.get("xlink:href"), given.get("clip-path"), given.get("src")]
        self.references += [link for link in links if link]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_outside(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    for reference in checker.references:
        inside = re.fullmatch(r"#(.+)|url\(#(.+)\)", reference)
        assert reference.startswith("data:image/png;base64,") or (inside[1] or inside[2]) in checker.ids
    assert "http" not in text and "@import" not in text


def test_every_picture_says_in_words_what_it_shows(text):
    assert text.count("<svg ") == text.count('role="img" aria-label="') == 5
    assert text.count("<figure") == text.count("<figcaption>") == text.count("<svg ") + text.count("<table")


def test_the_headline_says_by_how_much_each_student_beats_the_better_baseline(text):
    headline = re.search(r'<p class="headline">(.*?)</p>', text)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert "(“human only, as many updates”, 14.8 %)" in headline
    assert (
        "“machine and human, GTC” 21.6 % fewer (11.6 %; 95 % interval of the reduction 12.2–30.4 %)"
        in headline
    )
    assert (
        "“machine and human, BMUF” 16.2 % fewer (12.4 %; 95 % interval of the reduction 5.8–26.1 %)"
        in headline
    )


@pytest.mark.parametrize(
    ("reductions", "needed"),
    [
        (
            [(-4.0, [-12.0, 3.0])],
            ["Machine labels do not help here", "4.0 % more", "−12.0 to 3.0 %", _UNSURE],
        ),
        ([(-9.0, [-12.0, -3.0])], ["Machine labels do not help here", "9.0 % more", "−12.0 to −3.0 %"]),
        ([(0.0, [-1.0, 1.0])], ["do not help here", "“machine and human, GTC” as many (11.6 %", _UNSURE]),
        ([(0.04, [0.0, 0.1])], ["do not help here", "“machine and human, GTC” as many (11.6 %", _UNSURE]),
        ([(5.0, [-2.0, 11.0])], ["speakers students", "make fewer word errors", "5.0 % fewer", _UNSURE]),
        ([(5.0, [0.0, 11.0])], ["make fewer word errors", "5.0 % fewer", "0.0–11.0 %", _UNSURE]),
        ([(5.0, [0.04, 11.0])], ["make fewer word errors", "0.0–11.0 %", _UNSURE]),
        (
            [(9.0, [2.0, 11.0]), (-7.0, [-9.0, -5.0])],
            ["some students", "and some do not", "9.0 % fewer", "7.0 % more"],
        ),
        ([(None, [None, None])], ["do not help here", "“machine and human, GTC” more (11.6 %)"]),
    ],
)
def test_the_headline_is_honest_when_there_is_no_gain_or_no_certainty(tmp_path, reductions, needed):
    write_config(tmp_path)
    write_results(tmp_path, dict(zip(("gtc", "bmuf"), reductions)))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    headline = re.search(r'<p class="headline open">(.*?)</p>', text)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert all(part in headline for part in needed)
    assert (_UNSURE in headline) == (_UNSURE in needed)


def test_conditions_come_from_clean_to_loud_and_what_has_no_value_is_a_dash(tmp_path):
    write_config(tmp_path)
    write_results(tmp_path, {"gtc": (None, [None, 0.0])})
    path = tmp_path / "evaluate" / "results.json"
    results = json.loads(path.read_text())
    for row in results["systems"].values():
        row["conditions"] |= dict.fromkeys(("1.2.3dB", "snr5", "bus"), row["conditions"]["clean"])
    path.write_text(json.dumps(results))
    assert Findings(tmp_path).conditions == ["all", "clean", "20dB", "10dB", "snr5", "1.2.3dB", "bus"]
    assert "– to 0.0 %" in plain(write_report(tmp_path).read_text(encoding="utf-8"))


def test_the_table_has_every_system_and_condition_with_its_interval(text):
    rows = re.findall(r"<tr.*?</tr>", text)
    head = next(row for row in rows if "Parameters" in row)
    assert plain(head).split()[3:9] == ["all", "test", "speakers", "clean", "20dB", "10dB"]
    names = [label for label in re.findall(r'<th scope="row">(.*?)</th>', text) if label in LABELS.values()]
    assert names[:3] == [LABELS["teacher"], LABELS["human-only-early"], LABELS["human-only-final"]]
    assert names[3:5] == [LABELS["gtc"], LABELS["bmuf"]]
    teacher = plain(next(row for row in rows if ">teacher</th>" in row))
    assert "9.1 7.7–10.6" in teacher and "13.1 11.7–14.6" in teacher and "78.6 M" in teacher
    best = next(row for row in rows if 'class="marked"' in row)
    assert LABELS["gtc"] in best


def test_tables_by_field_p_values_speeds_and_what_no_figure_counts_are_there(text):
    for row in ("anne &amp; co", "0.012", "0.016", "3,456", "3.5", "0.0456", "dev 1.21", "0.25"):
        assert row in text
    assert "3 test utterances could not be used and are in no figure" in text
    assert "2 test utterances have no alignment and are in no frame error" in text


def test_bytes_sent_and_density_come_from_the_logs(text):
    rows = [plain(row) for row in re.findall(r"<tr.*?</tr>", text)]
    assert any(re.fullmatch(r" *gtc +gtc +400 +8.4 MB +21 kB +0.01 *", row) for row in rows)
    assert any(re.fullmatch(r" *bmuf +bmuf +400 +80 MB +200 kB +– *", row) for row in rows)


def test_the_posteriorgram_shows_an_utterance_of_a_few_seconds_and_names_phones(text):
    assert "The unlabelled utterance utterance &lt;7&gt;" in text
    assert len(re.findall(r">p[0-9]+[₀₁]<", text)) > 20


def test_everything_that_is_text_is_escaped(tmp_path):
    write_config(tmp_path)
    write_results(tmp_path, labels=LABELS | {"gtc": "<script>alert('$x$')</script>"})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_commands_to_go_on_with_are_those_of_the_command_line(experiment, text, monkeypatch):
    from teacherstudent.cli import _parser

    commands = re.findall(
        r"(?:teacherstudent|launch/\w+\.sh 4) ((?:run|evaluate|report|store) [^\n<]+)",
        html.parser.unescape(text),
    )
    assert len(commands) >= 6
    for command in commands:
        _parser().parse_args(command.split())


def test_the_provenance_lists_the_hashes_of_steps_and_of_the_store(experiment, text):
    assert re.search(r'<th scope="row">teacher</th><td>2</td><td><span class="hash">[0-9a-f]{64}<', text)
    assert '<span class="hash">abc&lt;</span>' in text


def test_the_same_experiment_gives_the_same_page(experiment, text):
    assert write_report(experiment).read_text(encoding="utf-8") == text


def test_a_new_experiment_says_what_is_missing_and_how_to_make_it(tmp_path, monkeypatch):
    write_config(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    text = write_report(tmp_path / "new").read_text(encoding="utf-8")
    for step in ("teacher", "label", "student", "evaluate"):
        assert f"<code>teacherstudent {step} new/config.toml folder=new</code>" in text
    assert "human-only, gtc, bmuf" in text
    assert str(tmp_path) not in text


def test_a_folder_that_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.toml"):
        write_report(tmp_path)


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10, "source": "human", "loss": 2.5, "bytes_sent": 0}\n{"step": 20, "sou')
    assert read_curves("x", path).train["human"]["loss"].tolist() == [2.5]
    path.write_text('{"step": 10, "sou\n{"step": 20}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1 is not JSON"):
        read_curves("x", path)


def test_senones_are_named_after_all_phones_whose_trees_lead_to_them():
    phones = senone_phones(make_inventory())
    assert phones[0] == ["SIL₀"] and phones[3] == ["p1₁"]
    assert phones[58] == phones[59] == ["p29₀", "p29₁"]


def test_a_long_schedule_is_drawn_with_few_points_of_both_sources():
    from teacherstudent.reporting.report_figures import _spread

    plan = Plan(Schedule(steps=1_000_000), 0.1)
    steps = _spread(len(plan))
    assert len(steps) < 20_000
    assert {plan[step].source for step in steps} == {"human", "machine"}
    assert steps[0] == 0 and steps[-1] == 999_999


@pytest.mark.system
def test_a_browser_shows_the_page_and_misses_nothing(experiment, text, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    page = (experiment / "report.html").resolve().as_uri()
    done = subprocess.run(
        [browser, *options, "--window-size=1100,3000", page], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "ERR_" not in done.stderr
    picture = matplotlib.image.imread(tmp_path / "page.png")
    assert picture.shape[:2] == (3000, 1100)
    assert (
        len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100
    )  # text and curves, no blank page


def test_an_utterance_that_was_not_labelled_is_not_the_one_shown(tmp_path):
    folder = make_experiment(tmp_path / "experiment")
    with PackedWriter(
        shard_path(folder / "features" / "unlabelled", "features", 0), {}, {"values": ("float16", (192,))}
    ) as writer:
        for name in ("left out", "utterance <7>"):
            writer.write(name, values=np.zeros((110, 192), "float16"))
    assert "The unlabelled utterance utterance &lt;7&gt;" in write_report(folder).read_text(encoding="utf-8")


def test_labels_without_stored_features_are_not_said_to_be_missing(tmp_path):
    folder = make_experiment(tmp_path / "experiment")
    shard_path(folder / "features" / "unlabelled", "features", 0).unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "No utterance to show" in text and "has not labelled anything" not in text
