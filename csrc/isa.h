// Which instruction set the kernels use: chosen once, when the module is loaded.
#pragma once

#include <string>
#include <vector>

namespace headrace {

enum class Isa { portable, avx2, avx512 };

const char* isa_name(Isa isa);

// What this machine can run and this build holds, fastest first. "avx512" needs F, BW, VL, DQ, VNNI and BF16; "avx2" needs AVX2, FMA and F16C.
const std::vector<Isa>& supported_isas();

// HEADRACE_ISA if it is set, else the fastest. Throws std::runtime_error where the machine lacks what HEADRACE_ISA names.
Isa selected_isa();

}  // namespace headrace
