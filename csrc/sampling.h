// Choosing a token from logits by temperature, top-k, top-p, min-p and a seed: the compiled twin of src/headrace/sampling.py, which
// states every operation and its order; the tokens are the same to the last.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace headrace {

// How to choose from one row of logits. The Python side fills arrays of these: SAMPLE in kernels/native.py.
struct SampleSpec {
    double temperature;  // 0: greedy
    double top_p;        // 1: off
    double min_p;        // 0: off
    uint64_t seed;
    int32_t top_k;  // 0: off
    uint32_t sample_index;
    int32_t slot;     // last_token slot that takes the token; -1: none
    uint8_t choose;   // whether to choose a token at all
    uint8_t logits;   // whether to give back the row's logits
    uint8_t unused[2];
};
static_assert(sizeof(SampleSpec) == 48);

struct SampleScratch {
    std::vector<int32_t> ids;
    std::vector<float> logits;
    std::vector<double> weights;
    std::vector<double> sums;
    std::vector<uint64_t> keys;
};

// A uniform number in [0, 1) with 53 bits: Philox4x32-10 (Salmon et al. 2011) of (position, sample_index, 0, 0) under the seed.
double philox_uniform(uint64_t seed, uint32_t sample_index, uint32_t position);

// The token at `position`, from finite logits [vocab] whose greatest is `best`; temperature > 0.
int32_t sample(Isa isa, const float* logits, int vocab, const SampleSpec& spec, int32_t position, float best, SampleScratch& scratch);

}  // namespace headrace
