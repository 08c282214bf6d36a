"""The `report` step: one self-contained HTML page of an experiment, with whatever of it is there.

No script, no external resource; readable on a telephone, in the dark and on paper.
"""

from pathlib import Path

from teacherstudent import wheels
from teacherstudent.files import write_text


def write_report(folder: Path) -> Path:
    """Write folder/report.html and return its path.

    Needs config.toml; any other part may be missing, and the page then names the command that makes it. Raises
    ValueError, naming the file, for parts that are there but damaged, and without the matplotlib wheel.
    """
    wheels.load("matplotlib", "report")
    from teacherstudent.reporting.report_data import Findings
    from teacherstudent.reporting.report_sections import build_page

    path = Path(folder) / "report.html"
    write_text(path, build_page(Findings(Path(folder))))
    return path
