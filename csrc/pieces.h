// How the threads of a team share out rows and tiles.
#pragma once

#include <algorithm>

#include "pool.h"

namespace headrace {

constexpr int kPiecesAThread = 6;  // so that a thread that lost its core for a while holds up little
// Rows and tiles of a product whose results stay in a thread's own memory until the next op reads them.
constexpr int kTileRows = 128;
constexpr int kGatedTiles = 8;  // of gate, and of up

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

}  // namespace headrace
