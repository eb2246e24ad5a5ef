"""The report of a run, and the comparison of several: one HTML file that holds everything, and Markdown."""

from moe_lightning.files import distinct_names
from moe_lightning.reporting.report.comparison import comparison_text, write_comparison
from moe_lightning.reporting.report.read import Run, read_run
from moe_lightning.reporting.report.summary import damage_of, summary_text
from moe_lightning.reporting.report.write import write_report

__all__ = [
    "Run",
    "comparison_text",
    "damage_of",
    "distinct_names",
    "read_run",
    "summary_text",
    "write_comparison",
    "write_report",
]
