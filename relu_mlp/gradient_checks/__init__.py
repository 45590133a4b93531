"""`check_gradients`: a gradient by hand, by autograd and by central differences, compared.

check.py         `check_gradients`: this package's networks, and functions of a user's own
arguments.py     what a user passes, and what a user's backward function returns
comparison.py    the check itself: three gradients, and how far two may differ by rounding
differences.py   central differences, their uncertainty, and kinks
sensitivity.py   how far rounding can move a gradient, measured by perturbing the computation
report.py        the report that comes back
diagnosis.py     what a wrong gradient looks like
"""
