#include "instructions.h"

#include <cstring>

#include "pieces.h"

namespace headrace {
namespace {

// Bytes of activations that run over a group of tiles before the next group: they should stay in the second-level cache.
constexpr int64_t kRowBlockBytes = 544 << 10;
constexpr int kMostRows = 512;  // of such a block: more rows share what reading weights costs
constexpr int kLinearRows = 256, kGatedRows = 128;  // of such a block, before they are made even: at least
constexpr int kTilesAThread = 16;  // of all such blocks together, if they can be cut so far
constexpr int kLinearTiles = 64;  // tiles in a piece, at most
constexpr int kHeadTiles = 16;
constexpr int kGatedFloats = 256 * kGatedTiles * int(tile_rows);  // of gate, and of up: of more rows, fewer tiles at once
static_assert(kGatedFloats >= kMostRows * 2 * tile_rows);

// Rows of a block: as even blocks as may be, and smaller ones where tiles are too few to keep all threads busy. Neither that nor their bytes asks
// for less than `fewest` rows.
int rows_of_block(int rows, const std::vector<Activation>& activations, int fewest, int tiles, int threads) {
    if (rows == 0) return fewest;
    int64_t row_bytes = 1;
    for (const Activation& activation : activations) row_bytes = std::max(row_bytes, activation.row_bytes);
    const int most = int(std::clamp<int64_t>(kRowBlockBytes / row_bytes, fewest, kMostRows));
    const int wanted = std::min(ceil_div(rows, fewest), ceil_div(kTilesAThread * threads, tiles));
    return ceil_div(rows, std::max(ceil_div(rows, most), wanted));
}

}  // namespace

void Embed::run(Program& program, Step& step, Worker& worker) const {
    const Slot& to = program.slot(out);
    each_row(worker.rows, worker, [&](int row) {
        const int32_t token = by_position ? 0 : step.tokens[size_t(row)];
        const int64_t index = offset + int64_t(by_position ? step.positions[size_t(row)] : token >= 0 ? token : program.last_tokens[size_t(-1 - token)]);
        if (index >= 0 && index < table->matrix.rows)
            unpack_row(table->matrix, index, to.row(row));
        else
            std::memset(to.row(row), 0, size_t(to.width) * 4);
    });
}

void Transform::apply(const RowKernels& kernels, const float* x, int n, float* y) const {
    switch (kind) {
        case Kind::nothing: std::memmove(y, x, size_t(n) * 4); return;
        case Kind::rms_norm: kernels.rms_norm(x, weight, eps, n, y); return;
        case Kind::layer_norm: kernels.layer_norm(x, weight, bias, eps, n, y); return;
        case Kind::activation: kernels.activate(activation, x, n, y); return;
        case Kind::cap: kernels.cap(x, factor, cap, n, y); return;
    }
}

// ---- products

bool ProductInput::may_be_made_ready() const {
    auto of_groups = [](Recipe recipe) { return recipe == Recipe::group || recipe == Recipe::shifted; };
    return !gathered && before.kind == Transform::Kind::nothing && std::all_of(recipes.begin(), recipes.end(), of_groups);
}

std::vector<Activation> ProductInput::room(Program& program, const Step& step, const Worker& worker) const {
    const Range team = rows(program, worker);
    const bool own = team.count() <= kPrivateRows && !is_made_ready(program, step);
    std::vector<Activation> out;
    uint8_t* memory = own ? program.scratch(worker).activations : program.activations(team.first);
    for (Recipe recipe : recipes) {
        out.push_back(activation(recipe, team.count(), cols, memory));
        memory += aligned(activation_bytes(recipe, team.count(), cols));
        out.back().data -= team.first * out.back().row_bytes;  // found by the step's row
    }
    return out;
}

MadeReady::MadeReady(const ProductInput* reader, Program& program, const Step& step, const Worker& worker) : kernels_(program.matrix) {
    if (reader && reader->is_made_ready(program, step)) room_ = reader->room(program, step, worker);
}

void MadeReady::put(const float* values, int row, int column, int count) const {
    for (const Activation& activation : room_) kernels_.quantise_groups(activation, row, column / 32, count / 32, values);
}

std::vector<Activation> ProductInput::prepare(Program& program, const Step& step, Worker& worker) const {
    const Range team = rows(program, worker);
    std::vector<Activation> out = room(program, step, worker);
    if (is_made_ready(program, step)) return out;
    const Slot& from = program.slot(x);
    auto prepare_row = [&](int row) {
        const float* values = from.row(gathered ? step.logit_rows[size_t(row)] : row);
        if (before.kind != Transform::Kind::nothing) {
            float* transformed = program.scratch(worker).row;
            before.apply(program.rows_of, values, cols, transformed);
            values = transformed;
        }
        for (const Activation& activation : out) program.matrix.quantise_row(activation, row, values);
    };
    if (team.count() <= kPrivateRows) {
        for (int row = team.first; row < team.past; ++row) prepare_row(row);
    } else {
        each_row(team, worker, prepare_row);
        worker.barrier();
    }
    return out;
}

void Linear::run(Program& program, Step& step, Worker& worker) const {
    const Range rows = input.rows(program, worker);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    const int all = tiles(), rows_at_once = rows_of_block(rows.count(), activations, kLinearRows, all, worker.count());
    each_stretch(ceil_div(rows.count(), rows_at_once), all, kLinearTiles, worker, [&](int block, int first, int past, int next) {
        const int row = rows.first + block * rows_at_once;
        const uint8_t* after = next >= 0 ? tile(next) : weights_after(worker);
        for (const Weighted& part : parts) {  // their tiles follow each other
            const int count = int(part.weight->matrix.tiles());
            const Slot& out = program.slot(part.out);
            const Product product{&part.weight->matrix, &activations[size_t(part.recipe)], out.data, out.width, part.bias, part.accumulate,
                                  past > count ? (&part + 1)->weight->tile(0) : after};
            if (first < count && past > 0) program.matrix.multiply(product, row, std::min(rows.past, row + rows_at_once), std::max(first, 0), std::min(past, count));
            first -= count, past -= count;
        }
    });
}

int Linear::tiles() const {
    int count = 0;
    for (const Weighted& part : parts) count += int(part.weight->matrix.tiles());
    return count;
}

const uint8_t* Linear::tile(int index) const {
    for (const Weighted& part : parts) {
        const int count = int(part.weight->matrix.tiles());
        if (index < count) return part.weight->tile(index);
        index -= count;
    }
    return nullptr;
}

const uint8_t* Linear::reads_first(const Worker& worker) const { return tile(Cut(tiles(), worker).first); }

double Linear::row_cost() const {
    double cost = 0;
    for (const Weighted& part : parts) cost += part.row_cost();
    return cost;
}

size_t Gated::tile_floats() { return 2 * size_t(kGatedFloats); }

void Gated::run(Program& program, Step& step, Worker& worker) const {
    const Range rows = input.rows(program, worker);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    const Slot& to = program.slot(out);
    const MadeReady made(reader, program, step, worker);
    const int all = int(gate.weight->matrix.tiles()), rows_at_once = rows_of_block(rows.count(), activations, kGatedRows, all, worker.count());
    const int tiles_at_once = std::min(kGatedTiles, kGatedFloats / (rows_at_once * int(tile_rows)) / 2 * 2);
    const int64_t ld = tiles_at_once * tile_rows;
    float *gates = program.scratch(worker).tile, *ups = gates + kGatedFloats;
    each_stretch(ceil_div(rows.count(), rows_at_once), all, tiles_at_once, worker, [&](int block, int first, int past, int next) {
        const int row = rows.first + block * rows_at_once, past_row = std::min(rows.past, row + rows_at_once);
        const int column = first * int(tile_rows), columns = std::min(to.width, past * int(tile_rows)) - column;
        auto multiply = [&](const Weighted& weighted, float* y, const uint8_t* after) {
            const Product product{&weighted.weight->matrix, &activations[size_t(weighted.recipe)], y - row * ld - column, ld, weighted.bias, false, after};
            program.matrix.multiply(product, row, past_row, first, past);
        };
        multiply(gate, gates, up.weight->tile(first));
        multiply(up, ups, next >= 0 ? gate.weight->tile(next) : weights_after(worker));
        for (int r = row; r < past_row; ++r) {
            program.rows_of.glu(activation, gates + (r - row) * ld, ups + (r - row) * ld, columns, to.row(r) + column);
            made.put(to.row(r) + column, r, column, columns);
        }
    });
}

const uint8_t* Gated::reads_first(const Worker& worker) const { return gate.weight->tile(Cut(int(gate.weight->matrix.tiles()), worker).first); }

size_t Head::tile_floats() { return size_t(kTileRows) * kHeadTiles * tile_rows; }

void Head::run(Program& program, Step& step, Worker& worker) const {
    const Range rows = input.rows(program, worker);
    if (rows.count() == 0) return;
    Scratch& scratch = program.scratch(worker);
    const std::vector<Activation> activations = input.prepare(program, step, worker);
    const Slot& all = program.slot(logits);
    const bool keep = std::any_of(step.samples.begin(), step.samples.end(), [](const SampleSpec& spec) { return spec.logits || spec.temperature > 0; });
    std::fill(scratch.best.begin() + rows.first, scratch.best.begin() + rows.past, kNoBest);
    Group* group = program.group().get();
    Reach reach[kScreenedRows];
    const bool may = !keep && rows.count() <= kScreenedRows && bounded(activations[0]);
    bool screened = may && program.screening.pause == 0;
    for (int i = 0; screened && i < rows.count(); ++i) screened = may_screen(reach[i] = screening_reach(activations[0], rows.first + i));
    if (screened) multiply_screened(program, worker, activations[0], reach);
    else multiply(program, worker, activations, !keep ? nullptr : group ? group->logits(group->rank, 0) : all.data, group ? group->sizes.columns : all.width);
    worker.barrier();
    if (screened && worker.index == worker.first_of_team()) {
        const PackedMatrix& matrix = weight.weight->matrix;
        int64_t left = 0;
        for (int thread = 0; thread < worker.count(); ++thread) left += program.scratch_of(worker.index + thread).screened;
        program.screening.done(left * kScreenedTiles <= matrix.tiles());
        step.spared_bytes = (matrix.tiles() - left) * int64_t(matrix.apart_bytes);
    } else if (may && worker.index == worker.first_of_team()) {
        program.screening.skipped();
    }
    if (group) return choose_among_ranks(program, step, worker, keep);
    for (int row; (row = rows.first + worker.claim()) < rows.past;) {
        note(program, step, row, choose(program, step, worker, row, best_of_team(program, worker, row)));
        give_back(program, step, row);
    }
}

const uint8_t* Head::reads_first(const Worker& worker) const { return weight.weight->tile(Cut(int(weight.weight->matrix.tiles()), worker).first); }

// The rank's columns of the logits, into `kept` [rows][ld] unless that is null, and the best of them.
void Head::multiply(Program& program, Worker& worker, const std::vector<Activation>& activations, float* kept, int64_t ld) const {
    const Range rows = input.rows(program, worker);
    Scratch& scratch = program.scratch(worker);
    const int width = int(weight.weight->matrix.rows);
    if (!kept) ld = kHeadTiles * tile_rows;
    each_stretch(ceil_div(rows.count(), kTileRows), int(weight.weight->matrix.tiles()), kHeadTiles, worker, [&](int block, int first, int past, int next) {
        const int row = rows.first + block * kTileRows, past_row = std::min(rows.past, row + kTileRows);
        const int column = first * int(tile_rows), count = std::min(width, past * int(tile_rows)) - column;
        float* y = kept ? kept : scratch.tile - row * ld - column;
        const Product product{&weight.weight->matrix, &activations[0], y, ld, weight.bias, false, next >= 0 ? weight.weight->tile(next) : weights_after(worker)};
        program.matrix.multiply(product, row, past_row, first, past);
        for (int r = row; r < past_row; ++r) {
            float* values = y + r * ld + column;
            if (factor != 1 || cap > 0) program.rows_of.cap(values, factor, cap, count, values);
            program.rows_of.best(values, count, first_column(program) + column, scratch.best[size_t(r)]);
        }
    });
}

// Whether bounds of the products can be had, and are bounds of the logits.
bool Head::bounded(const Activation& x) const {
    return weight.weight->matrix.apart_bytes > 0 && x.recipe != Recipe::row && !weight.bias && factor == 1 && !(cap > 0);
}

// The best of the rank's columns, from the logits of the tiles that may hold it.
void Head::multiply_screened(Program& program, Worker& worker, const Activation& x, const Reach* reach) const {
    const Range rows = input.rows(program, worker);
    const PackedMatrix& matrix = weight.weight->matrix;
    Scratch& scratch = program.scratch(worker);
    std::atomic<float>* shared = program.screening.least;
    float least[kScreenedRows];
    scratch.screened = 0;
    const int tiles = int(matrix.tiles());
    each_stretch(1, tiles, tiles, worker, [&](int, int first, int past, int next) {
        for (int tile = first; tile < past; ++tile) {
            const int column = tile * int(tile_rows), count = int(std::min<int64_t>(tile_rows, matrix.rows - column));
            float* y = scratch.tile - rows.first * tile_rows - column;
            const uint8_t* after = tile + 1 < past ? weight.weight->tile(tile + 1) : next >= 0 ? weight.weight->tile(next) : weights_after(worker);
            const Product product{&matrix, &x, y, tile_rows, nullptr, false, after};
            for (int i = 0; i < rows.count(); ++i) least[i] = shared[i].load(std::memory_order_relaxed);
            if (!program.matrix.screen(product, rows.first, rows.past, tile, reach - rows.first, least - rows.first)) continue;
            ++scratch.screened;
            program.matrix.multiply(product, rows.first, rows.past, tile, tile + 1);
            for (int i = 0; i < rows.count(); ++i) {
                const int row = rows.first + i;
                Best& best = scratch.best[size_t(row)];
                program.rows_of.best(y + row * tile_rows + column, count, first_column(program) + column, best);
                if (best.value > shared[i].load(std::memory_order_relaxed)) shared[i].store(best.value, std::memory_order_relaxed);
            }
        }
    });
}

namespace {

void take_in(Best& best, const Best& other) {
    if (other.value > best.value || (other.value == best.value && uint32_t(other.id) < uint32_t(best.id))) best.value = other.value, best.id = other.id;
    best.finite += other.finite;
}

}  // namespace

Best Head::best_of_team(Program& program, const Worker& worker, int row) const {
    Best best = kNoBest;
    for (int thread = 0; thread < worker.count(); ++thread) take_in(best, program.scratch_of(worker.first_of_team() + thread).best[size_t(row)]);
    return best;
}

int32_t Head::choose(Program& program, const Step& step, const Worker& worker, int row, const Best& best) const {
    const SampleSpec& spec = step.samples[size_t(row)];
    const Slot& all = program.slot(logits);
    if (!spec.choose) return kNoToken;
    if (!(best.finite == 0.0f) || best.id < 0 || best.id >= all.width) return kBroken;
    if (!(spec.temperature > 0)) return best.id;
    return sample(program.isa, all.row(row), all.width, spec, step.positions[size_t(step.logit_rows[size_t(row)])] + 1, best.value, program.scratch(worker).sampling);
}

void Head::note(Program& program, Step& step, int row, int32_t token) const {
    const SampleSpec& spec = step.samples[size_t(row)];
    if (spec.choose && spec.slot >= 0) program.last_tokens[size_t(spec.slot)] = std::max(token, 0);
    step.chosen[size_t(row)] = token;
}

void Head::give_back(Program& program, Step& step, int row) const {
    const Slot& all = program.slot(logits);
    if (!step.samples[size_t(row)].logits) return;
    std::memcpy(step.output.data() + size_t(step.output_row[size_t(row)]) * size_t(all.width), all.row(row), size_t(all.width) * 4);
}

// All ranks note the same tokens. Greedy ones each finds for itself; where a row is sampled, row i is rank i % ranks' to choose for, from
// the columns of all.
void Head::choose_among_ranks(Program& program, Step& step, Worker& worker, bool kept) const {
    Group& group = *program.group();
    const Slot& all = program.slot(logits);
    const int rows = worker.logits.count();
    const bool sampled = std::any_of(step.samples.begin(), step.samples.end(), [](const SampleSpec& spec) { return spec.choose && spec.temperature > 0; });
    for (int row; (row = worker.claim()) < rows;) group.best(group.rank)[row] = best_of_team(program, worker, row);
    worker.barrier();
    uint64_t event = program.post(step, worker, group.layout.best, size_t(rows) * sizeof(Best));
    if (kept) event = program.post(step, worker, group.layout.logits, size_t(rows) * size_t(group.sizes.columns) * 4);
    program.await(step, worker, event);
    for (int row; (row = worker.claim()) < rows;) {
        const SampleSpec& spec = step.samples[size_t(row)];
        const bool own = row % group.ranks() == group.rank;
        if (spec.logits || (own && spec.choose && spec.temperature > 0))
            for (int rank = 0; rank < group.ranks(); ++rank)
                std::memcpy(all.row(row) + columns[size_t(rank)], group.logits(rank, row), size_t(columns[size_t(rank) + 1] - columns[size_t(rank)]) * 4);
        give_back(program, step, row);
        if (sampled && !own) continue;
        Best best = kNoBest;
        for (int rank = 0; rank < group.ranks(); ++rank) take_in(best, group.best(rank)[row]);
        const int32_t token = step.failed ? kBroken : choose(program, step, worker, row, best);
        if (sampled)
            group.tokens(group.rank)[row] = token;
        else
            note(program, step, row, token);
    }
    if (!sampled) return;
    worker.barrier();
    program.await(step, worker, program.post(step, worker, group.layout.tokens, size_t(rows) * 4));
    for (int row; (row = worker.claim()) < rows;) {
        const int32_t token = group.tokens(row % group.ranks())[row];
        note(program, step, row, token < kBroken || token >= all.width ? kBroken : token);
    }
}

// ---- reductions

void ReduceStart::run(Program& program, Step& step, Worker& worker) const {
    const Slot& slot = program.slot(partial);
    const size_t row_bytes = size_t(slot.width) * 4, first = program.group()->layout.partial(program.buffer(slot.reduction));
    const Range rows = step.halves[size_t(worker.half)];
    program.scratch(worker).events[size_t(slot.reduction * 2 + worker.half)] =
        program.post(step, worker, first + size_t(rows.first) * row_bytes, size_t(rows.count()) * row_bytes);
    if (worker.index == 0 && worker.half == 0) ++step.reductions;
}

void ReduceWait::run(Program& program, Step& step, Worker& worker) const {
    const Slot &from = program.slot(partial), &to = program.slot(out);
    const Group& group = *program.group();
    program.await(step, worker, program.scratch(worker).events[size_t(from.reduction * 2 + worker.half)]);
    std::vector<const float*> areas(size_t(group.ranks())), parts(areas.size());
    for (int rank = 0; rank < group.ranks(); ++rank) areas[size_t(rank)] = group.partial(rank, program.buffer(from.reduction));
    each_row(worker.rows, worker, [&](int row) {
        const size_t at = size_t(row) * size_t(from.width);
        for (size_t rank = 0; rank < parts.size(); ++rank) parts[rank] = areas[rank] + at;
        program.rows_of.sum(parts.data(), int(parts.size()), residual < 0 ? nullptr : program.slot(residual).row(row), to.width, to.row(row));
    });
}

// ---- rows

void Apply::run(Program& program, Step&, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    each_row(program.range(worker, x), worker, [&](int row) {
        float* result = residual < 0 ? to.row(row) : program.scratch(worker).row;
        for (int i = 0; i < from.width; i += width) transform.apply(program.rows_of, from.row(row) + i, width, result + i);
        if (residual >= 0) program.rows_of.add(program.slot(residual).row(row), result, 1, to.width, to.row(row));
    });
}

void Rope::run(Program& program, Step&, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    const AngleTable& table = program.angles(angles);
    const int head_dim = from.width / heads;
    each_row(worker.rows, worker, [&](int row) {
        for (int i = 0; i < from.width; i += head_dim) program.rows_of.rope(from.row(row) + i, table.row(row), table.half(), head_dim, to.row(row) + i);
    });
}

void Glu::run(Program& program, Step&, Worker& worker) const {
    const Slot &a = program.slot(gate), &b = program.slot(up), &to = program.slot(out);
    each_row(program.range(worker, gate), worker, [&](int row) { program.rows_of.glu(activation, a.row(row), b.row(row), to.width, to.row(row)); });
}

void Add::run(Program& program, Step&, Worker& worker) const {
    const Slot &a = program.slot(x), &b = program.slot(y), &to = program.slot(out);
    each_row(program.range(worker, x), worker, [&](int row) { program.rows_of.add(a.row(row), b.row(row), factor, to.width, to.row(row)); });
}

void TakeRows::run(Program& program, Step& step, Worker& worker) const {
    const Slot &from = program.slot(x), &to = program.slot(out);
    each_row(worker.logits, worker, [&](int row) { std::memcpy(to.row(row), from.row(step.logit_rows[size_t(row)]), size_t(to.width) * 4); });
}

}  // namespace headrace
