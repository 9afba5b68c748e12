"""One self-contained HTML page about a run and the runs it came from, made of their JSON files alone.

runs (what the files say) → chart, markup (how things are drawn) → overview, curves, growth, course, scores,
samples, details (the sections) → page (the whole).
"""

from t5pegasus.report.page import write_report

__all__ = ["write_report"]
