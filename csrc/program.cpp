#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace headrace {
namespace {

constexpr size_t kPartialBytes = size_t(64) << 20;  // at most, for results of single blocks of keys

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void require(bool holds, const char* what, long long found, long long limit) {
    if (!holds) throw std::invalid_argument(std::string(what) + ": " + std::to_string(found) + ", but the program holds " + std::to_string(limit));
}

}  // namespace

// ---- attention's units

void AttentionPlan::build(const Step& step, const Worker& worker, int max_partials, Part& part) const {
    auto& [units, joins, single] = part;
    units.clear();
    joins.clear();
    const int queries_a_row = heads / kv_heads;
    // The team's rows of a chunk, counted from the chunk's first.
    auto rows_of = [&](int chunk) {
        const int first = step.chunk_rows[size_t(chunk)];
        return Range{std::max(worker.rows.first - first, 0), std::min(worker.rows.past, step.chunk_rows[size_t(chunk) + 1]) - first};
    };
    auto cuts = [&](int chunk) { return (std::max(0, rows_of(chunk).count()) * queries_a_row + kQueries - 1) / kQueries; };
    int whole_units = 0;
    single = true;
    for (int c = 0; c < step.chunks(); ++c) {
        whole_units += cuts(c) * kv_heads;
        if (cuts(c) > 0) single = single && step.chunk_rows[size_t(c) + 1] - step.chunk_rows[size_t(c)] == 1 && cuts(c) == 1;
    }
    const bool split = !worker.apart() && whole_units < 4 * worker.count();
    int partials = 0;
    for (int c = 0; c < step.chunks(); ++c) {
        const int first_row = step.chunk_rows[size_t(c)], past_query = rows_of(c).past * queries_a_row;
        for (int cut = cuts(c) - 1; cut >= 0; --cut) {  // later rows see more keys: they go first
            const int first = rows_of(c).first * queries_a_row + cut * kQueries, count = std::min(kQueries, past_query - first);
            const int first_position = step.positions[size_t(first_row + first / queries_a_row)];
            const int last_position = whole ? step.chunk_rows[size_t(c) + 1] - first_row - 1 : step.positions[size_t(first_row + (first + count - 1) / queries_a_row)];
            const int seen = window > 0 ? std::max(0, first_position - window + 1) : 0, past = last_position + 1;
            const int first_block = seen / kSplit, blocks = last_position / kSplit + 1 - first_block;
            for (int head = 0; head < kv_heads; ++head) {
                if (!split || blocks == 1 || partials + blocks > max_partials) {
                    units.push_back({c, head, first, count, seen, past, -1});
                    continue;
                }
                joins.push_back({partials, first_block, blocks});
                partials += blocks;
                for (int block = first_block; block * kSplit < past; ++block)
                    units.push_back({c, head, first, count, std::max(seen, block * kSplit), std::min(past, (block + 1) * kSplit), int(joins.size()) - 1});
            }
        }
    }
}

// ---- recording

Program::Program(Pool& pool, Isa isa, Limits limits)
    : pool(pool), isa(isa), limits(std::move(limits)), matrix(kernels(isa)), rows_of(row_kernels(isa)), last_tokens(size_t(this->limits.slots), 0),
      group_slots_(this->limits.pages.size(), 0), page_sizes_(this->limits.pages.size(), 0) {}

Program::~Program() = default;

SlotId Program::add_slot(int width, RowSpace space) {
    slots_.push_back({width, space, nullptr});
    return SlotId(slots_.size()) - 1;
}

void Program::join(std::shared_ptr<Group> group) {
    if (group->taken || group->used()) throw std::invalid_argument("the group has been used already; a program needs one of its own");
    require(limits.rows <= group->sizes.rows, "rows of a program whose group holds fewer", limits.rows, group->sizes.rows);
    group->taken = true;
    group_ = std::move(group);
}

SlotId Program::add_partial(int width) {
    if (!group_) throw std::invalid_argument("a program without a group has no reductions");
    if (width != group_->sizes.width)
        throw std::invalid_argument("partial sums of width " + std::to_string(width) + "; the group's are " + std::to_string(group_->sizes.width) + " wide");
    slots_.push_back({width, RowSpace::all, nullptr, reductions_++});
    return SlotId(slots_.size()) - 1;
}

void Program::note_reduction(int change) {
    open_ += change, most_open_ = std::max(most_open_, open_);
    if (most_open_ > Group::kOpen) throw std::invalid_argument("more than " + std::to_string(Group::kOpen) + " reductions under way at once");
}

int Program::add_angles(std::vector<float> inv_freq, float scale) {
    angles_.push_back({std::move(inv_freq), scale, nullptr});
    return int(angles_.size()) - 1;
}

const float* Program::keep(std::vector<float> values) {
    kept_.push_back(std::make_unique<std::vector<float>>(std::move(values)));
    return kept_.back()->data();
}

int Program::plan(int group, int heads, int kv_heads, int window, bool whole) {
    AttentionPlan plan{group, heads, kv_heads, window, whole, std::vector<AttentionPlan::Part>(size_t(2 * pool.threads()))};
    for (size_t i = 0; i < plans_.size(); ++i)
        if (plans_[i].same(plan)) return int(i);
    plans_.push_back(std::move(plan));
    return int(plans_.size()) - 1;
}

void Program::need_activations(int times, const std::vector<Recipe>& recipes, int cols) {
    size_t row = 0, own = 0;
    for (Recipe recipe : recipes) {
        row += aligned(activation_bytes(recipe, times, cols));
        own += aligned(activation_bytes(recipe, int64_t(kPrivateRows) * times, cols));
    }
    activation_bytes_ = std::max(activation_bytes_, row);
    private_bytes_ = std::max(private_bytes_, own);
}

std::shared_ptr<KvPool> Program::own_keys(int kv_heads, int head_dim) {
    for (const std::shared_ptr<KvPool>& pool : own_keys_)
        if (pool->kv_heads == kv_heads && pool->layout.head_dim == head_dim) return pool;
    own_keys_.push_back(std::make_shared<KvPool>(KvType::f32, 1, limits.rows / kTile + limits.chunks, kTile, kv_heads, head_dim));
    return own_keys_.back();
}

int Program::need_routing(int chosen, int count) {
    routing_chosen_ = std::max(routing_chosen_, chosen), routing_count_ = std::max(routing_count_, count);
    const int at = expert_counts_;
    expert_counts_ += count;
    return at;
}

void Program::need_attention(int dim) { attention_dim_ = std::max(attention_dim_, dim); }

void Program::use_kv(int group, const KvPool& pool) {
    group_slots_.at(size_t(group)) = int64_t(pool.pages) * pool.page_size;
    page_sizes_.at(size_t(group)) = pool.page_size;
}

void Program::finish(SlotId hidden, SlotId output) {
    hidden_ = hidden, output_ = output;
    for (size_t i = 0; i < instructions_.size(); ++i) instructions_[i]->next = instructions_[(i + 1) % instructions_.size()].get();
    for (const auto& instruction : instructions_) row_cost_ += instruction->row_cost() / double(instructions_.size());
    int widest = 0, most_blocks = 1;
    for (const Slot& slot : slots_) widest = std::max(widest, slot.width);
    if (!own_keys_.empty()) {
        most_blocks = limits.rows / kSplit + 1;
        own_pages_.resize(size_t(own_keys_[0]->pages));
        std::iota(own_pages_.begin(), own_pages_.end(), 0);
    }
    for (size_t g = 0; g < limits.pages.size(); ++g) most_blocks = std::max(most_blocks, limits.pages[g] * page_sizes_[g] / kSplit + 1);

    partial_floats_ = aligned(state_floats(kQueries, attention_dim_) * 4) / 4;
    if (attention_dim_ > 0) {
        attention_bytes_ = aligned(attention_scratch_bytes(isa, attention_dim_));
        max_partials_ = int(std::min<size_t>(kPartialBytes / (partial_floats_ * 4), size_t(4) * size_t(pool.threads()) * size_t(most_blocks)));
        partials_ = std::make_unique<Memory>(size_t(max_partials_) * partial_floats_ * 4);
        joined_ = std::make_unique<std::atomic<int>[]>(size_t(max_partials_) + 1);
    }
    auto rows_in = [&](RowSpace space) { return size_t(space == RowSpace::all ? limits.rows : limits.logits); };
    const size_t row_bytes = aligned(size_t(widest) * 4);
    const size_t of_a_thread = private_bytes_ + row_bytes + aligned(tile_floats_ * 4) + attention_bytes_ + 2 * partial_floats_ * 4 +
                               aligned(size_t(kQueries) * size_t(attention_dim_) * 4);
    size_t bytes = activation_bytes_ * size_t(limits.rows) + of_a_thread * size_t(pool.threads());
    for (const Slot& slot : slots_)
        if (slot.reduction < 0) bytes += aligned(size_t(slot.width) * rows_in(slot.space) * 4);
    for (const AngleTable& table : angles_) bytes += aligned(table.inv_freq.size() * 2 * size_t(limits.rows) * 4);
    arena_ = std::make_unique<Memory>(bytes);

    uint8_t* at = arena_->data();
    auto take = [&](size_t size) {
        uint8_t* begin = at;
        at += aligned(size);
        return begin;
    };
    activations_ = take(activation_bytes_ * size_t(limits.rows));
    for (Slot& slot : slots_)
        if (slot.reduction < 0) slot.data = (float*)take(size_t(slot.width) * rows_in(slot.space) * 4);
    place_partials();
    for (AngleTable& table : angles_) table.data = (float*)take(table.inv_freq.size() * 2 * size_t(limits.rows) * 4);
    scratch_.resize(size_t(pool.threads()));
    for (Scratch& scratch : scratch_) {
        scratch.activations = take(private_bytes_);
        scratch.row = (float*)take(row_bytes);
        scratch.tile = (float*)take(tile_floats_ * 4);
        scratch.attention = take(attention_bytes_);
        scratch.state = (float*)take(partial_floats_ * 4);
        scratch.partial = (float*)take(partial_floats_ * 4);
        scratch.queries = (float*)take(size_t(kQueries) * size_t(attention_dim_) * 4);
        scratch.best.resize(size_t(limits.logits));
        scratch.events.resize(size_t(reductions_) * 2);
        if (routing_count_ > 0) scratch.routing.reserve(limits.rows, routing_chosen_, routing_count_);
    }
    if (routing_count_ > 0) routing_.reserve(limits.rows, routing_chosen_, routing_count_);
}

// ---- running

void Program::check(const Step& step) const {
    const int rows = step.rows(), chunks = step.chunks(), logits = step.logits();
    require(rows >= 1 && rows <= limits.rows, "rows of the step", rows, limits.rows);
    require(chunks >= 1 && chunks <= limits.chunks, "chunks of the step", chunks, limits.chunks);
    require(logits <= limits.logits, "rows of logits of the step", logits, limits.logits);
    require(int(step.tokens.size()) == (vocab ? rows : 0), "tokens of the step", (long long)step.tokens.size(), vocab ? rows : 0);
    require(int(step.samples.size()) == logits, "sample specs of the step", (long long)step.samples.size(), logits);
    require(step.groups.size() == limits.pages.size(), "KV groups of the step", (long long)step.groups.size(), (long long)limits.pages.size());
    const size_t hidden = hidden_ >= 0 ? size_t(slot(hidden_).width) * size_t(rows) : 0;
    require(step.hidden.size() == hidden, "hidden values of the step", (long long)step.hidden.size(), (long long)hidden);
    for (int32_t token : step.tokens) {
        require(token < vocab, "token id", token, vocab);
        require(token >= -limits.slots, "slot of a late token", -1 - (long long)token, limits.slots);
    }
    for (int32_t position : step.positions) require(position < positions_, "position of a row", position, positions_);
    require(step.chunk_rows.front() == 0, "first row of the first chunk", step.chunk_rows.front(), 0);
    require(step.chunk_rows.back() == rows, "rows of the chunks", step.chunk_rows.back(), rows);
    for (int c = 0; c < chunks; ++c) {
        const int first = step.chunk_rows[size_t(c)], past = step.chunk_rows[size_t(c) + 1];
        require(past > first && past <= rows, "end of a chunk that starts at row " , past, first);
        for (int r = first; r < past; ++r)
            require(step.positions[size_t(r)] == step.positions[size_t(first)] + (r - first) && step.positions[size_t(r)] >= 0,
                    "position of a row, which must follow the one before it", step.positions[size_t(r)], r);
    }
    for (int32_t row : step.logit_rows) require(row >= 0 && row < rows, "row of logits", row, rows);
    for (const SampleSpec& spec : step.samples) require(spec.slot >= -1 && spec.slot < limits.slots, "slot of a sampled token", spec.slot, limits.slots);
    for (size_t g = 0; g < step.groups.size(); ++g) {
        if (group_slots_[g] == 0) continue;
        const Step::Group& group = step.groups[g];
        require(int(group.slots.size()) == rows, "KV slots of the step", (long long)group.slots.size(), rows);
        require(int(group.pages.size()) == chunks * group.width, "page table entries of the step", (long long)group.pages.size(), (long long)chunks * group.width);
        require(group.width <= limits.pages[g], "pages of a sequence", group.width, limits.pages[g]);
        for (int64_t slot : group.slots) require(slot >= 0 && slot < group_slots_[g], "KV slot", slot, group_slots_[g]);
        for (int32_t page : group.pages) require(page >= 0 && int64_t(page) * page_sizes_[g] < group_slots_[g], "page", page, group_slots_[g] / page_sizes_[g]);
        for (int c = 0; c < chunks; ++c) {
            const int32_t last = step.positions[size_t(step.chunk_rows[size_t(c) + 1]) - 1];
            require(last / page_sizes_[g] < group.width, "page of a chunk's last row", last / page_sizes_[g], group.width);
        }
    }
}

void Program::submit(const std::shared_ptr<Program>& program, const std::shared_ptr<Step>& step) {
    program->check(*step);
    program->share_out(*step);
    step->ticket = program->pool.submit([program, step](Worker& worker) { program->run(*step, worker); });
}

void Program::run(Step& step, Worker& worker) {
    if (worker.index == 0) step.started = now();
    const bool apart = !step.shares.empty();
    const bool led = leads(step, worker);
    size_t first = led ? lead(step, worker, apart) : 0;
    for (int half = 0; !led && half < int(step.halves.size()); ++half) {
        enter(step, worker, apart ? Team::alone : Team::all, half);
        begin(step, worker);
    }
    const bool timed = worker.index == 0 && !step.seconds.empty();
    double last = timed ? step.started : 0;
    size_t before = 0;  // the instruction that ran last
    auto lap = [&](size_t next) {
        if (!timed) return;
        const double time = now();
        step.seconds[before] += time - last;
        last = time, before = next;
    };
    bool met = led;
    for (size_t past; first < instructions_.size(); first = past, met = false) {
        const bool of_rows = instructions_[first]->space(*this) == RowSpace::all, next_apart = of_rows && apart;
        if (next_apart != worker.apart()) worker.meet(), met = true;
        past = past_segment(step, first);
        for (int half = 0; half < (of_rows ? int(step.halves.size()) : 1); ++half) {
            if (met || step.halves.size() > 1) enter(step, worker, next_apart ? Team::alone : Team::all, half);
            for (size_t i = first; i < past; ++i) {
                const bool begins = half == 0 && i == first;
                if (!(begins && (met || (i == 0 && instructions_[i]->starts_alone())))) worker.barrier();
                lap(i);
                instructions_[i]->run(*this, step, worker);
            }
        }
    }
    lap(0);
    if (worker.apart()) {
        worker.meet();
        enter(step, worker, Team::all, 0);
    }
    end(step, worker);
    if (worker.index == 0) step.ended = now();
}

bool Program::leads(const Step& step, const Worker& worker) const {
    return worker.first_is_away() && parts_ && !group_ && step.seconds.empty() && row_cost_ * step.rows() < kLedCost;
}

// All threads but the first do the first instructions, until it comes back or the logits, for which all are needed. Returns how many.
size_t Program::lead(Step& step, Worker& worker, bool apart) {
    auto go_on = [&] {
        enter(step, worker, apart ? Team::alone : Team::all, 0);
        if (apart || worker.index == 0)
            for (AttentionPlan& plan : plans_) plan.build(step, worker, max_partials_, plan.parts[part_of(worker)]);
    };
    if (worker.index == 0) {
        go_on();
        worker.stay_away();
    } else {
        enter(step, worker, Team::others, 0);
        begin(step, worker);
        size_t done = 0;
        for (worker.barrier(); !worker.first_is_back() && done < instructions_.size(); worker.barrier()) {
            const Instruction& next = *instructions_[done];
            if (next.space(*this) != RowSpace::all) break;
            next.run(*this, step, worker);
            ++done;
        }
        if (worker.index == 1) step.led = int(done), worker.call_first();
    }
    worker.meet_woken();
    if (worker.index != 0) go_on();
    return size_t(step.led);
}

// Instructions that one half of the rows goes through before the other does: up to the next that waits for other ranks.
size_t Program::past_segment(const Step& step, size_t first) const {
    size_t past = first + 1;
    auto goes_on = [&] { return step.halves.size() > 1 && past < instructions_.size() && instructions_[past]->space(*this) == RowSpace::all; };
    if (instructions_[first]->space(*this) != RowSpace::all) return past;
    while (goes_on() && instructions_[past - 1]->waits()) ++past;
    while (goes_on() && !instructions_[past]->waits()) ++past;
    return past;
}

void Program::enter(const Step& step, Worker& worker, Team team, int half) const {
    worker.join(team);
    worker.half = half;
    worker.rows = step.halves[size_t(half)], worker.logits = {0, step.logits()};
    if (team != Team::alone) return;
    const int* shares = step.shares.data() + size_t(half) * size_t(pool.threads() + 1);
    worker.rows = {shares[worker.index], shares[worker.index + 1]};
}

// Gives each thread rows of about the same cost, where there are enough; and halves them first, where the sums come from other ranks.
void Program::share_out(Step& step) const {
    const int rows = step.rows(), threads = pool.threads();
    const bool halved = reductions_ > 0 && parts_ && rows >= 2 * kHalfRows;
    const int cut = halved ? rows / 2 / 16 * 16 : rows;
    step.halves = {{0, cut}};
    if (halved) step.halves.push_back({cut, rows});
    const bool pays = row_cost_ <= kLargeProduct && cut >= (pool.distance() > kFar ? kFarShareRows : kShareRows) * threads;
    if (!parts_ || !pays || (threads == 1 && !halved)) return;
    double of_a_row = 1, of_a_key = 0;
    for (const auto& instruction : instructions_)
        if (instruction->space(*this) == RowSpace::all) of_a_row += instruction->row_cost(), of_a_key += kAttentionCost * instruction->key_cost();
    for (Range half : step.halves)
        if (!add_shares(step, half, of_a_row, of_a_key)) return step.shares.clear();
    for (int row : step.shares)
        step.cuts_chunks = step.cuts_chunks || (threads > 1 && !std::binary_search(step.chunk_rows.begin(), step.chunk_rows.end(), row));
}

// False where a row costs more than a thread's share of all: it has too many keys for one thread.
bool Program::add_shares(Step& step, Range rows, double of_a_row, double of_a_key) const {
    const int threads = pool.threads();
    auto cost = [&](int row) { return of_a_row + of_a_key * (step.positions[size_t(row)] + 1); };
    double all = 0, greatest = 0, sum = 0;
    for (int row = rows.first; row < rows.past; ++row) all += cost(row), greatest = std::max(greatest, cost(row));
    if (greatest * threads > all) return false;
    std::vector<int> begins{rows.first};
    for (int row = rows.first; row < rows.past; ++row) {
        if (int(begins.size()) < threads && sum + cost(row) / 2 >= all * double(begins.size()) / threads) begins.push_back(row);
        sum += cost(row);
    }
    begins.resize(size_t(threads), rows.past);
    step.shares.insert(step.shares.end(), begins.begin(), begins.end());
    step.shares.push_back(rows.past);
    return true;
}

// Whatever the instructions share: shared out without claim(), which the first instruction may use in the same phase.
void Program::begin(Step& step, Worker& worker) {
    const int threads = worker.count(), first = worker.rows.first + worker.index - worker.first_of_team(), rows = worker.rows.past;
    for (size_t i = 0; i < plans_.size(); ++i)
        if (worker.apart() || int(i) % threads == threads - 1 - worker.index % threads) plans_[i].build(step, worker, max_partials_, plans_[i].parts[part_of(worker)]);
    for (int r = first; r < rows; r += threads)
        for (const AngleTable& table : angles_)
            rows_of.rope_angles(step.positions[size_t(r)], table.inv_freq.data(), table.scale, table.half(), table.data + size_t(r) * table.inv_freq.size() * 2);
    if (hidden_ < 0) return;
    const Slot& hidden = slot(hidden_);
    for (int r = first; r < rows; r += threads)
        std::memcpy(hidden.row(r), step.hidden.data() + size_t(r) * size_t(hidden.width), size_t(hidden.width) * 4);
}

void Program::place_partials() {
    for (Slot& slot : slots_)
        if (slot.reduction >= 0) slot.data = group_->partial(group_->rank, buffer(slot.reduction));
}

// Threads that work apart are at most Group::kOpen events from each other, and each posts the one before it calls this for the next.
uint64_t Program::post(Step& step, const Worker& worker, size_t at, size_t size) {
    const uint64_t event = ++scratch(worker).event;
    if (worker.apart()) {
        std::atomic<int>& posting = posting_[event % std::size(posting_)];
        if (posting.fetch_add(1, std::memory_order_acq_rel) + 1 < pool.threads()) return event;
        posting.store(0, std::memory_order_relaxed);
    } else if (worker.index != 0) {
        return event;
    }
    group_->post(at, size);
    step.posted_bytes += int64_t(size);
    return event;
}

void Program::await(Step& step, const Worker& worker, uint64_t event) {
    const double from = worker.index == 0 ? now() : 0;
    if (!group_->wait(event)) step.failed = true;
    if (worker.index == 0) step.waited += now() - from;
}

void Program::end(Step& step, Worker& worker) {
    if (output_ < 0 && !group_) return;
    worker.barrier();
    if (group_ && worker.index == 0) {  // nobody looks for partial sums any more
        first_buffer_ = buffer(reductions_);
        place_partials();
    }
    if (output_ < 0) return;
    const Slot& output = slot(output_);
    for (int r = worker.index; r < rows(step, output_); r += worker.count())
        std::memcpy(step.output.data() + size_t(r) * size_t(output.width), output.row(r), size_t(output.width) * 4);
}

}  // namespace headrace
