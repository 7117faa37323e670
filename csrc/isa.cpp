#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace headrace {
namespace {

std::vector<Isa> find_supported() {
    std::vector<Isa> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        found.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(Isa::avx2);
#endif
    found.push_back(Isa::portable);
    return found;
}

Isa select() {
    const char* wanted = std::getenv("HEADRACE_ISA");
    if (wanted == nullptr || *wanted == 0) return supported_isas().front();
    std::string known;
    for (Isa isa : supported_isas()) {
        if (std::string(wanted) == isa_name(isa)) return isa;
        known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::runtime_error("HEADRACE_ISA is '" + std::string(wanted) + "'; this machine can run " + known);
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "portable";
    }
}

const std::vector<Isa>& supported_isas() {
    static const std::vector<Isa> supported = find_supported();
    return supported;
}

Isa selected_isa() {
    static const Isa selected = select();
    return selected;
}

}  // namespace headrace
