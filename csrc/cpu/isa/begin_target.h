// Everything between this header and end_target.h is compiled for the x86
// instruction set that the including file names:
//   RELU_MLP_ISA                the namespace of its kernels
//   RELU_MLP_TARGET             its instructions, for the attribute `target`
//   RELU_MLP_VECTOR_BYTES       the width of a vector
//   RELU_MLP_VECTOR_REGISTERS   the number of vector registers
//
// Headers whose inline functions must run on every processor are included here,
// before the instructions change. (No include guard: the compiler's state is
// what matters.)
#include <immintrin.h>

#include <utility>

#include "isa.h"

#define RELU_MLP_PRAGMA(text) _Pragma(#text)
#define RELU_MLP_PRAGMA_OF(...) RELU_MLP_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
RELU_MLP_PRAGMA_OF(clang attribute push(
    __attribute__((target(RELU_MLP_TARGET))),
    apply_to = function))
#else
RELU_MLP_PRAGMA_OF(GCC target(RELU_MLP_TARGET))
#endif

#include "../kernels/x86.h"
