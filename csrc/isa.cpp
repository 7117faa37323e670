#include "isa.h"

namespace headrace {

bool isa_runs(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16");
#else
    const bool avx2 = false, avx512 = false;
#endif
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2: return avx2;
        case Isa::avx512: return avx512;
    }
    return false;
}

Isa best_isa() {
    if (isa_runs(Isa::avx512)) return Isa::avx512;
    return isa_runs(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
    }
    return "";
}

std::optional<Isa> isa_from_name(std::string_view name) {
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
        if (name == isa_name(isa)) return isa;
    return std::nullopt;
}

}  // namespace headrace
