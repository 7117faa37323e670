// Which instruction sets the kernels are built for, and which of them this processor runs.
#pragma once

#include <optional>
#include <string_view>

namespace headrace {

enum class Isa {
    portable,  // C++ alone
    avx2,      // AVX2, FMA, F16C
    avx512,    // AVX-512 F, BW, DQ, VL, VBMI, VNNI, and BF16
};

// True where the processor (and the operating system) runs this set.
bool isa_runs(Isa isa);

// The widest set that runs here.
Isa best_isa();

const char* isa_name(Isa isa);
std::optional<Isa> isa_from_name(std::string_view name);

}  // namespace headrace
