"""Looks inside while an image is made: shapes, attention, previews, films, and a report on one HTML page."""
