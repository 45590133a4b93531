"""`fuse`: replaces the ReLU networks in a model by calls of the operators.

patching.py       `fuse` and `unfuse`: which modules of a model get another class
report.py         the modules that `fuse` replaced, and those that it left, with the reason
sequential.py     `FusedSequential`: an `nn.Sequential` that runs its networks fused
rules.py          `register_fusion`: which Linears of a class form one network
known_models.py   the rules that come with the package: Transformer layers, T5, OPT
classes.py        the subclass that a module with a rule gets
matching.py       whether a module matches its rule, and if not, why
conditions.py     which layers can be fused, and which do nothing
calls.py          a fused call: with an operator, or layer by layer
recognition.py    the networks in a method, found in its source and replaced there
steps.py          the calls that a hidden tensor goes through, in an expression
statements.py     networks whose hidden tensors are in variables
source.py         functions and their source
"""
