// The instructions of a program. Each shares its work out among the threads; none ends with a barrier.
#pragma once

#include "program.h"

namespace headrace {

// out = rows of the table, by the step's tokens or by position + offset.
struct Embed : Instruction {
    std::shared_ptr<const Weight> table;
    bool by_position = false;
    int offset = 0;  // a row that the table does not have is another rank's: zeros here
    SlotId out;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::all; }
    bool starts_alone() const override { return true; }
};

// A function of a row.
struct Transform {
    enum class Kind : uint8_t { nothing, rms_norm, layer_norm, activation, cap };
    Kind kind = Kind::nothing;
    const float *weight = nullptr, *bias = nullptr;  // of norms, [n]; bias may be null
    float eps = 0;
    ActivationKind activation = ActivationKind::silu;
    float factor = 1, cap = 0;  // RowKernels::cap

    // y = f(x) for n values; y may be x.
    void apply(const RowKernels& kernels, const float* x, int n, float* y) const;
};

// What products read: rows of a slot (or the logit rows of it), maybe transformed, prepared for each recipe that the weights need.
struct ProductInput {
    SlotId x;
    int cols;
    bool gathered = false;  // rows are step.logit_rows of x
    Transform before;
    std::vector<Recipe> recipes;
    bool made_ready = false;  // a step's few rows are prepared by the instruction before, where it makes them

    RowSpace space(const Program& program) const { return gathered ? RowSpace::logits : program.slot(x).space; }
    Range rows(const Program& program, const Worker& worker) const { return gathered ? worker.logits : program.range(worker, x); }
    // Prepares the team's rows; returns one activation a recipe. Ends with a barrier if the work was shared.
    std::vector<Activation> prepare(Program& program, const Step& step, Worker& worker) const;
    // Room for the team's prepared rows, one activation a recipe.
    std::vector<Activation> room(Program& program, const Step& step, const Worker& worker) const;
    bool may_be_made_ready() const;
    // Of all the step's rows, since the team that makes them and the one that reads them may differ: of few rows no thread has its own.
    bool is_made_ready(const Program& program, const Step& step) const { return made_ready && program.rows(step, x) <= kPrivateRows; }
};

// Where an instruction prepares what it makes for the products after it: few rows, which every thread would else prepare for itself.
class MadeReady {
  public:
    // `reader`: null if there is none.
    MadeReady(const ProductInput* reader, Program& program, const Step& step, const Worker& worker);
    // Values of a row, made: `count` from a column on, both multiples of 32.
    void put(const float* values, int row, int column, int count) const;

  private:
    const Kernels& kernels_;
    std::vector<Activation> room_;  // empty where nothing is to be done
};

struct Weighted {
    std::shared_ptr<const Weight> weight;
    const float* bias = nullptr;
    int recipe = 0;  // index of ProductInput::recipes
    SlotId out = -1;
    bool accumulate = false;  // add to what `out` holds

    double row_cost() const { return 2.0 * double(weight->matrix.rows) * double(weight->matrix.cols); }
};

// out = x W^T (+ bias) for several weights of one input.
struct Linear : Instruction {
    ProductInput input;
    std::vector<Weighted> parts;

    void run(Program& program, Step& step, Worker& worker) const override;
    const uint8_t* reads_first(const Worker& worker) const override;
    RowSpace space(const Program& program) const override { return input.space(program); }
    double row_cost() const override;

  private:
    int tiles() const;
    const uint8_t* tile(int index) const;  // of all parts'
};

// out = activation(x G^T) * (x U^T)
struct Gated : Instruction {
    ProductInput input;
    Weighted gate, up;
    ActivationKind activation;
    SlotId out;
    const ProductInput* reader = nullptr;  // MadeReady

    static size_t tile_floats();  // of Scratch::tile
    void run(Program& program, Step& step, Worker& worker) const override;
    const uint8_t* reads_first(const Worker& worker) const override;
    RowSpace space(const Program& program) const override { return input.space(program); }
    double row_cost() const override { return gate.row_cost() + up.row_cost(); }
    bool make_ready_for(const ProductInput& input) override { return input.x == out && (reader = &input); }
};

// Logits of the input's rows, and the tokens that they choose.
struct Head : Instruction {
    ProductInput input;
    Weighted weight;
    float factor = 1, cap = 0;  // RowKernels::cap of the product
    SlotId logits;  // filled only in steps where a row is sampled or asks for its logits
    std::vector<int> columns;  // of a group: where each rank's columns begin, and how many there are in all

    static size_t tile_floats();
    void run(Program& program, Step& step, Worker& worker) const override;
    const uint8_t* reads_first(const Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::logits; }

  private:
    void multiply(Program& program, Worker& worker, const std::vector<Activation>& activations, float* kept, int64_t ld) const;
    bool bounded(const Activation& x) const;
    void multiply_screened(Program& program, Worker& worker, const Activation& x, const Reach* reach) const;
    int first_column(Program& program) const { return columns.empty() ? 0 : columns[size_t(program.group()->rank)]; }
    Best best_of_team(Program& program, const Worker& worker, int row) const;
    int32_t choose(Program& program, const Step& step, const Worker& worker, int row, const Best& best) const;
    void note(Program& program, Step& step, int row, int32_t token) const;
    void give_back(Program& program, Step& step, int row) const;
    void choose_among_ranks(Program& program, Step& step, Worker& worker, bool kept) const;
};

// Gives this rank's partial sums to all ranks.
struct ReduceStart : Instruction {
    SlotId partial;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::all; }
};

// out = the sum of the partial sums of ranks 0, 1, ... (+ residual), once all are there
struct ReduceWait : Instruction {
    SlotId partial, out, residual = -1;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::all; }
    bool waits() const override { return true; }
};

// out = f(x) (+ residual)
struct Apply : Instruction {
    SlotId x, out, residual = -1;
    Transform transform;
    int width;  // a row of x holds one or several vectors of this width, each transformed on its own

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
};

struct Rope : Instruction {
    SlotId x, out;
    int angles, heads;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
};

struct KvWrite : Instruction {
    std::shared_ptr<const KvPool> pool;
    int layer, group;
    SlotId k, v;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::all; }
};

// What is done to each head of q or k before attention: a norm, then rotation.
struct HeadTransform {
    Transform norm;
    int angles = -1;  // -1: not rotated

    bool nothing() const { return norm.kind == Transform::Kind::nothing && angles < 0; }
    // y may be x.
    void apply(const Program& program, int row, int head_dim, const float* x, float* y) const;
};

class Lead;

// Attention, and before it what feeds it: norms and rotation of q and k, and the write of k and v.
struct Attention : Instruction {
    std::shared_ptr<const KvPool> pool;
    int layer, group, plan, heads;
    SlotId q, out;
    SlotId k = -1, v = -1;  // -1: written already
    HeadTransform of_q, of_k;
    float scale;
    int window;
    float softcap;
    const float* slopes = nullptr;  // [heads]
    const ProductInput* reader = nullptr;  // MadeReady

    bool make_ready_for(const ProductInput& input) override { return input.x == out && pool->layout.head_dim % 32 == 0 && (reader = &input); }
    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program&) const override { return RowSpace::all; }
    double key_cost() const override { return 4.0 * heads * pool->layout.head_dim; }

  private:
    void attend(Program& program, const Step& step, Worker& worker, const AttentionPlan::Part& plan, int index, Lead& lead, const MadeReady& made) const;
    void write(Program& program, const Step& step, Worker& worker, int row, int kv_head) const;
};

// Attention of every row to all rows of its chunk, in float32 and without pages.
struct Bidirectional : Instruction {
    std::shared_ptr<const KvPool> keys;  // of the step's own rows
    int plan, heads;
    SlotId q, k, v, out;
    float scale;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
    bool parts() const override { return false; }
};

// out = sum over a row's experts e, ascending, of weight_e * (glu(x G_e^T, x U_e^T) D_e^T). What nobody chose is not read.
struct Experts : Instruction {
    struct Matrices {
        std::vector<std::shared_ptr<const Weight>> weights;  // of each expert, all of one format and shape
        Recipe recipe;
    };
    SlotId x, scores, out;
    SlotId hidden, results;  // [rows][chosen * width]: used as [rows * chosen][width]
    Matrices gate, up, down;
    int chosen, load_at;  // load_at: in Step::expert_load
    bool normalise;
    ActivationKind activation;

    int count() const { return int(gate.weights.size()); }
    static size_t tile_floats() { return Gated::tile_floats(); }
    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
    bool parts() const override { return false; }

  private:
    void choose(const float* scores, int32_t* experts, float* weights) const;
    void sort(int rows, Routing& routing) const;
    void multiply_gated(Program& program, Worker& worker, const Routing& routing, const Activation& of_gate, const Activation& of_up) const;
    void multiply_down(Program& program, Worker& worker, const Routing& routing, const Activation& of_down) const;
};

struct Glu : Instruction {
    SlotId gate, up, out;
    ActivationKind activation;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
};

// out = x + factor * y
struct Add : Instruction {
    SlotId x, y, out;
    float factor = 1;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
};

struct TakeRows : Instruction {
    SlotId x, out;

    void run(Program& program, Step& step, Worker& worker) const override;
    RowSpace space(const Program& program) const override { return program.slot(out).space; }
};

}  // namespace headrace
