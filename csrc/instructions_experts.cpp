// Experts: which rows go to whom, and their products.
#include <cmath>
#include <cstring>

#include "instructions.h"
#include "pieces.h"

namespace headrace {
namespace {

constexpr int kExpertRows = 256;  // of a block of the down product

// Tiles in a piece: an even number, since blocked products take two at once.
int tiles_a_piece(int tiles, int threads, int most) {
    const int wanted = tiles / (threads * kPiecesAThread) / 2 * 2;
    return std::max(2, std::min(most, wanted));
}

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
