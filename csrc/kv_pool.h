// One KV group's pages.
#pragma once

#include <algorithm>

#include "attention.h"
#include "memory.h"

namespace headrace {

// A page has room for page_size tokens of every layer and KV head: a run of tiles for each. Pages lie in groups of kGroup:
// [group][layer][KV head][page], so that neighbours' tiles of a layer and head are one long read.
struct KvPool {
    static constexpr int kGroup = 8;

    const KvLayout layout;
    const int layers, pages, page_size, kv_heads;
    const size_t run_bytes, page_bytes;
    const Memory memory;

    KvPool(KvType type, int layers, int pages, int page_size, int kv_heads, int head_dim)
        : layout(type, head_dim), layers(layers), pages(pages), page_size(page_size), kv_heads(kv_heads),
          run_bytes(layout.tile_bytes * size_t(page_size / kTile)), page_bytes(run_bytes * size_t(layers) * size_t(kv_heads)),
          memory(page_bytes * size_t(pages)) {}

    // The tile of the tokens from place `offset` of a page on.
    uint8_t* tile(int layer, int kv_head, int page, int offset) const {
        const int first = page / kGroup * kGroup, together = std::min(kGroup, pages - first);
        const int run = (layer * kv_heads + kv_head) * together + page - first;
        return memory.data() + size_t(first) * page_bytes + size_t(run) * run_bytes + size_t(offset / kTile) * layout.tile_bytes;
    }
    // The same of a slot (page * page_size + place in the page).
    uint8_t* tile(int layer, int kv_head, int64_t slot) const { return tile(layer, kv_head, int(slot / page_size), int(slot % page_size)); }
};

}  // namespace headrace
