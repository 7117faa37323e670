// The instructions that read or write keys and values.
#include <algorithm>

#include "instructions.h"
#include "pieces.h"

namespace headrace {

void KvWrite::run(Program& program, Step& step, Worker& worker) const {
    const KvLayout& layout = pool->layout;
    const AttentionKernels& kernels = attention_kernels(program.isa, layout.type);
    each_row(worker.rows, worker, [&](int row) {
        const int64_t slot = step.groups[size_t(group)].slots[size_t(row)];
        for (int head = 0; head < pool->kv_heads; ++head)
            kernels.store(layout, pool->tile(layer, head, slot), int(slot % kTile), program.slot(k).row(row) + head * layout.head_dim,
                          program.slot(v).row(row) + head * layout.head_dim);
    });
}

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
        : pool_(pool), layer_(layer), pages_(pages), width_(width), units_(units) {}

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
        page_ = pages_ + size_t(keys.chunk) * size_t(width_) + keys.first / pool_.page_size, offset_ = keys.first % pool_.page_size / kTile * kTile;
        find();
    }

    void find() { tile_ = pool_.tile(layer_, units_[size_t(unit_)].kv_head, *page_, offset_); }

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
        tile_ += pool_.layout.tile_bytes, offset_ += kTile, ++at_;
        if (at_ < past_tile_ && offset_ == pool_.page_size) ++page_, offset_ = 0, find();
        return true;
    }

    const KvPool& pool_;
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

// Runs a unit's blocks; the last thread to end a block of queries that were split over blocks merges them. Returns whether the results are there.
bool run_unit(Program& program, Worker& worker, const AttentionPlan::Part& plan, const AttentionPlan::Unit& unit, const AttentionCall& call, const Queries& queries,
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
        if (program.joined(unit.join).fetch_add(1, std::memory_order_acq_rel) + 1 < join.blocks) return false;
        program.joined(unit.join).store(0, std::memory_order_relaxed);
        for (int i = 0; i < join.blocks; ++i) merge(part(i), i == 0);
    }
    kernels.finish(scratch.state, unit.count, layout.dim, layout.head_dim, queries.results);
    return true;
}

}  // namespace

void Attention::run(Program& program, Step& step, Worker& worker) const {
    const AttentionPlan::Part& units = program.attention_plan(plan, worker);
    if (!units.single && (k >= 0 || !of_q.nothing())) {
        const Slot& queries = program.slot(q);
        each_row(worker.rows, worker, [&](int row) {
            if (k >= 0)
                for (int head = 0; head < pool->kv_heads; ++head) write(program, step, worker, row, head);
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
    const MadeReady made(reader, program, step, worker);
    each_stretch(1, count, count, worker, [&](int, int first, int past, int next) {
        if (units.single) lead.go_on(first, past, next);
        for (int unit = first; unit < past; ++unit) {
            if (!units.single) lead.go_on(unit, unit + 1, -1);  // units of many queries: their time is not memory's, and the next has the same keys
            attend(program, step, worker, units, unit, lead, made);
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
    attention_kernels(program.isa, layout.type).store(layout, pool->tile(layer, kv_head, slot), int(slot % kTile), key, value);
}

void Attention::attend(Program& program, const Step& step, Worker& worker, const AttentionPlan::Part& plan, int index, Lead& lead, const MadeReady& made) const {
    const AttentionPlan::Unit& unit = plan.units[size_t(index)];
    const KvLayout& layout = pool->layout;
    const Slot &vectors = program.slot(q), &to = program.slot(out);
    const int a_row = heads / pool->kv_heads, first_row = step.chunk_rows[size_t(unit.chunk)];

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
    if (!run_unit(program, worker, plan, unit, call, queries, lead)) return;
    for (int i = 0; i < unit.count; ++i) {
        const int query = unit.first_query + i;
        made.put(queries.results[i], first_row + query / a_row, (unit.kv_head * a_row + query % a_row) * layout.head_dim, layout.head_dim);
    }
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
        for (int head = 0; head < keys->kv_heads; ++head)
            kernels.store(layout, keys->tile(0, head, slot), at % kTile, key_rows.row(row) + head * layout.head_dim,
                          value_rows.row(row) + head * layout.head_dim);
    });
    worker.barrier();
    const int a_row = heads / keys->kv_heads;
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

}  // namespace headrace
