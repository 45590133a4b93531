"""What the tests share.

`networks`      networks, random and of integers, and what PyTorch's own layers make of them
`bounds`        how far rounding may take two computations apart
`comparison`    the same bits
`float64`       a call and its gradients against float64
`counting`      who computed what
`layouts`       the same values in other memory
`covering`      few cases instead of all combinations
`passes`        raw operators, pass by pass, against the reference
`bad_arguments` calls with something wrong in them
`transforms`    a transform of the network against the same of the native one
`fusing`        a model before `fuse`, after it and after `unfuse`
`classes`       classes of modules made of text
"""

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
    BACKENDS,
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
