"""What a run looks like: figures, report.html, a comparison, and text. From the table alone, no torch.

write_figures(run)      figures/ of a run folder
write_html(run_dir)     report.html, one file that opens offline
compare(run_dirs)       several runs on one scale
summary(table, ...)     the end of a trace in a terminal
"""

from mismatch.report.html import write_html
from mismatch.stages.trace.report.comparison import compare
from mismatch.stages.trace.report.words import summary, verdict

__all__ = ["compare", "summary", "verdict", "write_html"]
