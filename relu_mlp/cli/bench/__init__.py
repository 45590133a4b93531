"""How fast the layer is: what `relu-mlp bench` measures, and how.

plan.py        what is to be measured, and roughly how long that takes
candidates.py  the networks, and the ways of running them
turns.py       timing by turns, and what the times come to
roofline.py    the least time that a step can take
memory.py      the peak memory of a step
suite.py       runs a plan, and keeps what was found
report.py      rows of CSV files, lines for the terminal, tables for the README
plots.py       pictures of the CSV files; the only one that needs matplotlib
"""
