"""The benchmark behind `relu-mlp bench`. Nothing else in the package imports it.

command.py     the command
plan.py        the plan of a benchmark, and an estimate of its duration
candidates.py  the networks of the suite, and the ways to run them
turns.py       timing by turns, and the figures that follow from it
roofline.py    the shortest time that a step can take
memory.py      the peak memory of a step
suite.py       runs a plan and stores the results
report.py      results as CSV files, as lines for the terminal, and as Markdown
plots.py       pictures of the CSV files; the only module that needs matplotlib
"""
