// A model's layers as a flat list of instructions, recorded once (kernels/native.py) and replayed for every step.
//
// Operands are slots: buffers of float32 [rows][width], bound when the program is finished. How many rows a step has is known only
// when it runs. A step is one job of the pool: all threads walk through the instructions together, share out each one's work and
// meet at a barrier after it. Or, where there are many rows, each thread takes some of them through all instructions alone.
//
// A program may be one rank's part of a model (group.h): its products then give partial sums, into the rank's area, which reductions turn
// into whole ones. Where there are many rows they take turns in halves from one reduction to the next: while one half's sums are on their
// way the other is worked on, and a rank that has less of attention and more of the MLP waits for nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "elementwise.h"
#include "group.h"
#include "kv_pool.h"
#include "matrix.h"
#include "pool.h"
#include "sampling.h"

namespace headrace {

// What a program can hold of one step.
struct Limits {
    int rows, logits, chunks, slots;  // rows in all, rows that the head computes, chunks, slots of last_tokens
    std::vector<int> pages;           // of each KV group: pages of a sequence at most
};

// A packed weight and the memory it lies in.
struct Weight {
    PackedMatrix matrix;
    std::shared_ptr<Memory> memory;

    const uint8_t* tile(int index) const { return matrix.data + size_t(index) * matrix.tile_bytes; }
};

// Of at most so many rows, each thread prepares all for itself where nobody has (MadeReady): that costs less than a barrier.
constexpr int kPrivateRows = 2;
// With so many rows for each thread, every thread takes its own through all layers: each then reads and unpacks all weights, but what it
// computes stays in its own caches, and it waits for nobody: that pays much sooner where the threads are far from each other. Large products
// last so much longer than a wait that it never pays.
constexpr int kShareRows = 24, kFarShareRows = 5;
constexpr float kFar = 0.4;  // of Pool::distance(): threads are far if many pairs of them are
constexpr double kLargeProduct = 4e6;  // operations for a row, as an instruction's average
// An instruction's average operations in steps that may begin without the first thread: the others wait for the end of one for it to come.
constexpr double kLedCost = 1.3e8;
// Of a program with a group: rows of each half, at least. The same for all ranks, however many threads they have.
constexpr int kHalfRows = 32;
// Time of an operation of attention, in operations of products.
constexpr double kAttentionCost = 2;

// Of at most so many rows whose best token alone is asked for, the head bounds a tile's logits before it computes them.
constexpr int kScreenedRows = 4;
// Screening pays if it leaves at most one in so many tiles: those that it leaves are multiplied after it.
constexpr int kScreenedTiles = 2;

constexpr int32_t kNoToken = -1;    // this row chooses nothing
constexpr int32_t kBroken = -2;     // its logits are not finite

// A step: what the host gave, and what comes back.
struct Step {
    struct Group {
        std::vector<int64_t> slots;   // [rows]
        std::vector<int32_t> pages;   // [chunks][width]
        int width;
    };
    std::vector<int32_t> tokens, positions;  // [rows]; a token < 0 is last_tokens[-1 - token]
    std::vector<int32_t> chunk_rows;         // [chunks + 1]
    std::vector<int32_t> logit_rows;         // [logits]
    std::vector<Group> groups;
    std::vector<SampleSpec> samples;  // [logits]
    std::vector<float> hidden;        // [rows][width of the input], for a range that does not start the model
    std::vector<float> output;        // logits of the rows that ask for them, or all of the output of a program without a head
    std::vector<int32_t> output_row;  // [logits]: which row of `output` is a row's, or -1
    std::vector<int32_t> chosen;      // [logits]
    std::vector<int32_t> expert_load; // of each layer of experts, rows that chose each of them
    std::vector<double> seconds;      // of each instruction on the first thread, its barrier included; empty: not measured
    std::vector<Range> halves;        // of the rows: two, or one of all
    std::vector<int> shares;          // [halves][threads + 1]: where each thread's rows begin, if they work apart; empty: they work together
    int led = 0;                      // instructions that all threads but the first did
    int64_t spared_bytes = 0;         // of the weights: what screening left unread
    bool cuts_chunks = false;         // a chunk's rows lie in two threads' shares
    double started = 0, ended = 0;    // seconds, steady clock
    // Of a rank's step: reductions, bytes that it gave to the other ranks, seconds that its first thread waited for theirs.
    int reductions = 0;
    int64_t posted_bytes = 0;
    double waited = 0;
    std::atomic<bool> failed = false;  // the group was aborted: nothing of the result means anything
    uint32_t ticket = 0;

    int rows() const { return int(positions.size()); }
    int chunks() const { return int(chunk_rows.size()) - 1; }
    int logits() const { return int(logit_rows.size()); }
};

// Which rows a slot has: one for each row of the step, or one for each of logit_rows.
enum class RowSpace : uint8_t { all, logits };

struct Slot {
    int width;
    RowSpace space;
    float* data;
    int reduction = -1;  // the reduction whose partial sums it holds: `data` lies in the rank's area, and changes with each step

    float* row(int index) const { return data + size_t(index) * size_t(width); }
};
using SlotId = int;

// Cuts attention's work for one step: a unit is some query vectors of one KV head of one chunk, over all their keys or over one block.
// `whole`: every row sees all rows of its chunk, which are its keys 0, 1, ...; otherwise it sees those up to its position.
struct AttentionPlan {
    struct Unit {
        int chunk, kv_head, first_query, count;  // query q of a chunk: row q / group, head q % group of the KV head
        int first, past;  // positions of the keys that it reads
        int join;         // index of `joins`, or -1: this unit reads all that its queries see
    };
    struct Join {  // blocks of the same queries
        int first_partial, first_block, blocks;
    };
    int group, heads, kv_heads, window;  // group: index of Step::groups, -1 where the plan is whole
    bool whole;
    struct Part {  // a team's
        std::vector<Unit> units;
        std::vector<Join> joins;
        bool single = false;  // one row a chunk, and one unit for its newest key: the unit may store that key itself
    };
    std::vector<Part> parts;  // [halves][threads]: of the team that each thread is the first of

    bool same(const AttentionPlan& other) const {
        return group == other.group && heads == other.heads && kv_heads == other.kv_heads && window == other.window && whole == other.whole;
    }
    void build(const Step& step, const Worker& worker, int max_partials, Part& part) const;
};

// cos and sin of the step's rows, for one rope table.
struct AngleTable {
    std::vector<float> inv_freq;
    float scale;
    float* data;  // [rows][2 * half]

    int half() const { return int(inv_freq.size()); }
    const float* row(int index) const { return data + size_t(index) * inv_freq.size() * 2; }
};

// Which experts the rows of a step go to. An entry is a row at one of its experts; entries are sorted by expert, then row.
struct Routing {
    std::vector<int32_t> experts;  // [rows][chosen], ascending in a row
    std::vector<float> weights;    // [rows][chosen]
    std::vector<int> entries;      // [rows][chosen]: the entry of each
    std::vector<int> first;        // [experts + 1]: the first entry of each expert

    void reserve(int rows, int chosen, int count) {
        experts.resize(std::max(experts.size(), size_t(rows) * size_t(chosen)));
        weights.resize(experts.size()), entries.resize(experts.size());
        first.resize(std::max(first.size(), size_t(count) + 1));
    }
};

// A thread's own memory.
struct Scratch {
    uint8_t* activations;  // of the few rows that each thread prepares for itself
    float* row;            // one row of the widest slot
    float* tile;           // results of a piece of a product
    uint8_t* attention;
    float *state, *partial, *queries;
    std::vector<Best> best;  // [logits]
    int screened = 0;        // tiles that screening did not spare
    uint64_t event = 0;      // the group's last event that this thread took part in
    std::vector<uint64_t> events;  // [reductions][halves]: theirs
    SampleScratch sampling;
    Routing routing;
};

// The head's screening. It decides what is read, never what is chosen.
struct Screening {
    static constexpr int kLongest = 1024;
    int pause = 0;   // steps that are not screened, because it did not pay
    int length = 1;  // of the next pause: twice the last one's, until it pays again
    // The best of each row among the tiles that were multiplied, as far as any thread knows. A raise that another overwrites costs time alone.
    std::atomic<float> least[kScreenedRows];

    Screening() { forget(); }
    void forget() {
        for (std::atomic<float>& value : least) value.store(kNoBest.value, std::memory_order_relaxed);
    }
    void skipped() { pause = std::max(0, pause - 1); }
    void done(bool paid) {
        forget();
        pause = paid ? 0 : length;
        length = paid ? 1 : std::min(2 * length, kLongest);
    }
};

class Program;
struct ProductInput;

class Instruction {
  public:
    virtual ~Instruction() = default;
    virtual void run(Program& program, Step& step, Worker& worker) const = 0;
    // True if it reads nothing that the start of a step prepares.
    virtual bool starts_alone() const { return false; }
    // Which rows it works on.
    virtual RowSpace space(const Program& program) const = 0;
    // Operations for a row, and for each key that it sees: for shares of equal work.
    virtual double row_cost() const { return 0; }
    virtual double key_cost() const { return 0; }
    // False if the threads must work on its rows together.
    virtual bool parts() const { return true; }
    // The packed weights that a thread reads first, null if that is not known before it runs. For prefetches: the team may be another one then.
    virtual const uint8_t* reads_first(const Worker&) const { return nullptr; }
    // True if it waits for other ranks.
    virtual bool waits() const { return false; }
    // From now on prepares what it makes for the products of the next instruction, if it can (MadeReady); their input lives as long as it does.
    virtual bool make_ready_for(const ProductInput&) { return false; }

    const Instruction* next = nullptr;  // of the program, whose first one follows its last
    // The packed weights that a thread reads after this instruction's, as far as is known.
    const uint8_t* weights_after(const Worker& worker) const {
        for (const Instruction* other = next; other != this; other = other->next)
            if (const uint8_t* weights = other->reads_first(worker)) return weights;
        return reads_first(worker);
    }
};

class Program {
  public:
    Program(Pool& pool, Isa isa, Limits limits);
    ~Program();

    // ---- recording
    SlotId add_slot(int width, RowSpace space);
    // Makes the program a rank's part of a model. Throws std::invalid_argument where the group holds less than the program, or has one.
    void join(std::shared_ptr<Group> group);
    // Room for the partial sums of the next reduction.
    SlotId add_partial(int width);
    int add_angles(std::vector<float> inv_freq, float scale);
    void add(std::unique_ptr<Instruction> instruction) { parts_ = parts_ && instruction->parts(), instructions_.push_back(std::move(instruction)); }
    const float* keep(std::vector<float> values);  // a copy that lives as long as the program
    int plan(int group, int heads, int kv_heads, int window, bool whole = false);
    // Room to prepare so many times the rows of a step (or a thread's own rows) for products.
    void need_activations(int times, const std::vector<Recipe>& recipes, int cols);
    // Room for keys and values of the step's own rows: 16 rows a page, each chunk from a page of its own on.
    std::shared_ptr<KvPool> own_keys(int kv_heads, int head_dim);
    // Room to choose `chosen` of `count` experts; returns where their counts lie in Step::expert_load.
    int need_routing(int chosen, int count);
    // Positions must be less than this.
    void limit_positions(int count) { positions_ = std::min(positions_, count); }
    void need_attention(int dim);
    void use_kv(int group, const KvPool& pool);
    void need_tile(size_t floats) { tile_floats_ = std::max(tile_floats_, floats); }
    void finish(SlotId hidden, SlotId output);  // -1: none
    size_t instructions() const { return instructions_.size(); }
    Instruction* last() { return instructions_.empty() ? nullptr : instructions_.back().get(); }

    // ---- running
    // Checks and queues a step; throws std::invalid_argument.
    static void submit(const std::shared_ptr<Program>& program, const std::shared_ptr<Step>& step);

    // ---- for instructions
    const std::shared_ptr<Group>& group() const { return group_; }  // null: alone
    // Gives bytes of the rank's area to all ranks, as soon as every thread has called this; together, that is after a barrier. Returns the
    // event, which `await` waits for: then all ranks' bytes are there.
    uint64_t post(Step& step, const Worker& worker, size_t at, size_t size);
    void await(Step& step, const Worker& worker, uint64_t event);
    int buffer(int reduction) const { return (first_buffer_ + reduction) % (2 * most_open_); }
    // Counts a reduction that starts (1) or is waited for (-1) while the program is recorded.
    void note_reduction(int change);
    const Slot& slot(SlotId id) const { return slots_[size_t(id)]; }
    int rows(const Step& step, SlotId id) const { return slot(id).space == RowSpace::all ? step.rows() : step.logits(); }
    Range range(const Worker& worker, SlotId id) const { return slot(id).space == RowSpace::all ? worker.rows : worker.logits; }
    const AngleTable& angles(int id) const { return angles_[size_t(id)]; }
    const AttentionPlan::Part& attention_plan(int id, const Worker& worker) const { return plans_[size_t(id)].parts[part_of(worker)]; }
    size_t part_of(const Worker& worker) const { return size_t(worker.half * pool.threads() + worker.first_of_team()); }
    Scratch& scratch(const Worker& worker) { return scratch_[size_t(worker.index)]; }
    const Scratch& scratch_of(int thread) const { return scratch_[size_t(thread)]; }
    const int32_t* own_pages() const { return own_pages_.data(); }  // 0, 1, 2, ...
    Routing& routing() { return routing_; }
    int expert_counts() const { return expert_counts_; }
    float* partial(int index) { return (float*)partials_->data() + size_t(index) * partial_floats_; }
    std::atomic<int>& joined(int join) { return joined_[size_t(join)]; }
    // Room for a team's prepared rows; `row` is its first.
    uint8_t* activations(int row) const { return activations_ + activation_bytes_ * size_t(row); }

    Pool& pool;
    const Isa isa;
    const Limits limits;
    const Kernels& matrix;
    const RowKernels& rows_of;
    Screening screening;
    int vocab = 0;  // rows of the embedding, 0 if there is none
    std::vector<int32_t> last_tokens;

  private:
    void check(const Step& step) const;
    void share_out(Step& step) const;
    void enter(const Step& step, Worker& worker, Team team, int half) const;
    bool leads(const Step& step, const Worker& worker) const;
    size_t lead(Step& step, Worker& worker, bool apart);
    bool add_shares(Step& step, Range rows, double of_a_row, double of_a_key) const;
    size_t past_segment(const Step& step, size_t first) const;
    void run(Step& step, Worker& worker);
    void begin(Step& step, Worker& worker);
    void end(Step& step, Worker& worker);
    void place_partials();

    std::vector<Slot> slots_;
    std::vector<AngleTable> angles_;
    std::vector<AttentionPlan> plans_;
    std::vector<int64_t> group_slots_;  // slots that each KV group's pool has; 0 where no instruction uses it
    std::vector<int> page_sizes_;
    std::vector<std::unique_ptr<Instruction>> instructions_;
    bool parts_ = true;  // all instructions do
    double row_cost_ = 0;  // an instruction's, on average
    std::shared_ptr<Group> group_;
    std::atomic<int> posting_[2 * GroupLayout::buffers] = {};  // of event n at n % their number: threads that work apart and have called post
    int reductions_ = 0, first_buffer_ = 0;  // of the step's first reduction
    int open_ = 0, most_open_ = 1;  // reductions under way at once: group.h says why there are twice as many buffers
    std::vector<std::unique_ptr<std::vector<float>>> kept_;
    SlotId hidden_ = -1, output_ = -1;

    size_t activation_bytes_ = 0 /* of a row */, private_bytes_ = 0, tile_floats_ = 0, attention_bytes_ = 0;
    int attention_dim_ = 0, max_partials_ = 0, expert_counts_ = 0, positions_ = INT32_MAX;
    std::vector<std::shared_ptr<KvPool>> own_keys_;
    std::vector<int32_t> own_pages_;
    Routing routing_;
    int routing_chosen_ = 0, routing_count_ = 0;
    size_t partial_floats_ = 0;
    std::unique_ptr<Memory> arena_, partials_;
    std::unique_ptr<std::atomic<int>[]> joined_;
    uint8_t* activations_ = nullptr;
    std::vector<Scratch> scratch_;
};

}  // namespace headrace
