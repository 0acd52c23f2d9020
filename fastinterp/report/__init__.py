"""The self-contained HTML page of a scan, and the table of its strongest heads."""

from fastinterp.report.html import write_html
from fastinterp.report.tables import TopHeads, top_heads

__all__ = ["TopHeads", "top_heads", "write_html"]
