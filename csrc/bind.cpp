// The Python module headrace.kernels._native. Its signatures, documented, are in src/headrace/kernels/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "group.h"
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
// kind; weight and bias of a norm; eps, or factor and cap
using PyTransform = std::optional<std::tuple<std::string, std::optional<Vector<float>>, std::optional<Vector<float>>, float, float>>;

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

ActivationKind activation_by_name(const std::string& name) {
    static constexpr std::pair<const char*, ActivationKind> known[] = {{"silu", ActivationKind::silu}, {"gelu", ActivationKind::gelu},
        {"gelu_tanh", ActivationKind::gelu_tanh}, {"relu", ActivationKind::relu}, {"relu2", ActivationKind::relu2}};
    return by_name(name, known, "activation");
}

// ---- threads

struct PyPool : Pool {
    using Pool::Pool;
    ~PyPool() {  // its last jobs may call functions of Python's
        nb::gil_scoped_release release;
        stop();
    }
};

// ---- weights

struct PyWeight {
    std::shared_ptr<Weight> weight;
};

// Packs rows of the source (row_order, or all) on the pool, into the arena; the source must live until the pool has come to it.
PyWeight pack_weight(PyPool& pool, Arena& arena, const std::string& format_name, int64_t rows, int64_t cols, Vector<uint8_t> source, std::optional<Vector<int32_t>> row_order, bool head) {
    const Format format = head ? screened_format(format_by_name(format_name)) : format_by_name(format_name);
    if (rows < 1 || cols < 1 || cols % block_cols(format) != 0)
        throw std::invalid_argument("a " + format_name + " weight cannot have the shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
    const size_t bytes = source_row_bytes(format, cols) * size_t(rows);
    if (source.size() != bytes) throw std::invalid_argument("the weight has " + std::to_string(source.size()) + " bytes; its shape makes it " + std::to_string(bytes));
    std::vector<int32_t> order;
    if (row_order) {
        order = copy(*row_order);
        if (order.empty()) throw std::invalid_argument("row_order has no entries");
        for (int32_t row : order)
            if (row < 0 || row >= rows) throw std::invalid_argument("row_order names row " + std::to_string(row) + " of " + std::to_string(rows));
        rows = int64_t(order.size());
    }
    const Arena::Part part = arena.take(packed_bytes(format, rows, cols));
    auto weight = std::make_shared<Weight>(Weight{packed_matrix(format, rows, cols, part.data), part.memory});
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

void copy_page(PyPool& pool, const PyKvPool& kv, int source, int target) {
    for (int page : {source, target})
        if (page < 0 || page >= kv.pool->pages) throw std::invalid_argument("page " + std::to_string(page) + " of a pool of " + std::to_string(kv.pool->pages));
    nb::gil_scoped_release release;
    pool.submit([kv = kv.pool, source, target](Worker& worker) {
        for (int layer; (layer = worker.claim()) < kv->layers;)
            for (int head = 0; head < kv->kv_heads; ++head) std::memcpy(kv->tile(layer, head, target, 0), kv->tile(layer, head, source, 0), kv->run_bytes);
    });
}

// ---- groups

// Functions of Python's, for threads of the pool. The last of them may be let go of there too.
class PyFunction {
  public:
    explicit PyFunction(nb::object function) : function_(std::move(function)) {}
    ~PyFunction() {
        nb::gil_scoped_acquire acquire;
        function_.reset();
    }
    PyFunction(const PyFunction&) = delete;

    // `bytes` are the function's to use until it returns.
    template <class... Args>
    void call(const uint8_t* bytes, size_t size, Args... args) const {
        nb::gil_scoped_acquire acquire;
        try {
            nb::capsule nobody(bytes, [](void*) noexcept {});
            function_(args..., nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(const_cast<uint8_t*>(bytes), {size}, nobody));
        } catch (nb::python_error& error) {  // which must not be let go of without the interpreter
            throw std::runtime_error(nb::str(error.value()).c_str());
        }
    }

  private:
    nb::object function_;
};

std::shared_ptr<Group> channel_group(int rank, int64_t ranks, int64_t rows, int64_t width, int64_t logits, int64_t columns, nb::object send, nb::object receive) {
    auto sender = std::make_shared<PyFunction>(std::move(send)), receiver = std::make_shared<PyFunction>(std::move(receive));
    return std::make_shared<ChannelGroup>(
        rank, GroupSizes{ranks, rows, width, logits, columns},
        [sender](uint64_t number, const uint8_t* bytes, size_t size) { sender->call(bytes, size, number); },
        [receiver](int from, uint64_t number, uint8_t* bytes, size_t size) { receiver->call(bytes, size, from, number); });
}

// ---- programs

struct PyTicket {
    std::shared_ptr<Step> step;
    Pool* pool;
};

class PyProgram {
  public:
    PyProgram(PyPool& pool, const std::string& isa, int rows, int logits, int chunks, int slots, std::vector<int> pages)
        : program_(std::make_shared<Program>(pool, isa_by_name(isa), Limits{rows, logits, chunks, slots, std::move(pages)})) {}

    int slot(int width, bool logits) { return program_->add_slot(width, logits ? RowSpace::logits : RowSpace::all); }
    int angles(Vector<float> inv_freq, float scale) { return program_->add_angles(copy(inv_freq), scale); }

    void join(const std::shared_ptr<Group>& group) { program_->join(group); }
    int partial(int width) { return program_->add_partial(width); }

    // `total`: rows that the table has on all ranks together, of which this one begins with row -offset.
    void embed(const PyWeight& table, bool by_position, int offset, int total, int out) {
        auto instruction = std::make_unique<Embed>();
        instruction->table = table.weight, instruction->by_position = by_position, instruction->offset = offset, instruction->out = out;
        const int64_t rows = table.weight->matrix.rows;
        expect(table.weight->matrix.cols == width(out), "embedding", table.weight->matrix.cols, width(out));
        if (by_position)
            expect(offset >= 0 && offset < rows && total == rows, "embedding's offset", offset, 0);
        else
            expect(offset <= 0 && rows - offset <= total, "embedding's share's end", rows - offset, total);
        if (by_position)
            program_->limit_positions(int(rows) - offset);
        else
            program_->vocab = total;
        program_->add(std::move(instruction));
    }

    void linear(int x, const std::vector<std::tuple<PyWeight, std::optional<Vector<float>>, int, bool>>& parts, const PyTransform& before, bool gathered, const std::string& recipe) {
        auto instruction = std::make_unique<Linear>();
        instruction->input = input(x, before, gathered);
        for (const auto& [weight, bias, out, accumulate] : parts) instruction->parts.push_back(weighted(instruction->input, weight, bias, out, accumulate, recipe));
        need(instruction->input);
        Instruction* const maker = program_->last();
        instruction->input.made_ready = maker && instruction->input.may_be_made_ready() && maker->make_ready_for(instruction->input);
        program_->add(std::move(instruction));
    }

    void gated(int x, const PyWeight& gate, std::optional<Vector<float>> gate_bias, const PyWeight& up, std::optional<Vector<float>> up_bias, const std::string& activation, int out,
               const PyTransform& before, const std::string& recipe) {
        auto instruction = std::make_unique<Gated>();
        instruction->input = input(x, before, false);
        instruction->activation = activation_by_name(activation);
        instruction->gate = weighted(instruction->input, gate, gate_bias, out, false, recipe);
        instruction->up = weighted(instruction->input, up, up_bias, out, false, recipe);
        instruction->out = out;
        need(instruction->input);
        program_->need_tile(Gated::tile_floats());
        program_->add(std::move(instruction));
    }

    void head(int x, const PyWeight& weight, std::optional<Vector<float>> bias, int logits, const PyTransform& before, bool gathered, const std::string& recipe, float factor, float cap,
              const std::vector<int>& columns) {
        auto instruction = std::make_unique<Head>();
        const int own = columns.empty() ? width(logits) : own_columns(columns, width(logits));
        instruction->columns = columns;
        instruction->input = input(x, before, gathered);
        instruction->factor = factor, instruction->cap = cap;
        instruction->weight = weighted(instruction->input, weight, bias, logits, false, recipe, own);
        instruction->logits = logits;
        need(instruction->input);
        program_->need_tile(Head::tile_floats());
        logits_ = logits;
        program_->add(std::move(instruction));
    }

    void apply(int x, const PyTransform& of_row, int residual, int out) {
        auto instruction = std::make_unique<Apply>();
        const bool has_weight = of_row && std::get<1>(*of_row);
        const int part = has_weight ? int(std::get<1>(*of_row)->size()) : width(x);
        expect(part > 0 && width(x) % part == 0 && width(x) == width(out), "norm weight", part, width(x));
        if (residual >= 0) expect(width(residual) == width(out), "residual", width(residual), width(out));
        instruction->x = x, instruction->out = out, instruction->residual = residual, instruction->width = part;
        instruction->transform = transform(of_row, part);
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

    void attention(const PyKvPool& kv, int layer, int group, int q, int k, int v, const PyTransform& q_norm, int q_angles, const PyTransform& k_norm, int k_angles, int heads,
                   float scale, int window, float softcap, std::optional<Vector<float>> slopes, int out) {
        auto instruction = std::make_unique<Attention>();
        const KvLayout& layout = kv.pool->layout;
        expect(heads % kv.pool->kv_heads == 0, "query heads", heads, kv.pool->kv_heads);
        expect(width(q) == heads * layout.head_dim && width(out) == width(q), "query width", width(q), heads * layout.head_dim);
        check_kv(kv, layer, k, v);
        instruction->pool = kv.pool, instruction->layer = layer, instruction->group = group, instruction->heads = heads;
        instruction->q = q, instruction->k = k, instruction->v = v;
        instruction->of_q = {transform(q_norm, layout.head_dim), q_angles}, instruction->of_k = {transform(k_norm, layout.head_dim), k_angles};
        if (slopes) {
            expect(int(slopes->size()) == heads, "slopes", (long long)slopes->size(), heads);
            instruction->slopes = program_->keep(copy(*slopes));
        }
        instruction->scale = scale, instruction->window = window, instruction->softcap = softcap, instruction->out = out;
        instruction->plan = program_->plan(group, heads, kv.pool->kv_heads, window);
        program_->use_kv(group, *kv.pool);
        program_->need_attention(layout.dim);
        program_->add(std::move(instruction));
    }

    void bidirectional(int q, int k, int v, int heads, float scale, int out) {
        auto instruction = std::make_unique<Bidirectional>();
        expect(heads > 0 && width(q) % heads == 0 && width(out) == width(q), "query width", width(q), heads);
        const int head_dim = width(q) / heads;
        expect(head_dim <= kMaxHeadDim, "width of a head", head_dim, kMaxHeadDim);
        expect(width(k) == width(v) && width(k) % head_dim == 0 && heads % (width(k) / head_dim) == 0, "key or value", width(k), width(q));
        instruction->keys = program_->own_keys(width(k) / head_dim, head_dim);
        instruction->q = q, instruction->k = k, instruction->v = v, instruction->heads = heads, instruction->scale = scale, instruction->out = out;
        instruction->plan = program_->plan(-1, heads, width(k) / head_dim, 0, true);
        program_->need_attention(instruction->keys->layout.dim);
        program_->add(std::move(instruction));
    }

    void experts(int x, int scores, const std::vector<PyWeight>& gate, const std::vector<PyWeight>& up, const std::vector<PyWeight>& down, int chosen, bool normalise,
                 const std::string& activation, int hidden, int results, int out, const std::string& recipe) {
        auto instruction = std::make_unique<Experts>();
        const int count = int(gate.size());
        expect(count > 0 && width(scores) == count, "router's scores", width(scores), count);
        expect(chosen >= 1 && chosen <= count, "chosen experts", chosen, count);
        const int inner = int(gate[0].weight->matrix.rows);
        instruction->gate = matrices(gate, count, inner, width(x), recipe);
        instruction->up = matrices(up, count, inner, width(x), recipe);
        instruction->down = matrices(down, count, width(out), inner, recipe);
        expect(width(hidden) == chosen * inner, "experts' hidden values", width(hidden), chosen * inner);
        expect(width(results) == chosen * width(out), "experts' results", width(results), chosen * width(out));
        instruction->x = x, instruction->scores = scores, instruction->hidden = hidden, instruction->results = results, instruction->out = out;
        instruction->chosen = chosen, instruction->normalise = normalise, instruction->activation = activation_by_name(activation);
        instruction->load_at = program_->need_routing(chosen, count);
        program_->need_activations(chosen, {instruction->gate.recipe, instruction->up.recipe}, width(x));
        program_->need_activations(chosen, {instruction->down.recipe}, inner);
        program_->need_tile(Experts::tile_floats());
        program_->add(std::move(instruction));
    }

    void glu(int gate, int up, const std::string& activation, int out) {
        auto instruction = std::make_unique<Glu>();
        expect(width(gate) == width(up) && width(gate) == width(out), "glu operand", width(up), width(gate));
        instruction->gate = gate, instruction->up = up, instruction->activation = activation_by_name(activation), instruction->out = out;
        program_->add(std::move(instruction));
    }

    void add(int x, int y, float factor, int out) {
        auto instruction = std::make_unique<Add>();
        expect(width(x) == width(y) && width(x) == width(out), "add operand", width(y), width(x));
        instruction->x = x, instruction->y = y, instruction->factor = factor, instruction->out = out;
        program_->add(std::move(instruction));
    }

    void take_rows(int x, int out) {
        auto instruction = std::make_unique<TakeRows>();
        expect(width(x) == width(out), "take_rows output", width(out), width(x));
        instruction->x = x, instruction->out = out;
        program_->add(std::move(instruction));
    }

    void reduce_start(int partial) {
        auto instruction = std::make_unique<ReduceStart>();
        instruction->partial = checked_partial(partial);
        program_->note_reduction(1);
        program_->add(std::move(instruction));
    }

    void reduce_wait(int partial, int residual, int out) {
        auto instruction = std::make_unique<ReduceWait>();
        instruction->partial = checked_partial(partial), instruction->residual = residual, instruction->out = out;
        program_->note_reduction(-1);
        for (int slot : {residual, out})
            if (slot >= 0) expect(width(slot) == width(partial) && program_->slot(slot).space == RowSpace::all, "reduced value", width(slot), width(partial));
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

    int checked_partial(int slot) const {
        expect(program_->slot(slot).reduction >= 0, "slot of partial sums", slot, -1);
        return slot;
    }

    void check_kv(const PyKvPool& kv, int layer, int k, int v) const {
        expect(layer >= 0 && layer < kv.pool->layers, "layer of a KV pool", layer, kv.pool->layers);
        for (int slot : {k, v})
            if (slot >= 0) expect(width(slot) == kv.pool->kv_heads * kv.pool->layout.head_dim, "key or value", width(slot), kv.pool->kv_heads * kv.pool->layout.head_dim);
    }

    // A function of `n` values.
    Transform transform(const PyTransform& of_row, int n) {
        Transform out;
        if (!of_row) return out;
        const auto& [kind, weight, bias, first, second] = *of_row;
        if (kind == "cap") {
            out.kind = Transform::Kind::cap, out.factor = first, out.cap = second;
        } else if (kind == "rms_norm" || kind == "layer_norm") {
            out.kind = kind == "rms_norm" ? Transform::Kind::rms_norm : Transform::Kind::layer_norm, out.eps = first;
            expect(weight && int(weight->size()) == n, "norm weight", weight ? (long long)weight->size() : 0, n);
            out.weight = program_->keep(copy(*weight));
            if (bias) {
                expect(int(bias->size()) == n, "norm bias", (long long)bias->size(), n);
                out.bias = program_->keep(copy(*bias));
            }
        } else {
            out.kind = Transform::Kind::activation, out.activation = activation_by_name(kind);
        }
        return out;
    }

    // Columns of the logits that this rank has, where `columns` says at which each rank's begin.
    int own_columns(const std::vector<int>& columns, int vocab) const {
        const Group* group = program_->group().get();
        const int ranks = group ? group->ranks() : 0;
        expect(ranks > 0 && int(columns.size()) == ranks + 1, "ranks' columns of logits", (long long)columns.size(), ranks + 1);
        expect(columns.front() == 0 && columns.back() == vocab, "all ranks' columns of logits", columns.back(), vocab);
        for (int rank = 0; rank < ranks; ++rank) {
            const int count = columns[size_t(rank) + 1] - columns[size_t(rank)];
            expect(count >= 0 && count <= group->sizes.columns, "a rank's columns of logits", count, group->sizes.columns);
        }
        expect(program_->limits.logits <= group->sizes.logits, "rows of logits", program_->limits.logits, group->sizes.logits);
        return columns[size_t(group->rank) + 1] - columns[size_t(group->rank)];
    }

    Experts::Matrices matrices(const std::vector<PyWeight>& weights, int count, int rows, int cols, const std::string& recipe) const {
        expect(int(weights.size()) == count, "experts' weights", (long long)weights.size(), count);
        Experts::Matrices out{{}, recipe_of(weights[0].weight->matrix.format, quantised_recipe(recipe))};
        for (const PyWeight& weight : weights) {
            const PackedMatrix& matrix = weight.weight->matrix;
            expect(matrix.cols == cols, "expert's input", matrix.cols, cols);
            expect(matrix.rows == rows, "expert's output", matrix.rows, rows);
            expect(matrix.format == weights[0].weight->matrix.format, "expert's format", int(matrix.format), int(weights[0].weight->matrix.format));
            out.weights.push_back(weight.weight);
        }
        return out;
    }

    ProductInput input(int x, const PyTransform& before, bool gathered) {
        ProductInput out;
        out.x = x, out.cols = width(x), out.gathered = gathered, out.before = transform(before, out.cols);
        return out;
    }

    Weighted weighted(ProductInput& input, const PyWeight& weight, const std::optional<Vector<float>>& bias, int out, bool accumulate, const std::string& recipe,
                      int outputs = -1) {
        const PackedMatrix& matrix = weight.weight->matrix;
        expect(matrix.cols == input.cols, "weight's input", matrix.cols, input.cols);
        expect(matrix.rows == (outputs < 0 ? width(out) : outputs), "weight's output", matrix.rows, outputs < 0 ? width(out) : outputs);
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

    void need(const ProductInput& input) { program_->need_activations(1, input.recipes, input.cols); }

    // Room for what the step gives back.
    void make_room(Step& step) const {
        step.chosen.assign(size_t(step.logits()), kNoToken);
        step.output_row.assign(size_t(step.logits()), -1);
        step.expert_load.assign(size_t(program_->expert_counts()), 0);
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

std::optional<nb::ndarray<nb::numpy, float>> output(const PyTicket& ticket) {
    if (ticket.step->output.empty()) return std::nullopt;  // an array costs the host some microseconds
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
    m.attr("screened_rows") = kScreenedRows;
    m.def("release_heap", [] {
#if defined(__GLIBC__)
        malloc_trim(0);
#endif
    });
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

    nb::class_<PyPool>(m, "Pool")
        .def("__init__", [](PyPool* self, int threads) {
            if (threads < 1 || threads > 1024) throw std::invalid_argument("a pool has 1 to 1024 threads, got " + std::to_string(threads));
            new (self) PyPool(threads);
        }, "threads"_a)
        .def_prop_ro("threads", &Pool::threads)
        .def_prop_rw("distance", &Pool::distance, &Pool::set_distance)
        .def("ring", &Pool::ring, "eventfd"_a)
        .def("rest", &Pool::rest)
        .def("wait", [](PyPool& pool) { pool.run([](Worker&) {}); }, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<PyWeight>(m, "Weight")
        .def_prop_ro("rows", [](const PyWeight& w) { return w.weight->matrix.rows; })
        .def_prop_ro("cols", [](const PyWeight& w) { return w.weight->matrix.cols; })
        .def_prop_ro("nbytes", [](const PyWeight& w) { return w.weight->matrix.bytes(); });
    nb::class_<Arena>(m, "Arena").def(nb::init<>());
    m.def("pack", &pack_weight, "pool"_a, "arena"_a, "format"_a, "rows"_a, "cols"_a, "source"_a, "row_order"_a.none(), "head"_a = false);
    nb::class_<PyKvPool>(m, "KvPool")
        .def("__init__", [](PyKvPool* self, const std::string& dtype, int layers, int pages, int page_size, int kv_heads, int head_dim) {
            if (layers < 1 || pages < 1 || kv_heads < 1 || page_size < kTile || page_size % kTile || head_dim < 2 || head_dim % 2 || head_dim > kMaxHeadDim)
                throw std::invalid_argument("page_size must be a multiple of " + std::to_string(kTile) + " (got " + std::to_string(page_size) + "), head_dim even and at most " +
                                            std::to_string(kMaxHeadDim) + " (got " + std::to_string(head_dim) + ")");
            new (self) PyKvPool{std::make_shared<KvPool>(kv_type_by_name(dtype), layers, pages, page_size, kv_heads, head_dim)};
        })
        .def_prop_ro("kv_heads", [](const PyKvPool& kv) { return kv.pool->kv_heads; })
        .def_prop_ro("nbytes", [](const PyKvPool& kv) { return kv.pool->memory.bytes(); })
        .def("copy_page", [](const PyKvPool& kv, PyPool& pool, int source, int target) { copy_page(pool, kv, source, target); });
    nb::class_<Group>(m, "Group")
        .def_prop_ro("aborted", &Group::aborted)
        .def("abort", &Group::abort)
        .def_prop_ro("failure", &Group::failure);
    m.def("shared_group", [](int descriptor, int rank) -> std::shared_ptr<Group> { return SharedGroup::open(descriptor, rank); }, "descriptor"_a, "rank"_a);
    m.def("channel_group", &channel_group, "rank"_a, "ranks"_a, "rows"_a, "width"_a, "logits"_a, "columns"_a, "send"_a, "receive"_a);
    nb::class_<PyTicket>(m, "Ticket")
        .def("done", [](const PyTicket& t) { return t.pool->done(t.step->ticket); })
        .def("wait", [](const PyTicket& t) { t.pool->wait(t.step->ticket); }, nb::call_guard<nb::gil_scoped_release>())
        .def("chosen", [](const PyTicket& t) { return t.step->chosen; })
        .def("output", &output)
        .def_prop_ro("spared_bytes", [](const PyTicket& t) { return t.step->spared_bytes; })
        .def_prop_ro("expert_load", [](const PyTicket& t) { return t.step->expert_load; })
        .def_prop_ro("seconds", [](const PyTicket& t) { return t.step->seconds; })
        .def_prop_ro("failed", [](const PyTicket& t) { return t.step->failed.load(); })
        .def_prop_ro("reduces", [](const PyTicket& t) { return std::make_tuple(t.step->reductions, t.step->posted_bytes, t.step->waited); })
        .def_prop_ro("led", [](const PyTicket& t) { return t.step->led; })
        .def_prop_ro("apart", [](const PyTicket& t) { return !t.step->shares.empty(); })
        .def_prop_ro("started", [](const PyTicket& t) { return t.step->started; })
        .def_prop_ro("ended", [](const PyTicket& t) { return t.step->ended; });
    nb::class_<PyProgram>(m, "Program")
        .def(nb::init<PyPool&, const std::string&, int, int, int, int, std::vector<int>>(), nb::keep_alive<1, 2>())
        .def("slot", &PyProgram::slot)
        .def("join", &PyProgram::join)
        .def("partial", &PyProgram::partial)
        .def("angles", &PyProgram::angles)
        .def("embed", &PyProgram::embed)
        .def("linear", &PyProgram::linear, "x"_a, "parts"_a, "before"_a.none(), "gathered"_a, "recipe"_a)
        .def("gated", &PyProgram::gated, "x"_a, "gate"_a, "gate_bias"_a.none(), "up"_a, "up_bias"_a.none(), "activation"_a, "out"_a, "before"_a.none(), "recipe"_a)
        .def("head", &PyProgram::head, "x"_a, "weight"_a, "bias"_a.none(), "logits"_a, "before"_a.none(), "gathered"_a, "recipe"_a, "factor"_a, "cap"_a, "columns"_a)
        .def("reduce_start", &PyProgram::reduce_start)
        .def("reduce_wait", &PyProgram::reduce_wait)
        .def("apply", &PyProgram::apply)
        .def("rope", &PyProgram::rope)
        .def("kv_write", &PyProgram::kv_write)
        .def("attention", &PyProgram::attention, "kv"_a, "layer"_a, "group"_a, "q"_a, "k"_a, "v"_a, "q_norm"_a.none(), "q_angles"_a, "k_norm"_a.none(), "k_angles"_a, "heads"_a,
             "scale"_a, "window"_a, "softcap"_a, "slopes"_a.none(), "out"_a)
        .def("bidirectional", &PyProgram::bidirectional)
        .def("experts", &PyProgram::experts)
        .def("glu", &PyProgram::glu)
        .def("add", &PyProgram::add)
        .def("take_rows", &PyProgram::take_rows)
        .def("finish", &PyProgram::finish)
        .def("submit", &PyProgram::submit, nb::keep_alive<0, 1>(), "tokens"_a, "positions"_a, "chunk_rows"_a, "logit_rows"_a, "groups"_a, "samples"_a, "hidden"_a.none(), "timed"_a);
    bind_matrix(m);
}
