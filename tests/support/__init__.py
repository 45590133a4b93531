"""Helpers that several tests share.

`backends`      the backends under which a test runs
`networks`      networks with random numbers or integers, and the same with PyTorch's own layers
`bounds`        bounds on the difference that rounding causes between two computations
`comparison`    comparisons of bits
`float64`       compares a call and its gradients with float64
`counting`      counts the calls of the operators and of PyTorch's own layers
`layouts`       the same values in other memory layouts
`covering`      few cases instead of all combinations
`passes`        compares the raw operators with the reference, pass by pass
`bad_arguments` calls with wrong arguments
`transforms`    compares a transform of the network with the same transform of the native one
`fusing`        compares a model before `fuse`, after it and after `unfuse`
`classes`       makes classes of modules from source text
"""

from .backends import (
    BACKENDS,
    WITH_NODE,
    backend,
    backend_fixture,
    node_enabled,
)
from .bounds import (
    ACTIVATION_TERMS,
    SMOOTH,
    Bounded,
    Exact,
    absolutes,
    assert_within,
    first_order_bounds,
    gamma,
    hidden_of,
    hidden_pre_activations,
    jacobian_magnitudes,
    majorant,
    native_jacobian,
)
from .classes import (
    class_from_source,
)
from .comparison import (
    assert_same,
    implementation_of,
    outcome,
    patterns,
)
from .counting import (
    PRODUCTS,
    backward_passes,
    count_calls,
    dispatched,
    saved_tensors,
)
from .float64 import (
    compare_with_float64,
)
from .layouts import (
    LAYOUTS,
    negated,
    rows_apart,
    transposed,
)
from .networks import (
    ACTIVATIONS,
    BIASES,
    DTYPES,
    THAT_SAVE_Y,
    by_name,
    gradients,
    integer_case,
    integer_network,
    integers,
    integers_,
    layers_of,
    leaves,
    make_case,
    make_case_with_target,
    make_network,
    module_of,
    native_mlp,
    twins,
)
