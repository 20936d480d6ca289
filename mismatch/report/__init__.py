"""What a run looks like, from its table alone: no torch, and nothing of any stage.

page, html     pieces of HTML; the report of one run
figures        what a figure of a report is
heatmap        the shift heatmap
quantity       from rows of the long table to what is drawn
style, words   how figures look and how numbers are written; words that stages share

Each stage registers its own figures and sections: mismatch/stages/reporting.py.
"""
