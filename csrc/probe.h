// What the machine can do at most: the ceilings that benchmarks print beside their rates.
#pragma once

#include <cstddef>

#include "isa.h"
#include "pool.h"

namespace headrace {

// GB/s of one pass over `bytes` of memory that all threads share, the best of a few.
double read_bandwidth(Isa isa, Pool& pool, size_t bytes);
// 10^9 integer operations a second (a multiplication and an addition are two) of int8 products out of registers, on all threads.
double int8_peak(Isa isa, Pool& pool);

}  // namespace headrace
