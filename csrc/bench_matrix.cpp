// Checks and times the matrix products by themselves.
//
//   headrace_matrix_bench check            every format and instruction set that runs here, against a double-precision reference;
//                                          equal bits for every row count, tile split and instruction set; nothing written outside
//   headrace_matrix_bench time [THREADS]   the products of whole steps, beside the ceilings sampled with them
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "matrix.h"

using namespace headrace;

namespace {

const char* const recipe_names[] = {"group", "shifted", "row", "bf16", "f32"};

struct Free { void operator()(void* p) const { std::free(p); } };
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T> Buffer<T> buffer(size_t count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// fp16 fields of a block, by offset: they get small finite values, so that products stay in range.
std::vector<int> scale_fields(Format format) {
    switch (format) {
        case Format::Q4_0: case Format::Q5_0: case Format::Q8_0: case Format::Q8_0_APART: case Format::IQ4_NL: return {0};
        case Format::Q4_1: case Format::Q5_1: case Format::Q4_K: case Format::Q5_K: return {0, 2};
        case Format::Q2_K: return {80, 82};
        case Format::Q3_K: return {108};
        case Format::Q6_K: return {208};
        default: return {};
    }
}

// Random rows in the file's form. One scale in eight is zero, some are negative.
std::vector<uint8_t> random_rows(Format format, int64_t rows, int64_t cols, std::mt19937& random) {
    std::vector<uint8_t> bytes(size_t(rows) * source_row_bytes(format, cols));
    for (uint8_t& byte : bytes) byte = uint8_t(random());
    const size_t block = source_row_bytes(format, block_cols(format));
    for (size_t at = 0; at < bytes.size(); at += block) {
        for (const int field : scale_fields(format)) {
            const uint16_t half = random() % 8 == 0 ? uint16_t(random() % 2 << 15) : uint16_t(0x2000 | (random() & 0x87ff));
            std::memcpy(&bytes[at + size_t(field)], &half, 2);
        }
        if (format == Format::F32) {
            const float value = float(int32_t(random())) * 0x1p-31f;
            std::memcpy(&bytes[at], &value, 4);
        }
        if (format == Format::F16 || format == Format::BF16) {
            const uint16_t bits = uint16_t((random() & 0x83ff) | (format == Format::F16 ? 0x3000 : 0x3d00));
            std::memcpy(&bytes[at], &bits, 2);
        }
    }
    return bytes;
}

struct Packed {
    Buffer<uint8_t> memory;
    PackedMatrix matrix;
    Packed(Format format, int64_t rows, int64_t cols, const uint8_t* source) : memory(buffer<uint8_t>(packed_bytes(format, rows, cols))) {
        matrix = packed_matrix(format, rows, cols, memory.get());
        pack(matrix, source, nullptr, 0, matrix.tiles());
    }
};

struct Input {
    Buffer<uint8_t> memory;
    Activation prepared;
    Input(const Kernels& k, Recipe recipe, int64_t rows, int64_t cols, const float* x) : memory(buffer<uint8_t>(activation_bytes(recipe, rows, cols))) {
        prepared = activation(recipe, rows, cols, memory.get());
        for (int64_t r = 0; r < rows; r++) k.quantise_row(prepared, r, x + r * cols);
    }
    // Input k of a row as the product sees it.
    double value(int64_t row, int64_t k) const {
        const uint8_t* p = prepared.row(row);
        if (prepared.recipe == Recipe::group || prepared.recipe == Recipe::shifted) {
            const GroupBlock& block = reinterpret_cast<const GroupBlock*>(p)[k / 32];
            return double(block.codes[k % 32]) * block.scale + block.offset;
        }
        if (prepared.recipe == Recipe::row) return double(reinterpret_cast<const int8_t*>(p + sizeof(RowHead))[k]) * reinterpret_cast<const RowHead*>(p)->scale;
        if (prepared.recipe == Recipe::f32) return reinterpret_cast<const float*>(p)[k];
        const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(p)[k]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

int failures = 0;
void expect(bool good, const char* what, const char* format, const char* isa, double detail) {
    if (good) return;
    std::printf("FAIL %s %s on %s: %g\n", what, format, isa, detail);
    failures++;
}

void check_format(Format format, Recipe quantised, int64_t rows, int64_t cols, std::mt19937& random) {
    constexpr int64_t most = 160;
    const char* name = format_name(format);
    const std::vector<uint8_t> source = random_rows(format, rows, cols, random);
    const Packed packed(format, rows, cols, source.data());
    const Recipe recipe = recipe_of(format, quantised);
    std::vector<float> x, bias, w;
    x.resize(size_t(most * cols)), bias.resize(size_t(rows)), w.resize(size_t(rows * cols));
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(random);
    for (float& v : bias) v = normal(random);
    for (int64_t k = 0; k < cols; k++) x[size_t(k)] *= k / 32 % 3 == 0 ? 0.0f : 100.0f;  // groups of zeros, and of outliers
    for (int64_t n = 0; n < rows; n++) unpack_row(packed.matrix, n, &w[size_t(n * cols)]);
    const int64_t ldy = rows + 5;
    std::vector<float> other;  // the bits of the instruction set before
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (!isa_runs(isa)) continue;
        const Kernels& k = kernels(isa);
        const Input input(k, recipe, most, cols, x.data());
        constexpr float poison = -12345.0f;
        std::vector<float> y(size_t(most * ldy), poison);
        const Product product{&packed.matrix, &input.prepared, y.data(), ldy};
        k.multiply(product, 0, most, 0, packed.matrix.tiles());
        double worst = 0, poisoned = 0;
        for (int64_t r = 0; r < most; r += 7)
            for (int64_t n = 0; n < rows; n++) {
                double sum = 0, size = 0;
                for (int64_t i = 0; i < cols; i++) {
                    const double term = double(w[size_t(n * cols + i)]) * input.value(r, i);
                    sum += term, size += std::fabs(term);
                }
                worst = std::max(worst, std::fabs(y[size_t(r * ldy + n)] - sum) / (size + 1e-30));
            }
        for (int64_t r = 0; r < most; r++)
            for (int64_t n = rows; n < ldy; n++) poisoned += y[size_t(r * ldy + n)] != poison;
        expect(worst < (recipe == Recipe::row ? 2e-2 : 2e-6), "error", name, isa_name(isa), worst);
        expect(poisoned == 0, "outside", name, isa_name(isa), poisoned);
        for (int64_t count = 1; count <= 40; count++) {  // any rows, any tiles, one thread's share at a time
            const int64_t first = int64_t(random() % uint64_t(most - count)), cut = int64_t(random() % uint64_t(packed.matrix.tiles() + 1));
            std::vector<float> z(size_t(most * ldy), poison);
            const Product again{&packed.matrix, &input.prepared, z.data(), ldy};
            k.multiply(again, first, first + count, 0, cut);
            k.multiply(again, first, first + count, cut, packed.matrix.tiles());
            expect(std::memcmp(&z[size_t(first * ldy)], &y[size_t(first * ldy)], size_t(count * ldy) * 4) == 0, "row count", name, isa_name(isa), double(count));
        }
        std::vector<float> z(y);
        Product plus{&packed.matrix, &input.prepared, z.data(), ldy, bias.data(), true};
        k.multiply(plus, 0, most, 0, packed.matrix.tiles());
        k.multiply(plus, 0, 0, 0, packed.matrix.tiles());
        double wrong = 0;
        for (int64_t r = 0; r < most; r++)
            for (int64_t n = 0; n < rows; n++) {
                const float before = y[size_t(r * ldy + n)];
                wrong += z[size_t(r * ldy + n)] != (before + bias[size_t(n)]) + before;
            }
        expect(wrong == 0, "epilogue", name, isa_name(isa), wrong);
        if (recipe != Recipe::bf16 && !other.empty())
            expect(std::memcmp(other.data(), y.data(), y.size() * 4) == 0, "bits across instruction sets", name, isa_name(isa), 0);
        other = y;
    }
}

int check() {
    std::mt19937 random(1);
    for (int f = 0; f < format_count; f++)
        for (const Recipe quantised : {Recipe::group, Recipe::shifted, Recipe::row}) {
            const Format format = Format(f);
            const Recipe recipe = recipe_of(format, quantised);
            if (recipe != quantised && quantised != Recipe::group) continue;
            const int64_t block = block_cols(format);
            const int before = failures;
            if (block == 1) check_format(format, quantised, 37, 61, random), check_format(format, quantised, 16, 20, random);
            check_format(format, quantised, 50, block == 256 ? 768 : 672, random);
            check_format(format, quantised, 33, block == 256 ? 256 : 32, random);
            check_format(format, quantised, 80, block == 256 ? 1280 : 1312, random);
            std::printf("%-7s %-7s %s\n", format_name(format), recipe_names[int(recipe)], failures == before ? "ok" : "FAILED");
        }
    return failures != 0;
}

// ---- timing

// Runs f(thread) on every thread at once and returns when all have done it.
class Threads {
    std::vector<std::thread> threads_;
    std::atomic<int> turn_{0}, done_{0};
    std::atomic<bool> stop_{false};
    std::function<void(int)> work_;

  public:
    const int count;
    explicit Threads(int n) : count(n) {
        for (int t = 1; t < n; t++)
            threads_.emplace_back([this, t] {
                for (int seen = 0;;) {
                    while (turn_.load(std::memory_order_acquire) == seen)
                        if (stop_) return;
                    seen++;
                    work_(t);
                    done_.fetch_add(1, std::memory_order_release);
                }
            });
    }
    ~Threads() {
        stop_ = true;
        for (std::thread& t : threads_) t.join();
    }
    void run(std::function<void(int)> work) {
        work_ = std::move(work), done_ = 0;
        turn_.fetch_add(1, std::memory_order_release);
        work_(0);
        while (done_.load(std::memory_order_acquire) != count - 1) {}
    }
};

double best_of(int times, const std::function<void()>& f) {
    double best = 1e30;
    for (int i = 0; i < times; i++) {
        const double start = now();
        f();
        best = std::min(best, now() - start);
    }
    return best;
}

double read_bandwidth(Threads& threads, const uint8_t* data, size_t bytes) {
    std::vector<uint64_t> sums(size_t(threads.count) * 8);
    return double(bytes) / best_of(5, [&] {
        threads.run([&](int t) {
            const size_t part = bytes / size_t(threads.count) / 256 * 256;
            const uint64_t* p = reinterpret_cast<const uint64_t*>(data + part * size_t(t));
            uint64_t sum[32] = {};
            for (size_t i = 0; i < part / 8; i += 32) {
                __builtin_prefetch(p + i + 512), __builtin_prefetch(p + i + 520), __builtin_prefetch(p + i + 528), __builtin_prefetch(p + i + 536);
                for (int j = 0; j < 32; j++) sum[j] += p[i + size_t(j)];
            }
            for (const uint64_t s : sum) sums[size_t(t) * 8] += s;
        });
    });
}

#if defined(__x86_64__)
// 8-bit multiply-adds a second that the cores can issue.
__attribute__((target("avx512f,avx512vnni"))) void issue_dots(int times) {
    __m512i a[16], b = _mm512_set1_epi8(1), c = _mm512_set1_epi8(2);
    for (__m512i& x : a) x = _mm512_setzero_si512();
    for (int i = 0; i < times; i++) {
#pragma GCC unroll 16
        for (__m512i& x : a) x = _mm512_dpbusd_epi32(x, b, c);
        asm volatile("" : "+v"(b), "+v"(c));
    }
    __m512i sum = a[0];
    for (const __m512i& x : a) sum = _mm512_add_epi32(sum, x);
    asm volatile("" ::"v"(sum));
}
double dot_peak(Threads& threads) {
    if (!isa_runs(Isa::avx512)) return 0;
    return 2.0 * 64 * 16 * 200000 * threads.count / best_of(5, [&] { threads.run([](int) { issue_dots(200000); }); });
}
#else
double dot_peak(Threads&) { return 0; }
#endif

struct Shape { Format format; int64_t rows, cols; bool head; };

void time_model(const char* title, const std::vector<Shape>& shapes, Threads& threads, Isa isa, Recipe quantised) {
    std::mt19937 random(2);
    const Kernels& k = kernels(isa);
    std::vector<Packed> packed;
    size_t bytes = 0;
    for (const Shape& s : shapes) {
        const std::vector<uint8_t> part = random_rows(s.format, 16, s.cols, random);
        Packed p(s.format, 16, s.cols, part.data());
        Packed whole = [&] {  // one tile, many times over: timing does not look at values
            Packed w(s.format, 0, s.cols, part.data());
            w.memory = buffer<uint8_t>(packed_bytes(s.format, s.rows, s.cols));
            w.matrix = packed_matrix(s.format, s.rows, s.cols, w.memory.get());
            for (int64_t t = 0; t < w.matrix.tiles(); t++) std::memcpy(w.matrix.data + size_t(t) * w.matrix.tile_bytes, p.matrix.data, p.matrix.tile_bytes);
            return w;
        }();
        bytes += whole.matrix.bytes();
        packed.push_back(std::move(whole));
    }
    std::printf("%s: %.1f MB, %d threads, %s, %s\n", title, double(bytes) / 1e6, threads.count, isa_name(isa), recipe_names[int(quantised)]);
    const auto ceiling = buffer<uint8_t>(256 << 20);
    std::memset(ceiling.get(), 1, 256 << 20);
    for (const int64_t rows : {1, 2, 4, 8, 16, 32, 64, 128, 512}) {
        int64_t wide = 0;
        for (const Shape& s : shapes) wide = std::max(wide, s.cols);
        std::vector<float> x(size_t(rows * wide), 0.5f);
        std::vector<Input> inputs;
        double ops = 0;
        int64_t out = 0;
        for (const Shape& s : shapes) {
            const int64_t n = s.head ? std::min<int64_t>(rows, 64) : rows;
            ops += 2.0 * double(n) * double(s.rows) * double(s.cols), out = std::max(out, n * s.rows);
        }
        std::vector<std::pair<int64_t, Recipe>> kinds;
        auto input_of = [&](const Shape& s) -> Input& {
            const std::pair<int64_t, Recipe> kind{s.cols, recipe_of(s.format, quantised)};
            for (size_t i = 0; i < kinds.size(); i++)
                if (kinds[i] == kind) return inputs[i];
            kinds.push_back(kind);
            inputs.emplace_back(k, kind.second, rows, s.cols, x.data());
            return inputs.back();
        };
        inputs.reserve(16);
        for (const Shape& s : shapes) input_of(s);
        auto y = buffer<float>(size_t(out));
        std::memset(y.get(), 0, size_t(out) * 4);
        const double seconds = best_of(rows <= 8 ? 40 : rows <= 64 ? 15 : 5, [&] {
            for (size_t i = 0; i < shapes.size(); i++) {
                const PackedMatrix& w = packed[i].matrix;
                const Product product{&w, &input_of(shapes[i]).prepared, y.get(), w.rows};
                const int64_t n = shapes[i].head ? std::min<int64_t>(rows, 64) : rows;
                threads.run([&](int t) { k.multiply(product, 0, n, w.tiles() * t / threads.count, w.tiles() * (t + 1) / threads.count); });
            }
        });
        const double bandwidth = read_bandwidth(threads, ceiling.get(), 256 << 20), peak = dot_peak(threads);
        std::printf("  %4d rows %9.3f ms  %7.1f GB/s of %5.1f (%3.0f%%)  %7.0f GOP/s of %5.0f (%3.0f%%)  %8.0f rows/s\n", int(rows), seconds * 1e3,
                    double(bytes) / seconds / 1e9, bandwidth / 1e9, 100 * double(bytes) / seconds / bandwidth, ops / seconds / 1e9, peak / 1e9,
                    peak ? 100 * ops / seconds / peak : 0, double(rows) / seconds);
        std::fflush(stdout);
    }
}

int time(int count, Isa isa, Recipe quantised, Format layers, const std::string& which) {
    Threads threads(count);
    if (which != "1b") {
        std::vector<Shape> small;
        for (int i = 0; i < 30; i++)
            for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{960, 576}, {576, 576}, {3072, 576}, {576, 1536}})
                small.push_back({layers == Format::Q4_0 ? Format::Q4_1 : layers, rows, cols, false});
        small.push_back({Format::Q8_0, 49152, 576, true});
        time_model("SmolLM2-135M", small, threads, isa, quantised);
    }
    if (which != "135m") {
        std::vector<Shape> large;
        for (int i = 0; i < 16; i++)
            for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{3072, 2048}, {2048, 2048}, {16384, 2048}, {2048, 8192}})
                large.push_back({layers, rows, cols, false});
        large.push_back({Format::Q8_0, 49152, 2048, true});
        time_model("1B shape", large, threads, isa, quantised);
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    const std::string mode = count > 1 ? words[1] : "";
    if (mode == "check") return check();
    Isa isa = best_isa();
    if (const char* name = std::getenv("HEADRACE_ISA"))
        if (const auto chosen = isa_from_name(name); chosen && isa_runs(*chosen)) isa = *chosen;
    Format layers = Format::Q4_0;
    Recipe quantised = Recipe::group;
    std::string which;
    int threads = 2;
    for (int i = 2; i < count; i++) {
        const std::string word = words[i];
        for (int f = 0; f < format_count; f++)
            if (word == format_name(Format(f))) layers = Format(f);
        if (word == "row") quantised = Recipe::row;
        else if (word == "shifted") quantised = Recipe::shifted;
        else if (word == "135m" || word == "1b") which = word;
        else if (std::isdigit(word[0])) threads = std::max(1, std::atoi(word.c_str()));
    }
    if (mode == "time") return time(threads, isa, quantised, layers, which);
    std::puts("usage: headrace_matrix_bench check | time [THREADS] [FORMAT of the layers] [shifted | row] [135m | 1b]");
    return 2;
}
