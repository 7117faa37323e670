// The Python module headrace.kernels._native. Its signatures, documented, are in src/headrace/kernels/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>

#include "instructions.h"
#include "isa.h"
#include "pool.h"
#include "probe.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {
void bind_matrix(nb::module_& module);  // bind_matrix.cpp

namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Norm = std::optional<std::pair<Vector<float>, float>>;  // weight, eps

template <class T>
std::vector<T> copy(const Vector<T>& array) { return {array.data(), array.data() + array.size()}; }

template <class T, size_t N>
T by_name(const std::string& name, const std::pair<const char*, T> (&known)[N], const char* what) {
    for (const auto& [key, value] : known)
        if (name == key) return value;
    throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable})
        if (isa_runs(isa)) names.push_back(isa_name(isa));
    return names;
}

Isa isa_by_name(const std::string& name) {
    const std::optional<Isa> isa = isa_from_name(name);
    if (isa && isa_runs(*isa)) return *isa;
    std::string known;
    for (const std::string& other : supported_isas()) known += (known.empty() ? "" : ", ") + other;
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'; it runs " + known);
}

Format format_by_name(const std::string& name) {
    static constexpr std::pair<const char*, Format> known[] = {
        {"F32", Format::F32}, {"F16", Format::F16}, {"BF16", Format::BF16}, {"Q4_0", Format::Q4_0}, {"Q4_1", Format::Q4_1},
        {"Q5_0", Format::Q5_0}, {"Q5_1", Format::Q5_1}, {"Q8_0", Format::Q8_0}, {"Q2_K", Format::Q2_K}, {"Q3_K", Format::Q3_K},
        {"Q4_K", Format::Q4_K}, {"Q5_K", Format::Q5_K}, {"Q6_K", Format::Q6_K}, {"IQ4_NL", Format::IQ4_NL}};
    return by_name(name, known, "weight format");
}

KvType kv_type_by_name(const std::string& name) {
    static constexpr std::pair<const char*, KvType> known[] = {
        {"float32", KvType::f32}, {"float16", KvType::f16}, {"bfloat16", KvType::bf16}, {"int8", KvType::i8}};
    return by_name(name, known, "kv_dtype");
}

// ---- weights

struct PyWeight {
    std::shared_ptr<Weight> weight;
};

// Packs on the pool; the source must live until the pool has come to it.
PyWeight pack_weight(Pool& pool, const std::string& format_name, int64_t rows, int64_t cols, Vector<uint8_t> source, std::optional<Vector<int32_t>> row_order) {
    const Format format = format_by_name(format_name);
    if (rows < 1 || cols < 1 || cols % block_cols(format) != 0)
        throw std::invalid_argument("a " + format_name + " weight cannot have the shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
    const size_t bytes = source_row_bytes(format, cols) * size_t(rows);
    if (source.size() != bytes) throw std::invalid_argument("the weight has " + std::to_string(source.size()) + " bytes; its shape makes it " + std::to_string(bytes));
    std::vector<int32_t> order;
    if (row_order) {
        order = copy(*row_order);
        if (int64_t(order.size()) != rows) throw std::invalid_argument("row_order has " + std::to_string(order.size()) + " entries for " + std::to_string(rows) + " rows");
        for (int32_t row : order)
            if (row < 0 || row >= rows) throw std::invalid_argument("row_order names row " + std::to_string(row) + " of " + std::to_string(rows));
    }
    auto memory = std::make_shared<Memory>(packed_bytes(format, rows, cols));
    auto weight = std::make_shared<Weight>(Weight{packed_matrix(format, rows, cols, memory->data()), memory});
    const int64_t tiles = weight->matrix.tiles(), piece = std::max<int64_t>(1, std::min<int64_t>(256, tiles / (pool.threads() * 4)));
    nb::gil_scoped_release release;
    pool.submit([weight, data = source.data(), order = std::move(order), tiles, piece](Worker& worker) {
        for (int64_t tile; (tile = worker.claim() * piece) < tiles;)
            pack(weight->matrix, data, order.empty() ? nullptr : order.data(), tile, std::min(tiles, tile + piece));
    });
    return {weight};
}

// ---- keys and values

struct PyKvPool {
    std::shared_ptr<KvPool> pool;
};

void copy_page(Pool& pool, const PyKvPool& kv, int source, int target) {
    for (int page : {source, target})
        if (page < 0 || page >= kv.pool->pages) throw std::invalid_argument("page " + std::to_string(page) + " of a pool of " + std::to_string(kv.pool->pages));
    nb::gil_scoped_release release;
    pool.submit([kv = kv.pool, source, target](Worker& worker) {
        const size_t part = kv->layout.page_bytes;
        for (int layer; (layer = worker.claim()) < kv->layers;)
            std::memcpy(kv->page(target) + size_t(layer) * part, kv->page(source) + size_t(layer) * part, part);
    });
}

// ---- programs

struct PyTicket {
    std::shared_ptr<Step> step;
    Pool* pool;
};

class PyProgram {
  public:
    PyProgram(Pool& pool, const std::string& isa, int rows, int logits, int chunks, int slots, std::vector<int> pages)
        : program_(std::make_shared<Program>(pool, isa_by_name(isa), Limits{rows, logits, chunks, slots, std::move(pages)})) {}

    int slot(int width, bool logits) { return program_->add_slot(width, logits ? RowSpace::logits : RowSpace::all); }
    int angles(Vector<float> inv_freq, float scale) { return program_->add_angles(copy(inv_freq), scale); }

    void embed(const PyWeight& table, int out) {
        auto instruction = std::make_unique<Embed>();
        instruction->table = table.weight, instruction->out = out;
        expect(table.weight->matrix.cols == width(out), "embedding", table.weight->matrix.cols, width(out));
        program_->vocab = int(table.weight->matrix.rows);
        program_->add(std::move(instruction));
    }

    void linear(int x, const std::vector<std::tuple<PyWeight, std::optional<Vector<float>>, int, bool>>& parts, const Norm& norm, bool gathered, const std::string& recipe) {
        auto instruction = std::make_unique<Linear>();
        instruction->input = input(x, norm, gathered);
        for (const auto& [weight, bias, out, accumulate] : parts) instruction->parts.push_back(weighted(instruction->input, weight, bias, out, accumulate, recipe));
        need(instruction->input);
        program_->add(std::move(instruction));
    }

    void gated(int x, const PyWeight& gate, std::optional<Vector<float>> gate_bias, const PyWeight& up, std::optional<Vector<float>> up_bias, int out, const Norm& norm,
               const std::string& recipe) {
        auto instruction = std::make_unique<Gated>();
        instruction->input = input(x, norm, false);
        instruction->gate = weighted(instruction->input, gate, gate_bias, out, false, recipe);
        instruction->up = weighted(instruction->input, up, up_bias, out, false, recipe);
        instruction->out = out;
        need(instruction->input);
        program_->need_tile(Gated::tile_floats());
        program_->add(std::move(instruction));
    }

    void head(int x, const PyWeight& weight, std::optional<Vector<float>> bias, int logits, const Norm& norm, bool gathered, const std::string& recipe) {
        auto instruction = std::make_unique<Head>();
        instruction->input = input(x, norm, gathered);
        instruction->weight = weighted(instruction->input, weight, bias, logits, false, recipe);
        instruction->logits = logits;
        need(instruction->input);
        program_->need_tile(Head::tile_floats());
        logits_ = logits;
        program_->add(std::move(instruction));
    }

    void rms_norm(int x, Vector<float> weight, float eps, int out) {
        auto instruction = std::make_unique<RmsNorm>();
        expect(width(x) % int(weight.size()) == 0 && width(x) == width(out), "norm weight", (long long)weight.size(), width(x));
        instruction->x = x, instruction->out = out, instruction->width = int(weight.size()), instruction->eps = eps;
        instruction->weight = program_->keep(copy(weight));
        program_->add(std::move(instruction));
    }

    void rope(int x, int angles, int heads, int out) {
        auto instruction = std::make_unique<Rope>();
        expect(width(x) == width(out) && width(x) % heads == 0, "rope output", width(out), width(x));
        instruction->x = x, instruction->out = out, instruction->angles = angles, instruction->heads = heads;
        program_->add(std::move(instruction));
    }

    void kv_write(const PyKvPool& kv, int layer, int group, int k, int v) {
        auto instruction = std::make_unique<KvWrite>();
        check_kv(kv, layer, k, v);
        instruction->pool = kv.pool, instruction->layer = layer, instruction->group = group, instruction->k = k, instruction->v = v;
        program_->use_kv(group, *kv.pool);
        program_->add(std::move(instruction));
    }

    void attention(const PyKvPool& kv, int layer, int group, int q, int k, int v, int q_angles, int k_angles, int heads, float scale, int window, float softcap, int out) {
        auto instruction = std::make_unique<Attention>();
        const KvLayout& layout = kv.pool->layout;
        expect(heads % layout.kv_heads == 0, "query heads", heads, layout.kv_heads);
        expect(width(q) == heads * layout.head_dim && width(out) == width(q), "query width", width(q), heads * layout.head_dim);
        check_kv(kv, layer, k, v);
        instruction->pool = kv.pool, instruction->layer = layer, instruction->group = group, instruction->heads = heads;
        instruction->q = q, instruction->k = k, instruction->v = v, instruction->q_angles = q_angles, instruction->k_angles = k_angles;
        instruction->scale = scale, instruction->window = window, instruction->softcap = softcap, instruction->out = out;
        instruction->plan = program_->plan(group, heads, layout.kv_heads, window);
        program_->use_kv(group, *kv.pool);
        program_->need_attention(layout.dim);
        program_->add(std::move(instruction));
    }

    void silu_mul(int gate, int up, int out) {
        auto instruction = std::make_unique<SiluMul>();
        expect(width(gate) == width(up) && width(gate) == width(out), "silu_mul operand", width(up), width(gate));
        instruction->gate = gate, instruction->up = up, instruction->out = out;
        program_->add(std::move(instruction));
    }

    void add(int x, int y, int out) {
        auto instruction = std::make_unique<Add>();
        expect(width(x) == width(y) && width(x) == width(out), "add operand", width(y), width(x));
        instruction->x = x, instruction->y = y, instruction->out = out;
        program_->add(std::move(instruction));
    }

    void take_rows(int x, int out) {
        auto instruction = std::make_unique<TakeRows>();
        expect(width(x) == width(out), "take_rows output", width(out), width(x));
        instruction->x = x, instruction->out = out;
        program_->add(std::move(instruction));
    }

    void finish(int hidden, int output) {
        output_ = output;
        program_->finish(hidden, output);
    }

    PyTicket submit(Vector<int32_t> tokens, Vector<int32_t> positions, Vector<int32_t> chunk_rows, Vector<int32_t> logit_rows,
                    const std::vector<std::pair<Vector<int64_t>, Table<int32_t>>>& groups, Vector<uint8_t> samples, std::optional<Table<float>> hidden, bool timed) {
        auto step = std::make_shared<Step>();
        step->tokens = copy(tokens), step->positions = copy(positions), step->chunk_rows = copy(chunk_rows), step->logit_rows = copy(logit_rows);
        if (step->chunk_rows.empty()) throw std::invalid_argument("chunk_rows is empty; it holds at least 0 and the number of rows");
        for (const auto& [slots, pages] : groups) step->groups.push_back({copy(slots), {pages.data(), pages.data() + pages.size()}, int(pages.shape(1))});
        if (samples.size() != size_t(step->logits()) * sizeof(SampleSpec))
            throw std::invalid_argument(std::to_string(samples.size()) + " bytes of sample specs for " + std::to_string(step->logits()) + " rows of logits");
        step->samples.resize(size_t(step->logits()));
        if (samples.size() > 0) std::memcpy(step->samples.data(), samples.data(), samples.size());
        if (hidden) step->hidden.assign(hidden->data(), hidden->data() + hidden->size());
        if (timed) step->seconds.resize(program_->instructions());
        make_room(*step);
        nb::gil_scoped_release release;
        Program::submit(program_, step);
        return {step, &program_->pool};
    }

  private:
    static void expect(bool holds, const char* what, long long found, long long wanted) {
        if (!holds) throw std::invalid_argument(std::string(what) + " has size " + std::to_string(found) + "; " + std::to_string(wanted) + " was expected");
    }
    int width(int slot) const { return program_->slot(slot).width; }

    void check_kv(const PyKvPool& kv, int layer, int k, int v) const {
        expect(layer >= 0 && layer < kv.pool->layers, "layer of a KV pool", layer, kv.pool->layers);
        for (int slot : {k, v})
            if (slot >= 0) expect(width(slot) == kv.pool->layout.kv_heads * kv.pool->layout.head_dim, "key or value", width(slot), kv.pool->layout.kv_heads * kv.pool->layout.head_dim);
    }

    ProductInput input(int x, const Norm& norm, bool gathered) {
        ProductInput out;
        out.x = x, out.cols = width(x), out.gathered = gathered;
        if (norm) {
            expect(int(norm->first.size()) == out.cols, "norm weight", (long long)norm->first.size(), out.cols);
            out.norm = program_->keep(copy(norm->first)), out.eps = norm->second;
        }
        return out;
    }

    Weighted weighted(ProductInput& input, const PyWeight& weight, const std::optional<Vector<float>>& bias, int out, bool accumulate, const std::string& recipe) {
        const PackedMatrix& matrix = weight.weight->matrix;
        expect(matrix.cols == input.cols, "weight's input", matrix.cols, input.cols);
        expect(matrix.rows == width(out), "weight's output", matrix.rows, width(out));
        Weighted part{weight.weight, nullptr, 0, out, accumulate};
        if (bias) {
            expect(int64_t(bias->size()) == matrix.rows, "bias", (long long)bias->size(), matrix.rows);
            part.bias = program_->keep(copy(*bias));
        }
        const Recipe chosen = recipe_of(matrix.format, quantised_recipe(recipe));
        auto found = std::find(input.recipes.begin(), input.recipes.end(), chosen);
        part.recipe = int(found - input.recipes.begin());
        if (found == input.recipes.end()) input.recipes.push_back(chosen);
        return part;
    }

    void need(const ProductInput& input) { program_->need_activations(program_->limits.rows, input.recipes, input.cols); }

    // Room for what the step gives back.
    void make_room(Step& step) const {
        step.chosen.assign(size_t(step.logits()), kNoToken);
        step.output_row.assign(size_t(step.logits()), -1);
        size_t values = 0;
        if (logits_ >= 0) {
            int rows = 0;
            for (size_t i = 0; i < step.samples.size(); ++i)
                if (step.samples[i].logits) step.output_row[i] = rows++;
            values = size_t(rows) * size_t(width(logits_));
        } else if (output_ >= 0) {
            values = size_t(program_->rows(step, output_)) * size_t(width(output_));
        }
        step.output.resize(values);
    }

    std::shared_ptr<Program> program_;
    int logits_ = -1, output_ = -1;
};

nb::ndarray<nb::numpy, int32_t> chosen(const PyTicket& ticket) {
    auto* owner = new std::shared_ptr<Step>(ticket.step);
    nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<Step>*>(p); });
    return nb::ndarray<nb::numpy, int32_t>(ticket.step->chosen.data(), {ticket.step->chosen.size()}, capsule);
}

nb::ndarray<nb::numpy, float> output(const PyTicket& ticket) {
    auto* owner = new std::shared_ptr<Step>(ticket.step);
    nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<Step>*>(p); });
    return nb::ndarray<nb::numpy, float>(ticket.step->output.data(), {ticket.step->output.size()}, capsule);
}

}  // namespace
}  // namespace headrace

NB_MODULE(_native, m) {
    using namespace headrace;
    const Isa isa = best_isa();
    m.attr("supported_isas") = nb::cast(supported_isas());
    m.def("read_bandwidth", [isa](size_t bytes, int threads) {
        nb::gil_scoped_release release;
        Pool pool(threads);
        return read_bandwidth(isa, pool, bytes);
    }, "bytes"_a, "threads"_a);
    m.def("int8_peak", [isa](int threads) {
        nb::gil_scoped_release release;
        Pool pool(threads);
        return int8_peak(isa, pool);
    }, "threads"_a);
    m.def("sample", [](const std::string& isa, Vector<float> logits, double temperature, int32_t top_k, double top_p, double min_p, uint64_t seed, uint32_t sample_index, int32_t position) {
        const SampleSpec spec{temperature, top_p, min_p, seed, top_k, sample_index, -1, 1, 0, {}};
        SampleScratch scratch;
        const float best = *std::max_element(logits.data(), logits.data() + logits.size());
        return sample(isa_by_name(isa), logits.data(), int(logits.size()), spec, position, best, scratch);
    });

    nb::class_<Pool>(m, "Pool")
        .def("__init__", [](Pool* self, int threads) {
            if (threads < 1 || threads > 1024) throw std::invalid_argument("a pool has 1 to 1024 threads, got " + std::to_string(threads));
            new (self) Pool(threads);
        }, "threads"_a)
        .def_prop_ro("threads", &Pool::threads)
        .def("wait", [](Pool& pool) { pool.run([](Worker&) {}); }, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<PyWeight>(m, "Weight")
        .def_prop_ro("rows", [](const PyWeight& w) { return w.weight->matrix.rows; })
        .def_prop_ro("cols", [](const PyWeight& w) { return w.weight->matrix.cols; })
        .def_prop_ro("nbytes", [](const PyWeight& w) { return w.weight->matrix.bytes(); });
    m.def("pack", &pack_weight, "pool"_a, "format"_a, "rows"_a, "cols"_a, "source"_a, "row_order"_a.none());
    nb::class_<PyKvPool>(m, "KvPool")
        .def("__init__", [](PyKvPool* self, const std::string& dtype, int layers, int pages, int page_size, int kv_heads, int head_dim) {
            if (layers < 1 || pages < 1 || kv_heads < 1 || page_size < kTile || page_size % kTile || head_dim < 2 || head_dim % 2 || head_dim > kMaxHeadDim)
                throw std::invalid_argument("page_size must be a multiple of " + std::to_string(kTile) + " (got " + std::to_string(page_size) + "), head_dim even and at most " +
                                            std::to_string(kMaxHeadDim) + " (got " + std::to_string(head_dim) + ")");
            new (self) PyKvPool{std::make_shared<KvPool>(kv_type_by_name(dtype), layers, pages, page_size, kv_heads, head_dim)};
        })
        .def_prop_ro("nbytes", [](const PyKvPool& kv) { return kv.pool->memory.bytes(); })
        .def("copy_page", [](const PyKvPool& kv, Pool& pool, int source, int target) { copy_page(pool, kv, source, target); });
    nb::class_<PyTicket>(m, "Ticket")
        .def("done", [](const PyTicket& t) { return t.pool->done(t.step->ticket); })
        .def("wait", [](const PyTicket& t) { t.pool->wait(t.step->ticket); }, nb::call_guard<nb::gil_scoped_release>())
        .def("chosen", &chosen)
        .def("output", &output)
        .def_prop_ro("seconds", [](const PyTicket& t) { return t.step->seconds; })
        .def_prop_ro("started", [](const PyTicket& t) { return t.step->started; })
        .def_prop_ro("ended", [](const PyTicket& t) { return t.step->ended; });
    nb::class_<PyProgram>(m, "Program")
        .def(nb::init<Pool&, const std::string&, int, int, int, int, std::vector<int>>(), nb::keep_alive<1, 2>())
        .def("slot", &PyProgram::slot)
        .def("angles", &PyProgram::angles)
        .def("embed", &PyProgram::embed)
        .def("linear", &PyProgram::linear, "x"_a, "parts"_a, "norm"_a.none(), "gathered"_a, "recipe"_a)
        .def("gated", &PyProgram::gated, "x"_a, "gate"_a, "gate_bias"_a.none(), "up"_a, "up_bias"_a.none(), "out"_a, "norm"_a.none(), "recipe"_a)
        .def("head", &PyProgram::head, "x"_a, "weight"_a, "bias"_a.none(), "logits"_a, "norm"_a.none(), "gathered"_a, "recipe"_a)
        .def("rms_norm", &PyProgram::rms_norm)
        .def("rope", &PyProgram::rope)
        .def("kv_write", &PyProgram::kv_write)
        .def("attention", &PyProgram::attention)
        .def("silu_mul", &PyProgram::silu_mul)
        .def("add", &PyProgram::add)
        .def("take_rows", &PyProgram::take_rows)
        .def("finish", &PyProgram::finish)
        .def("submit", &PyProgram::submit, nb::keep_alive<0, 1>(), "tokens"_a, "positions"_a, "chunk_rows"_a, "logit_rows"_a, "groups"_a, "samples"_a, "hidden"_a.none(), "timed"_a);
    bind_matrix(m);
}
