"""`check_gradients`: a gradient by hand, by autograd and by central differences, compared.

check.py         `check_gradients`: networks, functions with a backward pass, and what brings its
                 derivative along
arguments.py     what a user passes, and what a user's backward function returns
arrays.py        functions that are written in NumPy
operators.py     a Function, an operator or a module as a function to check
modes.py         second derivatives, forward mode, vmap, and torch.autograd.gradcheck
comparison.py    the check itself: three gradients, and how far two may differ by rounding
differences.py   central differences, their uncertainty, and kinks
sensitivity.py   how far rounding can move a gradient, measured by perturbing the computation
rounding.py      units in the last place, and what is allowed for rounding
report.py        the report that comes back

What a wrong gradient is told:

tape.py          the forward pass as a list of operations, and backward passes with mistakes
hypotheses.py    the mistakes that people make, as changes of the right backward pass
relations.py     what two gradients have to do with one another: a factor, a transpose, a sum
search.py        which mistake makes the gradient that was handed in
wording.py       the sentences
"""
