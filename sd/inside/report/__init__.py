"""How a picture came to be, on one HTML page that needs nothing else."""

from sd.inside.report.page import report, write_report

__all__ = ["report", "write_report"]
