"""The page of the report: its style and its parts. Everything that is text is escaped here and nowhere else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# One colour a role, on white and on dark; report_figures.py draws in the light ones and refers to them by name.
LIGHT = {
    "ink": "#1c2126",
    "soft": "#5c6670",
    "rule": "#d9dee3",
    "teacher": "#7a5197",
    "human": "#c8590a",
    "machine": "#0b6bb0",
    "third": "#118a68",
    "fourth": "#b83b80",
    "fifth": "#7d7412",
}
DARK = {
    "ink": "#e8ebee",
    "soft": "#9aa5b0",
    "rule": "#343c44",
    "teacher": "#c09ae0",
    "human": "#f5995a",
    "machine": "#62b0ee",
    "third": "#4fcba6",
    "fourth": "#ee8cc0",
    "fifth": "#cfc45a",
}
_OTHERS = {"paper": ("#ffffff", "#14181c"), "tint": ("#f4f6f8", "#1d2329"), "mark": ("#eaf3fb", "#162838")}


@dataclass(frozen=True)
class Html:
    """Text that is HTML already."""

    text: str


Text = str | Html


def join(parts: Iterable[Text], between: str = "") -> Html:
    return Html(between.join(render(part) for part in parts))


def render(text: Text) -> str:
    return text.text if isinstance(text, Html) else escape(text)


def element(tag: str, content: Text, css: str = "", **attributes: str) -> Html:
    """`css` is its class; attributes by name, with - for _."""
    given = ({"class": css} if css else {}) | attributes
    listed = "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in given.items())
    return Html(f"<{tag}{listed}>{render(content)}</{tag}>")


def paragraph(content: Text, css: str = "") -> Html:
    return element("p", content, css)


def code(lines: Sequence[str]) -> Html:
    return element("pre", element("code", "\n".join(lines)), tabindex="0")


def missing(what: str, command: str) -> Html:
    """Says what is not there yet, and the command that makes it."""
    return element("div", join([paragraph(what), code([command])]), "missing")


def figure(svg: str, caption: Text) -> Html:
    picture = element("div", Html(svg), "wide", tabindex="0")
    return element("figure", join([picture, element("figcaption", caption)]))


def table(
    head: Sequence[Text], rows: Sequence[Sequence[Text]], caption: Text, marked: int | None = None
) -> Html:
    """The first column names the rows; row number `marked` stands out."""
    top = element("tr", join(element("th", cell, scope="col") for cell in head))
    lines = []
    for number, row in enumerate(rows):
        cells = [element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])]
        lines.append(element("tr", join(cells), "marked" if number == marked else ""))
    content = element("table", join([element("thead", top), element("tbody", join(lines))]))
    return element(
        "figure", join([element("div", content, "wide", tabindex="0"), element("figcaption", caption)])
    )


def tiles(facts: Sequence[tuple[str, str]]) -> Html:
    """Figures with what they count."""
    return element(
        "dl", join(element("div", join([element("dt", n), element("dd", v)])) for v, n in facts), "tiles"
    )


def section(key: str, title: str, *content: Text) -> Html:
    return element("section", join([element("h2", title, id=key), *content]))


def page(title: str, lead: Sequence[Text], sections: Sequence[tuple[str, str, Html]]) -> str:
    """The whole document; sections as (key, title, content)."""
    links = [element("a", name, href=f"#{key}") for key, name, _ in sections]
    head = join([element("p", "teacherstudent", "brand"), element("h1", title), *lead])
    contents = element("nav", join(links), aria_label="Contents")
    body = join([element("header", join([head, contents])), element("main", join(s for _, _, s in sections))])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_variables()}{_STYLE}</style>\n</head>\n"
        f"<body>\n{render(body)}\n</body>\n</html>\n"
    )


def _variables() -> str:
    light = LIGHT | {name: values[0] for name, values in _OTHERS.items()}
    dark = DARK | {name: values[1] for name, values in _OTHERS.items()}
    sets = ["".join(f"--{name}: {value}; " for name, value in colours.items()) for colours in (light, dark)]
    return (
        f":root {{ {sets[0]}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {sets[1]}}} }}\n"
    )


_STYLE = """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { margin: .2rem 0 1.1rem; font-size: 1.9rem; letter-spacing: -.015em; }
h2 { margin: 0 0 .6rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 44rem; }
a { color: var(--machine); }
.brand { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .12em; text-transform: uppercase; }
.headline { padding: .9rem 1.1rem; max-width: none; border-left: .25rem solid var(--machine);
  border-radius: 0 .4rem .4rem 0; background: var(--mark); font-size: 1.15rem; }
.headline.open { border-color: var(--soft); background: var(--tint); }
.note, figcaption { color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.6rem 0 0; padding: .7rem 0;
  border-block: 1px solid var(--rule); font-size: .9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 2.8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: 1px; margin: 1.5rem 0 0;
  border: 1px solid var(--rule); border-radius: .5rem; overflow: hidden; background: var(--rule); }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .7rem .9rem;
  background: var(--paper); }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; letter-spacing: -.01em; line-height: 1.3; }
.tiles dt { color: var(--soft); font-size: .8rem; line-height: 1.4; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap; }
th:first-child { padding-left: .4rem; text-align: left; font-weight: 500; white-space: normal; min-width: 9rem; }
thead th { border-bottom: 2px solid var(--ink); color: var(--soft); font-size: .82rem; font-weight: 600;
  vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 2px solid var(--ink); }
.marked > * { background: var(--mark); }
.marked th, .marked strong { font-weight: 700; }
td small, th small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; line-height: 1.3; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; }
figure .wide { margin: 0 0 .4rem; }
figcaption { max-width: 44rem; }
svg { display: block; width: 100%; height: auto; min-width: 34rem; }
svg text { font-family: inherit; }
pre { margin: .5rem 0 1rem; padding: .75rem 1rem; overflow-x: auto; border: 1px solid var(--rule);
  border-radius: .4rem; background: var(--tint); font-size: .85rem; line-height: 1.5; }
code, .hash { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.hash { font-size: .8rem; overflow-wrap: anywhere; }
.missing { margin: .8rem 0; padding: .6rem 1rem .1rem; border: 1px dashed var(--soft); border-radius: .4rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
:focus-visible { outline: 2px solid var(--machine); outline-offset: 2px; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; } .headline { font-size: 1.05rem; }
}
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; } nav { display: none; }
  section { margin-top: 1.6rem; } figure, table, .missing, pre { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } svg { min-width: 0; }
  .headline, .marked > * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
