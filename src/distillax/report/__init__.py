"""The report of a run, or of several: one self-contained HTML page."""
