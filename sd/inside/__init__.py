"""Looking inside while a picture is made: shapes, attention, previews, films, and a report on one HTML page."""
