#include "sampling.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <span>

namespace headrace {

#define HEADRACE_DECLARE(isa)                                                                       \
    namespace isa {                                                                                 \
    void sampling_weights(const float* logits, int n, float best, double divisor, double* out);     \
    void sampling_block_sums(const double* weights, int n, double* sums);                           \
    void sampling_run_maxima(const float* logits, int runs, float* maxima);                         \
    }
HEADRACE_DECLARE(portable)
#if defined(__x86_64__)
HEADRACE_DECLARE(avx2)
HEADRACE_DECLARE(avx512)
#endif

namespace {

constexpr int kSumBlock = 256, kRun = 64;

struct Loops {
    void (*weights)(const float*, int, float, double, double*);
    void (*block_sums)(const double*, int, double*);
    void (*run_maxima)(const float*, int, float*);
};

Loops loops(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return {avx512::sampling_weights, avx512::sampling_block_sums, avx512::sampling_run_maxima};
    if (isa == Isa::avx2) return {avx2::sampling_weights, avx2::sampling_block_sums, avx2::sampling_run_maxima};
#endif
    (void)isa;
    return {portable::sampling_weights, portable::sampling_block_sums, portable::sampling_run_maxima};
}

// Tokens that may still be chosen, by ascending id.
class Candidates {
  public:
    Candidates(Isa isa, const float* logits, int vocab, SampleScratch& scratch) : loops_(loops(isa)), scratch_(scratch), logits_(logits), count_(vocab) {}

    // Keeps the k largest logits; of those equal to the k-th, the lower ids.
    void keep_top_k(int k);
    void weigh(float best, double temperature);
    void keep_top_p(double p);
    void keep_min_p(double min_p);
    int32_t draw(double uniform);

  private:
    std::span<const double> block_sums();
    double total();
    // Keeps the candidates for which keep(index) holds; asks in ascending order.
    template <class F>
    void keep(F keep);

    Loops loops_;
    SampleScratch& scratch_;
    const float* logits_;
    int count_;
    bool all_ = true;  // nothing was dropped yet: ids are indices
    bool weighed_ = false;
};

template <class F>
void Candidates::keep(F keep) {
    scratch_.ids.resize(size_t(count_));
    scratch_.logits.resize(size_t(count_));
    int kept = 0;
    for (int i = 0; i < count_; ++i) {
        if (!keep(i)) continue;
        scratch_.ids[size_t(kept)] = all_ ? i : scratch_.ids[size_t(i)];
        scratch_.logits[size_t(kept)] = logits_[i];
        if (weighed_) scratch_.weights[size_t(kept)] = scratch_.weights[size_t(i)];
        ++kept;
    }
    logits_ = scratch_.logits.data();
    count_ = kept;
    all_ = false;
}

void Candidates::keep_top_k(int k) {
    // The k-th largest maximum of runs of logits is a lower bound of the k-th largest logit, and few logits reach it.
    const int runs = count_ / kRun;
    float least = -__builtin_inff();
    std::vector<float>& values = scratch_.logits;
    if (runs >= k) {
        values.resize(size_t(runs));
        loops_.run_maxima(logits_, runs, values.data());
        std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
        least = values[size_t(k - 1)];
    }
    values.clear();
    for (int i = 0; i < count_; ++i)
        if (logits_[i] >= least) values.push_back(logits_[i]);
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    const float last = values[size_t(k - 1)];
    int ties = k - int(std::count_if(values.begin(), values.end(), [&](float x) { return x > last; }));
    keep([&](int i) { return logits_[i] > last || (logits_[i] == last && ties-- > 0); });
}

void Candidates::weigh(float best, double temperature) {
    constexpr double ln2 = 0x1.62e42fefa39efp-1;
    scratch_.weights.resize(size_t(count_));
    loops_.weights(logits_, count_, best, std::max(temperature * ln2, 1e-300), scratch_.weights.data());
    weighed_ = true;
}

std::span<const double> Candidates::block_sums() {
    std::vector<double>& sums = scratch_.sums;
    sums.resize(size_t((count_ + kSumBlock - 1) / kSumBlock));
    loops_.block_sums(scratch_.weights.data(), count_, sums.data());
    for (size_t b = 1; b < sums.size(); ++b) sums[b] += sums[b - 1];
    return sums;
}

double Candidates::total() { return block_sums().back(); }

void Candidates::keep_top_p(double p) {
    const std::vector<double>& weights = scratch_.weights;
    const double all = total(), mass = p * all;
    // Tokens below this weight hold less than 1 - p together, so none of them is needed; 1e-6 is far above the sums' rounding.
    const double least = std::max(1 - p - 1e-6, 0.0) * all / double(count_);
    std::vector<uint64_t>& keys = scratch_.keys;
    keys.clear();
    for (int i = 0; i < count_; ++i) {
        if (!(weights[size_t(i)] >= least)) continue;
        const float descending = -logits_[i] + 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &descending, 4);
        bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;  // unsigned integers in the order of the floats
        keys.push_back(uint64_t(bits) << 32 | uint32_t(i));
    }
    // The best few are enough most of the time, so sort in growing steps.
    size_t sorted = 0, kept = 0;
    for (double reached = 0; kept < keys.size();) {
        if (kept == sorted) {
            const size_t next = std::min(keys.size(), std::max<size_t>(64, sorted * 4));
            if (next < keys.size()) std::nth_element(keys.begin() + long(sorted), keys.begin() + long(next), keys.end());
            std::sort(keys.begin() + long(sorted), keys.begin() + long(next));
            sorted = next;
        }
        reached += weights[uint32_t(keys[kept++])];
        if (reached >= mass) break;
    }
    keys.resize(kept);
    for (uint64_t& key : keys) key = uint32_t(key);
    std::sort(keys.begin(), keys.end());
    auto next = keys.begin();
    keep([&](int i) { return next != keys.end() && int(*next) == i && (++next, true); });
}

void Candidates::keep_min_p(double min_p) {
    const std::vector<double>& weights = scratch_.weights;
    const double least = min_p * *std::max_element(weights.begin(), weights.begin() + count_);
    keep([&](int i) { return weights[size_t(i)] >= least; });
}

int32_t Candidates::draw(double uniform) {
    const std::span<const double> sums = block_sums();
    const double target = uniform * sums.back();
    const size_t block = size_t(std::upper_bound(sums.begin(), sums.end(), target) - sums.begin());
    const double before = block ? sums[block - 1] : 0.0;
    double inside = 0;
    int i = int(block) * kSumBlock;
    for (; i < count_; ++i) {
        inside += scratch_.weights[size_t(i)];
        if (before + inside > target) break;
    }
    return all_ ? i : scratch_.ids[size_t(i)];
}

}  // namespace

double philox_uniform(uint64_t seed, uint32_t sample_index, uint32_t position) {
    uint32_t c[4] = {position, sample_index, 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
        std::memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return double((uint64_t(c[0]) << 32 | c[1]) >> 11) * 0x1p-53;
}

int32_t sample(Isa isa, const float* logits, int vocab, const SampleSpec& spec, int32_t position, float best, SampleScratch& scratch) {
    Candidates candidates(isa, logits, vocab, scratch);
    if (spec.top_k > 0 && spec.top_k < vocab) candidates.keep_top_k(spec.top_k);
    candidates.weigh(best, spec.temperature);
    if (spec.top_p < 1) candidates.keep_top_p(spec.top_p);
    if (spec.min_p > 0) candidates.keep_min_p(spec.min_p);
    return candidates.draw(philox_uniform(spec.seed, spec.sample_index, uint32_t(position)));
}

}  // namespace headrace
