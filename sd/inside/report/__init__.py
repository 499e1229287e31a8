"""A report on how an image was made: one HTML page that needs no other file."""

from sd.inside.report.page import report, write_report

__all__ = ["report", "write_report"]
