// The instructions of a program. Each shares its work out among the threads; none ends with a barrier.
#pragma once

#include "program.h"

namespace headrace {

// out = rows of the table, by the step's tokens.
struct Embed : Instruction {
    std::shared_ptr<const Weight> table;
    SlotId out;

    void run(Program& program, Step& step, Worker& worker) const override;
    bool starts_alone() const override { return true; }
};

// What products read: rows of a slot (or the logit rows of it), maybe normed, prepared for each recipe that the weights need.
struct ProductInput {
    SlotId x;
    int cols;
    bool gathered = false;        // rows are step.logit_rows of x
    const float* norm = nullptr;  // [cols]
    float eps = 0;
    std::vector<Recipe> recipes;

    int rows(const Program& program, const Step& step) const { return gathered ? step.logits() : program.rows(step, x); }
    // Prepares all rows; returns one activation a recipe. Ends with a barrier if the work was shared.
    std::vector<Activation> prepare(Program& program, const Step& step, Worker& worker) const;
};

struct Weighted {
    std::shared_ptr<const Weight> weight;
    const float* bias = nullptr;
    int recipe = 0;  // index of ProductInput::recipes
    SlotId out = -1;
    bool accumulate = false;  // add to what `out` holds
};

// out = x W^T (+ bias) for several weights of one input.
struct Linear : Instruction {
    ProductInput input;
    std::vector<Weighted> parts;

    void run(Program& program, Step& step, Worker& worker) const override;
};

// out = silu(x G^T) * (x U^T)
struct Gated : Instruction {
    ProductInput input;
    Weighted gate, up;
    SlotId out;

    static size_t tile_floats();  // of Scratch::tile
    void run(Program& program, Step& step, Worker& worker) const override;
};

// Logits of the input's rows, and the tokens that they choose.
struct Head : Instruction {
    ProductInput input;
    Weighted weight;
    SlotId logits;  // filled only in steps where a row is sampled or asks for its logits

    static size_t tile_floats();
    void run(Program& program, Step& step, Worker& worker) const override;

  private:
    void choose(Program& program, Step& step, Worker& worker, int row) const;
};

struct RmsNorm : Instruction {
    SlotId x, out;
    const float* weight;
    int width;  // of the weight; a row of x holds one or several such vectors, each normed on its own
    float eps;

    void run(Program& program, Step& step, Worker& worker) const override;
};

struct Rope : Instruction {
    SlotId x, out;
    int angles, heads;

    void run(Program& program, Step& step, Worker& worker) const override;
};

struct KvWrite : Instruction {
    std::shared_ptr<const KvPool> pool;
    int layer, group;
    SlotId k, v;

    void run(Program& program, Step& step, Worker& worker) const override;
};

// Attention, and before it what feeds it: rotation of q and k, and the write of k and v.
struct Attention : Instruction {
    std::shared_ptr<const KvPool> pool;
    int layer, group, plan, heads;
    SlotId q, out;
    SlotId k = -1, v = -1;             // -1: written already
    int q_angles = -1, k_angles = -1;  // -1: rotated already, or not at all
    float scale;
    int window;
    float softcap;

    void run(Program& program, Step& step, Worker& worker) const override;

  private:
    // `another`: this thread goes on with the next unit.
    void attend(Program& program, const Step& step, Worker& worker, const AttentionPlan& plan, int index, bool another) const;
    void write(Program& program, const Step& step, Worker& worker, int row, int kv_head) const;
};

struct SiluMul : Instruction {
    SlotId gate, up, out;

    void run(Program& program, Step& step, Worker& worker) const override;
};

struct Add : Instruction {
    SlotId x, y, out;

    void run(Program& program, Step& step, Worker& worker) const override;
};

struct TakeRows : Instruction {
    SlotId x, out;

    void run(Program& program, Step& step, Worker& worker) const override;
};

}  // namespace headrace
