// The rows that a task reads: in the caller's array, or packed to a ring of rows, each once.

#ifndef JAX_DWBP_CHANNEL_RING_H_
#define JAX_DWBP_CHANNEL_RING_H_

#include <algorithm>
#include <cstdint>
#include <utility>

#include "channel_axis.h"
#include "channel_schedule.h"
#include "kernels.h"
#include "runtime.h"

namespace jax_dwbp {

// Planes an odd number of lines apart don't compete for the same sets of the L1 cache.
inline int64_t Odd(int64_t lines) { return lines | 1; }

// Whether lines can be written to the array in place.
bool HasLines(const ChannelCall& call, const Tensor& tensor, int64_t multiplier);
// Whether they can also be read there.
bool IsLines(const ChannelCall& call, const Tensor& tensor, int64_t multiplier);

// Blocks of channels for each task, of even size, where each takes so many lines of scratch.
int64_t BlocksPerTask(int64_t blocks, int64_t block_lines, int64_t most);

// Blocks of channels that are done together.
struct Blocks {
  int64_t begin, end;         // in the chunk
  int64_t channel, channels;  // the first of them in the chunk, and how many
  bool are_whole;             // lines

  int64_t Count() const { return end - begin; }
};

// The channels of a task. Where an array is read or written in place, the blocks of whole lines come
// first. The channels that are left are packed or, where the input is in place, done together with some
// before them.
struct Chunk {
  int64_t first_channel, channels, blocks;
  Blocks parts[2];  // of which the first may be empty, or the second

  // Those of `task_blocks` blocks from block `first` on.
  Chunk(const ChannelCall& call, int64_t first, int64_t task_blocks, bool in_place, bool has_whole);
};

// How a call reads `in`.
struct ReadPlan {
  const ChannelCall& call;
  bool in_place;
  int64_t multiplier;              // values of `in` for each channel
  int64_t tile;                    // columns that are written at a time, of each phase
  int64_t tiles;                   // of a row
  int64_t reach;                   // from the first offset that meets a tile to the last
  int64_t width;                   // lines of one phase of a packed row
  int64_t row_lines;               // lines of a packed row
  int64_t slots;                   // of the ring: packed rows of each phase and slice
  int64_t slices;                  // that are read for one of the result, at most
  int64_t plane;                   // lines of a block of channels in the ring
  int64_t block;                   // with all its multiples
  int64_t slice_bytes, row_bytes;  // from one slice or row of the array to the next
  // See Source.
  int64_t column_bytes, line_bytes, block_bytes;

  ReadPlan(const ChannelCall& call, bool in_place, int64_t most_columns);

  // Lines of scratch that a block of channels takes.
  int64_t BlockLines() const { return in_place ? 0 : block; }
  // Bytes from the first channel of the chunk to that of some blocks.
  int64_t StartBytes(const Blocks& blocks) const {
    return in_place ? blocks.channel * call.kernels.element_size : blocks.begin * block_bytes;
  }
  // Whether the tile from column `start` on needs a tap, and the first offset of those.
  bool Meets(const AxisTap& tap, int64_t start) const;
  int64_t First(int64_t start) const;
  // Bytes from where a row starts to what `tap` reads for column `start`.
  int64_t TapBytes(const AxisTap& tap, int64_t start) const;
};

// The rows that a task reads of one image, for one slice and one tile of columns.
struct Reader {
  const ReadPlan& plan;
  Scratch& scratch;
  Line* ring;
  int64_t channels;             // of the task
  int64_t start = 0;            // the first column of the tile
  const char* image = nullptr;  // from the first channel of the task on
  const char* last = nullptr;   // slice of it that is read

  // Lists the taps of a row of the filter for a tile of columns, those of a phase in the order of what
  // they read: in a ring, what is read of one phase lies side by side. False if they are what the
  // thread has.
  bool BeginTile(int64_t tile);

  // Lists the taps that meet a slice of an image of the result. What was packed was of another slice or
  // another tile.
  void BeginSlice(const char* in_image, int64_t slice);

  // What `tap` reads to write row t, of the slice that is read by the i-th of the taps that are listed:
  // packed if it is not there yet.
  const char* Row(int64_t i, const AxisTap& tap, int64_t t) {
    const Axis& rows = plan.call.rows;
    const int64_t position = t + tap.offset, phases = rows.phases.size();
    const char* const row =
        image + scratch.met[i].slice * plan.slice_bytes + rows.Element(tap, position) * plan.row_bytes;
    if (plan.in_place) return row;
    const int64_t slot = (i * plan.slots + position % plan.slots) * phases + tap.phase;
    Line* const lines = ring + slot * plan.row_lines;
    const bool is_held = std::exchange(scratch.held[slot], position) == position;
    if (!is_held) Pack(row, lines);
    return reinterpret_cast<const char*>(lines);
  }

  // Of the rows that are listed in scratch, those of some blocks.
  Source Rows(const Blocks& blocks, Ahead ahead) const {
    return {.rows = scratch.rows.data(),
            .row_count = static_cast<int64_t>(scratch.rows.size()),
            .start_bytes = plan.StartBytes(blocks),
            .column_bytes = plan.column_bytes,
            .line_bytes = plan.line_bytes,
            .block_bytes = plan.block_bytes,
            .packed = !plan.in_place,
            .ahead = ahead};
  }

  // What to fetch from below the rows that are listed in scratch, before `next` more of each phase are.
  // They are read in place, and all channels of them. Of several slices it is of the last: the slice
  // before has read the others.
  Ahead Next(int64_t next) const;

 private:
  void Pack(const char* row, Line* to);
};

}  // namespace jax_dwbp

#endif  // JAX_DWBP_CHANNEL_RING_H_
