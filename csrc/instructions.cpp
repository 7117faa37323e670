#include "instructions.h"

#include <cstring>

namespace headrace {
namespace {

// Rows of a product that run over a group of tiles before the next group: their activations should stay in the second-level cache.
constexpr int kRowBlock = 256;
// Rows whose results stay in a thread's own memory until the next op reads them.
constexpr int kTileRows = 64;
constexpr int kHeadTiles = 16;   // tiles of the head in a piece
constexpr int kGatedTiles = 8;   // tiles of gate (and of up) in a piece, at most
constexpr int kPiecesAThread = 6;  // so that a thread that lost its core for a while holds up little

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles in a piece: an even number, since blocked products take two at once.
int tiles_a_piece(int tiles, int threads, int most) {
    const int wanted = tiles / (threads * kPiecesAThread) / 2 * 2;
    return std::max(2, std::min(most, wanted));
}

// Calls f for every row of `rows`, in pieces that the threads claim.
template <class F>
void each_row(int rows, Worker& worker, F f) {
    const int piece = std::max(1, rows / (worker.count() * kPiecesAThread));
    for (int i; (i = worker.claim()) * piece < rows;)
        for (int row = i * piece; row < std::min(rows, (i + 1) * piece); ++row) f(row);
}

}  // namespace

void Embed::run(Program& program, Step& step, Worker& worker) const {
    const Slot& to = program.slot(out);
    each_row(step.rows(), worker, [&](int row) {
        const int32_t token = step.tokens[size_t(row)];
        unpack_row(table->matrix, token >= 0 ? token : program.last_tokens[size_t(-1 - token)], to.row(row));
    });
}

// ---- products

std::vector<Activation> ProductInput::prepare(Program& program, const Step& step, Worker& worker) const {
    const int count = rows(program, step);
    const bool own = count <= kPrivateRows;
    std::vector<Activation> out;
    uint8_t* memory = own ? program.scratch(worker).activations : program.activations();
    for (Recipe recipe : recipes) {
        out.push_back(activation(recipe, count, cols, memory));
        memory += aligned(activation_bytes(recipe, own ? kPrivateRows : program.limits.rows, cols));
    }
    const Slot& from = program.slot(x);
    auto prepare_row = [&](int row) {
        const float* values = from.row(gathered ? step.logit_rows[size_t(row)] : row);
        if (norm != nullptr) {
            float* normed = program.scratch(worker).row;
            program.rows_of.rms_norm(values, norm, eps, cols, normed);
            values = normed;
        }
        for (const Activation& activation : out) program.matrix.quantise_row(activation, row, values);
    };
    if (own) {
        for (int row = 0; row < count; ++row) prepare_row(row);
    } else {
        each_row(count, worker, prepare_row);
        worker.barrier();
    }
    return out;
}

void Linear::run(Program& program, Step& step, Worker& worker) const {
    const int rows = input.rows(program, step);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    int tiles = 0;
    for (const Weighted& part : parts) tiles += int(part.weight->matrix.tiles());
    const int piece = tiles_a_piece(tiles, worker.count(), 64);
    // Pieces of one part after the other, then the next block of rows.
    int pieces = 0;
    for (const Weighted& part : parts) pieces += ceil_div(int(part.weight->matrix.tiles()), piece);
    for (int i; (i = worker.claim()) < pieces * ceil_div(rows, kRowBlock);) {
        const int row = i / pieces * kRowBlock;
        int tile = i % pieces;
        const Weighted* part = parts.data();
        for (int of_part; tile >= (of_part = ceil_div(int(part->weight->matrix.tiles()), piece)); ++part) tile -= of_part;
        const Slot& out = program.slot(part->out);
        const Product product{&part->weight->matrix, &activations[size_t(part->recipe)], out.data, out.width, part->bias, part->accumulate};
        program.matrix.multiply(product, row, std::min(rows, row + kRowBlock), tile * piece, std::min<int64_t>(part->weight->matrix.tiles(), (tile + 1) * piece));
    }
}

size_t Gated::tile_floats() { return 2 * size_t(kTileRows) * kGatedTiles * tile_rows; }

void Gated::run(Program& program, Step& step, Worker& worker) const {
    const int rows = input.rows(program, step);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    const Slot& to = program.slot(out);
    const int tiles = int(gate.weight->matrix.tiles()), piece = tiles_a_piece(tiles, worker.count(), kGatedTiles), pieces = ceil_div(tiles, piece);
    const int64_t ld = piece * tile_rows;
    float *gates = program.scratch(worker).tile, *ups = gates + kTileRows * ld;
    for (int i; (i = worker.claim()) < pieces * ceil_div(rows, kTileRows);) {
        const int row = i / pieces * kTileRows, past_row = std::min(rows, row + kTileRows), first = i % pieces * piece, past = std::min(tiles, first + piece);
        const int column = first * int(tile_rows), columns = std::min(to.width, past * int(tile_rows)) - column;
        auto multiply = [&](const Weighted& weighted, float* y) {
            const Product product{&weighted.weight->matrix, &activations[size_t(weighted.recipe)], y - row * ld - column, ld, weighted.bias, false};
            program.matrix.multiply(product, row, past_row, first, past);
        };
        multiply(gate, gates);
        multiply(up, ups);
        for (int r = row; r < past_row; ++r)
            program.rows_of.silu_mul(gates + (r - row) * ld, ups + (r - row) * ld, columns, to.row(r) + column);
    }
}

size_t Head::tile_floats() { return size_t(kTileRows) * kHeadTiles * tile_rows; }

void Head::run(Program& program, Step& step, Worker& worker) const {
    const int rows = input.rows(program, step);
    if (rows == 0) return;
    Scratch& scratch = program.scratch(worker);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    const Slot& all = program.slot(logits);
    const bool keep = std::any_of(step.samples.begin(), step.samples.end(), [](const SampleSpec& spec) { return spec.logits || spec.temperature > 0; });
    const int tiles = int(weight.weight->matrix.tiles()), pieces = ceil_div(tiles, kHeadTiles);
    const int64_t ld = keep ? all.width : kHeadTiles * tile_rows;
    std::fill(scratch.best.begin(), scratch.best.begin() + rows, kNoBest);
    for (int i; (i = worker.claim()) < pieces * ceil_div(rows, kTileRows);) {
        const int row = i / pieces * kTileRows, past_row = std::min(rows, row + kTileRows), first = i % pieces * kHeadTiles, past = std::min(tiles, first + kHeadTiles);
        const int column = first * int(tile_rows), columns = std::min(all.width, past * int(tile_rows)) - column;
        float* y = keep ? all.data : scratch.tile - row * ld - column;
        program.matrix.multiply({&weight.weight->matrix, &activations[0], y, ld, weight.bias, false}, row, past_row, first, past);
        for (int r = row; r < past_row; ++r) program.rows_of.best(y + r * ld + column, columns, column, scratch.best[size_t(r)]);
    }
    worker.barrier();
    for (int row; (row = worker.claim()) < rows;) choose(program, step, worker, row);
}

void Head::choose(Program& program, Step& step, Worker& worker, int row) const {
    const SampleSpec& spec = step.samples[size_t(row)];
    const Slot& all = program.slot(logits);
    Best best = kNoBest;
    for (int thread = 0; thread < worker.count(); ++thread) {
        const Best& other = program.scratch_of(thread).best[size_t(row)];
        if (other.value > best.value || (other.value == best.value && uint32_t(other.id) < uint32_t(best.id))) best.value = other.value, best.id = other.id;
        best.finite += other.finite;
    }
    int32_t token = kNoToken;
    if (spec.choose) {
        if (!(best.finite == 0.0f) || best.id < 0)
            token = kBroken;
        else if (spec.temperature > 0)
            token = sample(program.isa, all.row(row), all.width, spec, step.positions[size_t(step.logit_rows[size_t(row)])] + 1, best.value, program.scratch(worker).sampling);
        else
            token = best.id;
        if (spec.slot >= 0) program.last_tokens[size_t(spec.slot)] = std::max(token, 0);
    }
    step.chosen[size_t(row)] = token;
    if (spec.logits) std::memcpy(step.output.data() + size_t(step.output_row[size_t(row)]) * size_t(all.width), all.row(row), size_t(all.width) * 4);
}

// ---- rows

void RmsNorm::run(Program& program, Step& step, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    each_row(program.rows(step, x), worker, [&](int row) {
        for (int i = 0; i < from.width; i += width) program.rows_of.rms_norm(from.row(row) + i, weight, eps, width, to.row(row) + i);
    });
}

void Rope::run(Program& program, Step& step, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    const AngleTable& table = program.angles(angles);
    const int head_dim = from.width / heads;
    each_row(step.rows(), worker, [&](int row) {
        for (int i = 0; i < from.width; i += head_dim) program.rows_of.rope(from.row(row) + i, table.row(row), table.half(), head_dim, to.row(row) + i);
    });
}

void KvWrite::run(Program& program, Step& step, Worker& worker) const {
    const KvLayout& layout = pool->layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    each_row(step.rows(), worker, [&](int row) {
        const int64_t slot = step.groups[size_t(group)].slots[size_t(row)];
        for (int head = 0; head < layout.kv_heads; ++head)
            kernels.store(layout, kv_tile(layout, pool->layer(layer), slot, head), int(slot % layout.page_size) % kTile,
                          program.slot(k).row(row) + head * layout.head_dim, program.slot(v).row(row) + head * layout.head_dim);
    });
}

void SiluMul::run(Program& program, Step& step, Worker& worker) const {
    const Slot &a = program.slot(gate), &b = program.slot(up), &to = program.slot(out);
    each_row(program.rows(step, gate), worker, [&](int row) { program.rows_of.silu_mul(a.row(row), b.row(row), to.width, to.row(row)); });
}

void Add::run(Program& program, Step& step, Worker& worker) const {
    const Slot &a = program.slot(x), &b = program.slot(y), &to = program.slot(out);
    each_row(program.rows(step, x), worker, [&](int row) { program.rows_of.add(a.row(row), b.row(row), to.width, to.row(row)); });
}

void TakeRows::run(Program& program, Step& step, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    each_row(step.logits(), worker, [&](int row) { std::memcpy(to.row(row), from.row(step.logit_rows[size_t(row)]), size_t(to.width) * 4); });
}

// ---- attention

void Attention::run(Program& program, Step& step, Worker& worker) const {
    const AttentionPlan& units = program.attention_plan(plan);
    if (!units.single && (k >= 0 || q_angles >= 0)) {
        const Slot& queries = program.slot(q);
        each_row(step.rows(), worker, [&](int row) {
            if (k >= 0)
                for (int head = 0; head < pool->layout.kv_heads; ++head) write(program, step, worker, row, head);
            if (q_angles < 0) return;
            const AngleTable& table = program.angles(q_angles);
            const int head_dim = pool->layout.head_dim;
            for (int i = 0; i < queries.width; i += head_dim) program.rows_of.rope(queries.row(row) + i, table.row(row), table.half(), head_dim, queries.row(row) + i);
        });
        worker.barrier();
    }
    const int count = int(units.units.size()), piece = std::max(1, count / (worker.count() * 16));
    for (int i; (i = worker.claim()) * piece < count;)
        for (int unit = i * piece; unit < std::min(count, (i + 1) * piece); ++unit) attend(program, step, worker, units, unit, unit + 1 < std::min(count, (i + 1) * piece));
}

void Attention::write(Program& program, const Step& step, Worker& worker, int row, int kv_head) const {
    const KvLayout& layout = pool->layout;
    const float *key = program.slot(k).row(row) + kv_head * layout.head_dim, *value = program.slot(v).row(row) + kv_head * layout.head_dim;
    float* rotated = program.scratch(worker).partial;  // nobody's before the units run
    if (k_angles >= 0) {
        const AngleTable& table = program.angles(k_angles);
        program.rows_of.rope(key, table.row(row), table.half(), layout.head_dim, rotated);
        key = rotated;
    }
    const int64_t slot = step.groups[size_t(group)].slots[size_t(row)];
    attention_kernels(program.isa, layout.type).store(layout, kv_tile(layout, pool->layer(layer), slot, kv_head), int(slot % layout.page_size) % kTile, key, value);
}

void Attention::attend(Program& program, const Step& step, Worker& worker, const AttentionPlan& plan, int index, bool another) const {
    const AttentionPlan::Unit& unit = plan.units[size_t(index)];
    const KvLayout& layout = pool->layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    const Slot &queries = program.slot(q), &to = program.slot(out);
    Scratch& scratch = program.scratch(worker);
    const int a_row = heads / layout.kv_heads, first_row = step.chunk_rows[size_t(unit.chunk)];

    const float* vectors[kQueries];
    float* results[kQueries];
    int32_t positions[kQueries];
    for (int i = 0; i < unit.count; ++i) {
        const int query = unit.first_query + i, row = first_row + query / a_row, at = (unit.kv_head * a_row + query % a_row) * layout.head_dim;
        vectors[i] = queries.row(row) + at;
        results[i] = to.row(row) + at;
        positions[i] = step.positions[size_t(row)];
        if (plan.single && q_angles >= 0) {
            const AngleTable& table = program.angles(q_angles);
            float* rotated = scratch.queries + i * layout.dim;
            program.rows_of.rope(vectors[i], table.row(row), table.half(), layout.head_dim, rotated);
            vectors[i] = rotated;
        }
    }
    // With one row a chunk, the unit that has its newest key is the only one to read it.
    if (plan.single && k >= 0 && unit.past_block == positions[unit.count - 1] / kSplit + 1) write(program, step, worker, first_row, unit.kv_head);

    const Step::Group& places = step.groups[size_t(group)];
    const AttentionCall call{&layout, pool->layer(layer), places.pages.data() + size_t(unit.chunk) * size_t(places.width), scale, window, softcap};
    Ahead ahead{nullptr, 0, 0, 0};
    if (another && plan.single) {  // units of few queries: their time is memory's
        const AttentionPlan::Unit& next = plan.units[size_t(index) + 1];
        const int first = next.first_block * kSplit, last = step.positions[size_t(step.chunk_rows[size_t(next.chunk)])];
        const int from = window > 0 ? std::max(first, last - window + 1) : first;
        ahead = {places.pages.data() + size_t(next.chunk) * size_t(places.width), next.kv_head, from, std::min(last + 1, first + kSplit)};
    }
    const Ahead nothing{nullptr, 0, 0, 0};
    kernels.prepare(call, vectors, unit.count, scratch.attention);
    if (unit.join < 0) {
        for (int block = unit.first_block; block < unit.past_block; ++block) {
            float* part = block == unit.first_block ? scratch.state : scratch.partial;
            kernels.partial(call, positions, unit.count, unit.kv_head, block, block + 1 == unit.past_block ? ahead : nothing, scratch.attention, part);
            if (part == scratch.partial) kernels.merge(scratch.state, part, unit.count, layout.dim, false);
        }
        kernels.finish(scratch.state, unit.count, layout.dim, layout.head_dim, results);
        return;
    }
    const AttentionPlan::Join& join = plan.joins[size_t(unit.join)];
    kernels.partial(call, positions, unit.count, unit.kv_head, unit.first_block, ahead, scratch.attention,
                    program.partial(join.first_partial + unit.first_block - join.first_block));
    if (program.joined(unit.join).fetch_add(1, std::memory_order_acq_rel) + 1 < join.blocks) return;
    program.joined(unit.join).store(0, std::memory_order_relaxed);
    for (int i = 0; i < join.blocks; ++i) kernels.merge(scratch.state, program.partial(join.first_partial + i), unit.count, layout.dim, i == 0);
    kernels.finish(scratch.state, unit.count, layout.dim, layout.head_dim, results);
}

}  // namespace headrace
