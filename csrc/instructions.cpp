#include "instructions.h"

#include <cmath>
#include <cstring>

namespace headrace {
namespace {

// Bytes of activations that run over a group of tiles before the next group: they should stay in the second-level cache.
constexpr int64_t kRowBlockBytes = 544 << 10;
constexpr int kMostRows = 512;  // of such a block: more rows share what reading weights costs
constexpr int kLinearRows = 256, kGatedRows = 128;  // of such a block, before they are made even: at least
constexpr int kTilesAThread = 16;  // of all such blocks together, if they can be cut so far
// Rows and tiles whose results stay in a thread's own memory until the next op reads them.
constexpr int kTileRows = 128;
constexpr int kLinearTiles = 64;  // tiles in a piece, at most
constexpr int kHeadTiles = 16;
constexpr int kGatedTiles = 8;  // of gate, and of up
constexpr int kGatedFloats = 256 * kGatedTiles * int(tile_rows);  // likewise: of more rows, fewer tiles at once
static_assert(kGatedFloats >= kMostRows * 2 * tile_rows);
constexpr int kExpertRows = 256;  // of a block of the down product
constexpr int kPiecesAThread = 6;  // so that a thread that lost its core for a while holds up little

int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// Tiles in a piece: an even number, since blocked products take two at once.
int tiles_a_piece(int tiles, int threads, int most) {
    const int wanted = tiles / (threads * kPiecesAThread) / 2 * 2;
    return std::max(2, std::min(most, wanted));
}

// Of so many tiles, how many each thread of a team begins with, and how many make a piece of the rest. Both are even.
struct Cut {
    int own, piece, first;  // first: where this thread's own begin

    Cut(int tiles, const Worker& worker)
        : own(worker.count() == 1 ? tiles : tiles * 3 / 4 / worker.count() / 2 * 2),
          piece(std::max(2, (tiles - own * worker.count()) / (worker.count() * kPiecesAThread) / 2 * 2)),
          first((worker.index - worker.first_of_team()) * own) {}
};

// Calls f(block, first, past, next) for the tiles of every block of rows, at most `most` tiles at once; the thread goes on with tile `next`, or is
// done where that is -1. A thread begins with a stretch of its own: claims cost, and memory likes long reads. The team claims the rest, so that
// a thread that lost its core for a while holds up little; each claims a piece as it begins with the one before, so that `next` is known.
template <class F>
void each_stretch(int blocks, int tiles, int most, Worker& worker, F f) {
    const int all = blocks * tiles;
    const Cut cut(all, worker);
    const int rest = worker.count() * cut.own;
    int from = cut.first, past = from + cut.own;
    do {
        const int then = std::min(all, rest + worker.claim() * cut.piece);
        for (int count; from < past; from += count) {
            const int first = from % tiles;
            count = std::min({tiles - first, most, past - from});
            const int next = from + count < past ? from + count : then;
            f(from / tiles, first, first + count, next < all ? next % tiles : -1);
        }
        from = then, past = std::min(all, then + cut.piece);
    } while (from < all);
}

// Calls f for every row of `rows`, in pieces that the threads claim.
template <class F>
void each_row(Range rows, Worker& worker, F f) {
    const int piece = std::max(1, rows.count() / (worker.count() * kPiecesAThread));
    for (int i; (i = worker.claim()) * piece < rows.count();)
        for (int row = rows.first + i * piece; row < std::min(rows.past, rows.first + (i + 1) * piece); ++row) f(row);
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

std::vector<Activation> ProductInput::prepare(Program& program, const Step& step, Worker& worker) const {
    const Range team = rows(program, worker);
    const bool own = team.count() <= kPrivateRows;
    std::vector<Activation> out;
    uint8_t* memory = own ? program.scratch(worker).activations : program.activations(team.first);
    for (Recipe recipe : recipes) {
        out.push_back(activation(recipe, team.count(), cols, memory));
        memory += aligned(activation_bytes(recipe, team.count(), cols));
        out.back().data -= team.first * out.back().row_bytes;  // found by the step's row
    }
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
    if (own) {
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
        for (int r = row; r < past_row; ++r)
            program.rows_of.glu(activation, gates + (r - row) * ld, ups + (r - row) * ld, columns, to.row(r) + column);
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
    float norms[kScreenedRows];
    const bool may = !keep && rows.count() <= kScreenedRows && bounded(activations[0]);
    bool screened = may && program.screening.pause == 0;
    for (int i = 0; screened && i < rows.count(); ++i) screened = may_screen(norms[i] = screening_norm(activations[0], rows.first + i));
    if (screened) multiply_screened(program, worker, activations[0], norms);
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
void Head::multiply_screened(Program& program, Worker& worker, const Activation& x, const float* norms) const {
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
            if (!program.matrix.screen(product, rows.first, rows.past, tile, norms - rows.first, least - rows.first)) continue;
            for (int i = 0; i < rows.count(); ++i)
                if (least[i] > shared[i].load(std::memory_order_relaxed)) shared[i].store(least[i], std::memory_order_relaxed);
            ++scratch.screened;
            program.matrix.multiply(product, rows.first, rows.past, tile, tile + 1);
            for (int row = rows.first; row < rows.past; ++row)
                program.rows_of.best(y + row * tile_rows + column, count, first_column(program) + column, scratch.best[size_t(row)]);
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

void KvWrite::run(Program& program, Step& step, Worker& worker) const {
    const KvLayout& layout = pool->layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    each_row(worker.rows, worker, [&](int row) {
        const int64_t slot = step.groups[size_t(group)].slots[size_t(row)];
        for (int head = 0; head < layout.kv_heads; ++head)
            kernels.store(layout, pool->tile(layer, slot, head), int(slot % kTile), program.slot(k).row(row) + head * layout.head_dim,
                          program.slot(v).row(row) + head * layout.head_dim);
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

// ---- attention

void HeadTransform::apply(const Program& program, int row, int head_dim, const float* x, float* y) const {
    if (norm.kind != Transform::Kind::nothing) {
        norm.apply(program.rows_of, x, head_dim, y);
        x = y;
    }
    if (angles < 0) return;
    const AngleTable& table = program.angles(angles);
    program.rows_of.rope(x, table.row(row), table.half(), head_dim, y);
}

namespace {

// Query vectors of one unit, and where their results go.
struct Queries {
    const float* vectors[kQueries];
    float* results[kQueries];
    int32_t positions[kQueries];
    float slopes[kQueries];
};

}  // namespace

// Names the tiles that a thread's units read one after the other, some way ahead of its work.
class Lead {
  public:
    // `pages`: of chunk 0, and `width` further of the next.
    Lead(const KvPool& pool, int layer, const int32_t* pages, int width, const std::vector<AttentionPlan::Unit>& units)
        : layout_(pool.layout), cache_(pool.memory.data()), layer_(layer), pages_(pages), width_(width), units_(units) {}

    // The thread goes on with units first..past-1 and then `next`, or nobody knows yet what comes then where that is -1.
    void go_on(int first, int past, int next) {
        if (unit_ != first) begin(first);
        past_ = past, next_ = next;
    }

    // The block that the thread reads next, which is of this unit.
    KeyBlock block(const AttentionPlan::Unit& unit, int index) {
        const int start = index * kSplit, first = std::max(unit.first - start, 0) / kTile, past = (std::min(unit.past - start, kSplit) + kTile - 1) / kTile;
        std::copy(tiles_ + own_, tiles_ + named_, tiles_);
        named_ -= own_, own_ = past - first;
        const bool fetched = named_ >= own_;
        while (named_ < own_) name();
        const int before = named_;
        while (named_ - before < 2 * own_ && !enough() && name()) continue;  // a short block has no time for many
        return {start, first, past, tiles_, fetched, tiles_ + before, named_ - before};
    }

  private:
    static constexpr int kBlock = kSplit / kTile, kLeast = 6;  // tiles

    // Whole blocks, and not too little. More would only leave the first-level cache before its turn comes.
    bool enough() const { return named_ >= own_ + kLeast && (at_ == past_tile_ || at_ % kBlock == 0); }

    void begin(int unit) {
        const AttentionPlan::Unit& keys = units_[size_t(unit)];
        unit_ = unit, at_ = keys.first / kTile, past_tile_ = (keys.past - 1) / kTile + 1;
        page_ = pages_ + size_t(keys.chunk) * size_t(width_) + keys.first / layout_.page_size, offset_ = keys.first % layout_.page_size / kTile * kTile;
        find();
    }

    void find() { tile_ = kv_tile(layout_, cache_, layer_, *page_, units_[size_t(unit_)].kv_head, offset_); }

    // Names one more, if it is known.
    bool name() {
        while (at_ == past_tile_) {
            if (unit_ + 1 < past_)
                begin(unit_ + 1);
            else if (next_ >= 0)
                begin(next_), past_ = next_ + 1, next_ = -1;
            else
                return false;
        }
        tiles_[named_++] = tile_;
        tile_ += layout_.tile_bytes, offset_ += kTile, ++at_;
        if (at_ < past_tile_ && offset_ == layout_.page_size) ++page_, offset_ = 0, find();
        return true;
    }

    const KvLayout& layout_;
    uint8_t* const cache_;
    const int layer_;
    const int32_t* const pages_;
    const int width_;
    const std::vector<AttentionPlan::Unit>& units_;
    const uint8_t* tiles_[2 * kBlock + kLeast];  // those of the block that is worked on, then later ones
    int own_ = 0, named_ = 0;
    // The unit whose tiles are named, and those that are known to follow.
    int unit_ = -1, past_ = 0, next_ = -1;
    int at_ = 0, past_tile_ = 0;  // of its tiles, the next, and the last plus one
    const uint8_t* tile_ = nullptr;
    const int32_t* page_ = nullptr;
    int offset_ = 0;  // in that page
};

namespace {

// Runs a unit's blocks; the last thread to end a block of queries that were split over blocks merges them.
void run_unit(Program& program, Worker& worker, const AttentionPlan::Part& plan, const AttentionPlan::Unit& unit, const AttentionCall& call, const Queries& queries,
              Lead& lead) {
    const KvLayout& layout = *call.layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    Scratch& scratch = program.scratch(worker);
    kernels.prepare(call, queries.vectors, unit.count, scratch.attention);
    auto partial = [&](int block, float* out) {
        kernels.partial(call, queries.positions, unit.count, lead.block(unit, block), scratch.attention, out);
    };
    auto merge = [&](const float* part, bool first) { kernels.merge(scratch.state, part, unit.count, layout.dim, first); };
    const int first_block = unit.first / kSplit;
    if (unit.join < 0) {
        partial(first_block, scratch.state);
        for (int block = first_block + 1; block * kSplit < unit.past; ++block) partial(block, scratch.partial), merge(scratch.partial, false);
    } else {
        const AttentionPlan::Join& join = plan.joins[size_t(unit.join)];
        auto part = [&](int i) { return program.partial(join.first_partial + i); };
        partial(first_block, part(first_block - join.first_block));
        if (program.joined(unit.join).fetch_add(1, std::memory_order_acq_rel) + 1 < join.blocks) return;
        program.joined(unit.join).store(0, std::memory_order_relaxed);
        for (int i = 0; i < join.blocks; ++i) merge(part(i), i == 0);
    }
    kernels.finish(scratch.state, unit.count, layout.dim, layout.head_dim, queries.results);
}

}  // namespace

void Attention::run(Program& program, Step& step, Worker& worker) const {
    const AttentionPlan::Part& units = program.attention_plan(plan, worker);
    if (!units.single && (k >= 0 || !of_q.nothing())) {
        const Slot& queries = program.slot(q);
        each_row(worker.rows, worker, [&](int row) {
            if (k >= 0)
                for (int head = 0; head < pool->layout.kv_heads; ++head) write(program, step, worker, row, head);
            if (of_q.nothing()) return;
            const int head_dim = pool->layout.head_dim;
            for (int i = 0; i < queries.width; i += head_dim) of_q.apply(program, row, head_dim, queries.row(row) + i, queries.row(row) + i);
        });
        worker.barrier();
    }
    if (worker.apart() && step.cuts_chunks) worker.meet();  // the others' keys of the same chunk
    const int count = int(units.units.size());
    if (count == 0) return;
    const Step::Group& places = step.groups[size_t(group)];
    Lead lead(*pool, layer, places.pages.data(), places.width, units.units);
    each_stretch(1, count, count, worker, [&](int, int first, int past, int next) {
        if (units.single) lead.go_on(first, past, next);
        for (int unit = first; unit < past; ++unit) {
            if (!units.single) lead.go_on(unit, unit + 1, -1);  // units of many queries: their time is not memory's, and the next has the same keys
            attend(program, step, worker, units, unit, lead);
        }
    });
}

void Attention::write(Program& program, const Step& step, Worker& worker, int row, int kv_head) const {
    const KvLayout& layout = pool->layout;
    const float *key = program.slot(k).row(row) + kv_head * layout.head_dim, *value = program.slot(v).row(row) + kv_head * layout.head_dim;
    float* changed = program.scratch(worker).partial;  // nobody's before the units run
    if (!of_k.nothing()) {
        of_k.apply(program, row, layout.head_dim, key, changed);
        key = changed;
    }
    const int64_t slot = step.groups[size_t(group)].slots[size_t(row)];
    attention_kernels(program.isa, layout.type).store(layout, pool->tile(layer, slot, kv_head), int(slot % kTile), key, value);
}

void Attention::attend(Program& program, const Step& step, Worker& worker, const AttentionPlan::Part& plan, int index, Lead& lead) const {
    const AttentionPlan::Unit& unit = plan.units[size_t(index)];
    const KvLayout& layout = pool->layout;
    const Slot &vectors = program.slot(q), &to = program.slot(out);
    const int a_row = heads / layout.kv_heads, first_row = step.chunk_rows[size_t(unit.chunk)];

    Queries queries;
    for (int i = 0; i < unit.count; ++i) {
        const int query = unit.first_query + i, row = first_row + query / a_row, head = unit.kv_head * a_row + query % a_row, at = head * layout.head_dim;
        queries.vectors[i] = vectors.row(row) + at;
        queries.results[i] = to.row(row) + at;
        queries.positions[i] = step.positions[size_t(row)];
        queries.slopes[i] = slopes ? slopes[head] : 0.0f;
        if (plan.single && !of_q.nothing()) {
            float* changed = program.scratch(worker).queries + i * layout.dim;
            of_q.apply(program, row, layout.head_dim, queries.vectors[i], changed);
            queries.vectors[i] = changed;
        }
    }
    // With one row a chunk, the unit that has its newest key is the only one to read it.
    if (plan.single && k >= 0 && unit.past == queries.positions[0] + 1) write(program, step, worker, first_row, unit.kv_head);

    const AttentionCall call{&layout, scale, window, softcap, slopes ? queries.slopes : nullptr};
    run_unit(program, worker, plan, unit, call, queries, lead);
}

void Bidirectional::run(Program& program, Step& step, Worker& worker) const {
    const KvLayout& layout = keys->layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    const AttentionPlan::Part& units = program.attention_plan(plan, worker);
    const Slot &vectors = program.slot(q), &key_rows = program.slot(k), &value_rows = program.slot(v), &to = program.slot(out);
    // Chunk c's keys begin at page first / 16 + c: every chunk before it has left less than a page unused.
    auto first_page = [&](int chunk) { return step.chunk_rows[size_t(chunk)] / kTile + chunk; };
    each_row(worker.rows, worker, [&](int row) {
        const int chunk = int(std::upper_bound(step.chunk_rows.begin(), step.chunk_rows.end(), row) - step.chunk_rows.begin()) - 1;
        const int at = row - step.chunk_rows[size_t(chunk)];
        const int64_t slot = int64_t(first_page(chunk)) * kTile + at;
        for (int head = 0; head < layout.kv_heads; ++head)
            kernels.store(layout, keys->tile(0, slot, head), at % kTile, key_rows.row(row) + head * layout.head_dim,
                          value_rows.row(row) + head * layout.head_dim);
    });
    worker.barrier();
    const int a_row = heads / layout.kv_heads;
    for (int i; (i = worker.claim()) < int(units.units.size());) {
        const AttentionPlan::Unit& unit = units.units[size_t(i)];
        const int first_row = step.chunk_rows[size_t(unit.chunk)], rows = step.chunk_rows[size_t(unit.chunk) + 1] - first_row;
        Queries queries;
        for (int j = 0; j < unit.count; ++j) {
            const int query = unit.first_query + j, row = first_row + query / a_row, head_at = (unit.kv_head * a_row + query % a_row) * layout.head_dim;
            queries.vectors[j] = vectors.row(row) + head_at;
            queries.results[j] = to.row(row) + head_at;
            queries.positions[j] = rows - 1;  // sees as far as the last row
        }
        const AttentionCall call{&layout, scale, 0, 0};
        Lead lead(*keys, 0, program.own_pages() + first_page(unit.chunk), 0, units.units);
        lead.go_on(i, i + 1, -1);
        run_unit(program, worker, units, unit, call, queries, lead);
    }
}

// ---- experts

void Experts::choose(const float* scores, int32_t* experts, float* weights) const {
    float greatest = scores[0], sum = 0;
    for (int e = 1; e < count(); ++e) greatest = std::max(greatest, scores[e]);
    for (int e = 0; e < count(); ++e) sum += std::exp(scores[e] - greatest);
    // Insertion into the best so far; on equal scores the one that came first stays ahead.
    int found = 0;
    for (int e = 0; e < count(); ++e) {
        int at = std::min(found, chosen - 1);
        if (found == chosen && !(scores[e] > scores[experts[at]])) continue;
        for (; at > 0 && scores[e] > scores[experts[at - 1]]; --at) experts[at] = experts[at - 1];
        experts[at] = e;
        found = std::min(found + 1, chosen);
    }
    std::sort(experts, experts + chosen);
    float total = 0;
    for (int i = 0; i < chosen; ++i) total += weights[i] = std::exp(scores[experts[i]] - greatest) / sum;
    if (normalise)
        for (int i = 0; i < chosen; ++i) weights[i] /= total;
}

void Experts::sort(int rows, Routing& routing) const {
    std::fill(routing.first.begin(), routing.first.begin() + count() + 1, 0);
    for (int i = 0; i < rows * chosen; ++i) ++routing.first[size_t(routing.experts[size_t(i)]) + 1];
    for (int e = 0; e < count(); ++e) routing.first[size_t(e) + 1] += routing.first[size_t(e)];
    for (int i = 0; i < rows * chosen; ++i) routing.entries[size_t(i)] = routing.first[size_t(routing.experts[size_t(i)])]++;
    for (int e = count(); e > 0; --e) routing.first[size_t(e)] = routing.first[size_t(e) - 1];
    routing.first[0] = 0;
}

namespace {

// Calls f(expert, first row, past row, first tile, past tile) for pieces of every expert's product, rows counted in entries.
template <class F>
void each_piece(const Routing& routing, int experts, int tiles, int tiles_a_piece, int rows_a_piece, Worker& worker, F f) {
    const int pieces = ceil_div(tiles, tiles_a_piece);
    auto of_expert = [&](int e) { return ceil_div(routing.first[size_t(e) + 1] - routing.first[size_t(e)], rows_a_piece) * pieces; };
    int expert = 0, before = 0;  // pieces of the experts before it
    for (int i;;) {
        i = worker.claim();
        while (expert < experts && i >= before + of_expert(expert)) before += of_expert(expert++);
        if (expert == experts) return;
        const int row = routing.first[size_t(expert)] + (i - before) / pieces * rows_a_piece, tile = (i - before) % pieces * tiles_a_piece;
        f(expert, row, std::min(routing.first[size_t(expert) + 1], row + rows_a_piece), tile, std::min(tiles, tile + tiles_a_piece));
    }
}

}  // namespace

void Experts::multiply_gated(Program& program, Worker& worker, const Routing& routing, const Activation& of_gate, const Activation& of_up) const {
    const int width = int(gate.weights[0]->matrix.rows), tiles = int(gate.weights[0]->matrix.tiles());
    const int piece = tiles_a_piece(tiles * chosen, worker.count(), kGatedTiles);
    const int64_t ld = piece * tile_rows;
    float *gates = program.scratch(worker).tile, *ups = gates + kTileRows * ld, *to = program.slot(hidden).data;
    each_piece(routing, count(), tiles, piece, kTileRows, worker, [&](int expert, int row, int past_row, int first, int past) {
        const int column = first * int(tile_rows), columns = std::min(width, past * int(tile_rows)) - column;
        auto multiply = [&](const Matrices& matrices, const Activation& x, float* y) {
            const Product product{&matrices.weights[size_t(expert)]->matrix, &x, y - row * ld - column, ld};
            program.matrix.multiply(product, row, past_row, first, past);
        };
        multiply(gate, of_gate, gates);
        multiply(up, of_up, ups);
        for (int r = row; r < past_row; ++r)
            program.rows_of.glu(activation, gates + (r - row) * ld, ups + (r - row) * ld, columns, to + size_t(r) * size_t(width) + column);
    });
}

void Experts::multiply_down(Program& program, Worker& worker, const Routing& routing, const Activation& of_down) const {
    const int width = int(down.weights[0]->matrix.rows), tiles = int(down.weights[0]->matrix.tiles());
    each_piece(routing, count(), tiles, tiles_a_piece(tiles * chosen, worker.count(), 64), kExpertRows, worker, [&](int expert, int row, int past_row, int first, int past) {
        const Product product{&down.weights[size_t(expert)]->matrix, &of_down, program.slot(results).data, width};
        program.matrix.multiply(product, row, past_row, first, past);
    });
}

void Experts::run(Program& program, Step& step, Worker& worker) const {
    const int rows = program.rows(step, x), entries = rows * chosen;
    const bool own = rows <= kPrivateRows;
    const Slot &from = program.slot(x), &of_router = program.slot(scores), &to = program.slot(out);
    auto each = [&](int number, auto f) {
        if (!own) return each_row({0, number}, worker, f);
        for (int i = 0; i < number; ++i) f(i);
    };
    auto meet = [&] {
        if (!own) worker.barrier();
    };

    Routing &routing = program.scratch(worker).routing, &shared = own ? routing : program.routing();
    each(rows, [&](int row) { choose(of_router.row(row), shared.experts.data() + row * chosen, shared.weights.data() + row * chosen); });
    meet();
    if (!own) std::copy_n(shared.experts.begin(), entries, routing.experts.begin());
    sort(rows, routing);
    if (worker.index == 0)
        for (int e = 0; e < count(); ++e) step.expert_load[size_t(load_at + e)] = routing.first[size_t(e) + 1] - routing.first[size_t(e)];

    uint8_t* const memory = own ? program.scratch(worker).activations : program.activations(0);
    const int cols = from.width, width = int(gate.weights[0]->matrix.rows);
    const Activation of_gate = headrace::activation(gate.recipe, entries, cols, memory);
    const bool alike = gate.recipe == up.recipe;
    const Activation of_up = alike ? of_gate : headrace::activation(up.recipe, entries, cols, memory + aligned(activation_bytes(gate.recipe, entries, cols)));
    each(rows, [&](int row) {
        for (const Activation* prepared : {&of_gate, &of_up}) {
            if (prepared == &of_up && alike) break;
            const int first = routing.entries[size_t(row) * size_t(chosen)];
            program.matrix.quantise_row(*prepared, first, from.row(row));
            for (int i = 1; i < chosen; ++i)
                std::memcpy(prepared->row(routing.entries[size_t(row) * size_t(chosen) + size_t(i)]), prepared->row(first), size_t(prepared->row_bytes));
        }
    });
    meet();
    multiply_gated(program, worker, routing, of_gate, of_up);
    worker.barrier();
    const Activation of_down = headrace::activation(down.recipe, entries, width, memory);
    const float* hiddens = program.slot(hidden).data;
    each(entries, [&](int entry) { program.matrix.quantise_row(of_down, entry, hiddens + size_t(entry) * size_t(width)); });
    meet();
    multiply_down(program, worker, routing, of_down);
    worker.barrier();
    each_row({0, rows}, worker, [&](int row) {
        std::memset(to.row(row), 0, size_t(to.width) * 4);
        for (int i = row * chosen; i < (row + 1) * chosen; ++i)
            program.rows_of.add(to.row(row), program.slot(results).data + size_t(routing.entries[size_t(i)]) * size_t(to.width), shared.weights[size_t(i)], to.width, to.row(row));
    });
}

}  // namespace headrace
