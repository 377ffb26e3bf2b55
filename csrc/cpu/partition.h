// How a team shares out one direction: blocks of rows times ranges of unit panels.
#pragma once

#include "team.h"
#include "tile.h"

namespace fastseq {
namespace FS_ISA {

struct Range {
  int64_t begin, end;
};

FS_INLINE Range share(int64_t total, int64_t rank, int64_t size) { return {total * rank / size, total * (rank + 1) / size}; }

// The rows of one of `groups` row groups, dealt round: rows are ordered by falling length, so that every group's active rows are
// a prefix of its own and all groups have the same work at each step, which a range of rows each would not give them.
struct OwnRows {
  int64_t group, groups;

  FS_INLINE int64_t row(int64_t own) const { return own * groups + group; }
  FS_INLINE int64_t count(int64_t rows) const { return (rows - group + groups - 1) / groups; }  // among the first `rows`

  // f(first, last) for tiles of at most `most` own rows among the first `rows`.
  template <class F>
  FS_INLINE void for_blocks(int64_t rows, int64_t most, F&& f) const {
    const Blocks blocks(count(rows), most, kTileRegisters);
    for (int64_t b = 0; b < blocks.count; ++b) f(blocks.begin(b), blocks.begin(b + 1));
  }
};

// Cycles, from measurement on Zen 5 at about 3.8 GHz (docs/design.md, "CPU kernels").
constexpr int64_t kBarrierCycles = 1200;
constexpr int64_t kCacheBytes = 768 * 1024;  // of a core's own cache, what weights may take
constexpr int64_t kSharedBytesPerCycle = 12;

// Row groups never wait for each other; the unit groups of one row group meet at a barrier every step.
struct Partition {
  int row_groups = 1, unit_groups = 1;

  int size() const { return row_groups * unit_groups; }

  static int64_t step_cycles(int64_t blocks, int64_t panels, int64_t tile_cycles, int64_t panel_bytes, int rows, int units) {
    const int64_t own_panels = (panels + units - 1) / units;
    const int64_t bytes = own_panels * panel_bytes;
    return (blocks + rows - 1) / rows * own_panels * tile_cycles + (units > 1 ? kBarrierCycles : 0) +
           (bytes > kCacheBytes ? bytes / kSharedBytesPerCycle : 0);
  }

  // The cheapest split of one step over at most `threads` threads.
  static FS_INLINE Partition choose(int threads, int64_t blocks, int64_t panels, int64_t tile_cycles, int64_t panel_bytes) {
    Partition best;
    int64_t least = step_cycles(blocks, panels, tile_cycles, panel_bytes, 1, 1);
    for (int rows = 1; rows <= threads && rows <= blocks; ++rows) {
      for (int units = 1; rows * units <= threads && units <= panels; ++units) {
        const int64_t cycles = step_cycles(blocks, panels, tile_cycles, panel_bytes, rows, units);
        if (cycles < least) least = cycles, best.row_groups = rows, best.unit_groups = units;
      }
    }
    return best;
  }
};

}  // namespace FS_ISA
}  // namespace fastseq
