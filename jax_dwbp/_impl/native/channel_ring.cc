// What is packed where in a ring, and what each tap reads of it or of the caller's array.
//
// A task takes the rows of a slice of one image one after the other. It packs the rows that the filter
// meets to a ring of rows, each once, and writes out a row at a time: what it works on stays in the
// cache.

#include "channel_ring.h"

namespace jax_dwbp {
namespace {

// Bytes of packed rows that a task aims at: a part of the L2 cache.
constexpr int64_t kRingBytes = 512 << 10;
// Most bytes that one block of channels may take before the columns are tiled.
constexpr int64_t kTileBytes = 384 << 10;
// Columns of a tile are a multiple of this, which is one of the columns that a kernel takes at a time.
constexpr int64_t kTileColumns = 84;
// How far ahead a single long row is fetched, if it is read in place or packed.
constexpr int64_t kAheadBytes = 64 << 10;
constexpr int64_t kAheadColumns = 32;

}  // namespace

bool HasLines(const ChannelCall& call, const Tensor& tensor, int64_t multiplier) {
  return multiplier == 1 && tensor.channel == 1 && call.sizes.channels >= call.kernels.lanes;
}
bool IsLines(const ChannelCall& call, const Tensor& tensor, int64_t multiplier) {
  return HasLines(call, tensor, multiplier) && call.kernels.channel_lanes->convolve_in_place;
}

int64_t BlocksPerTask(int64_t blocks, int64_t block_lines, int64_t most) {
  const int64_t fitting = std::max<int64_t>(kRingBytes / 64 / block_lines, 1);
  return CeilDiv(blocks, CeilDiv(blocks, std::min(fitting, most)));
}

Chunk::Chunk(const ChannelCall& call, int64_t first, int64_t task_blocks, bool in_place,
             bool has_whole) {
  const int64_t lanes = call.kernels.lanes;
  first_channel = first * lanes;
  channels = std::min(task_blocks * lanes, call.sizes.channels - first_channel);
  const int64_t whole = has_whole ? channels / lanes : 0;
  const int64_t rest = in_place ? channels - lanes : whole * lanes;
  blocks = CeilDiv(channels, lanes);
  parts[0] = {.begin = 0, .end = whole, .channel = 0, .channels = whole * lanes, .are_whole = true};
  parts[1] = {.begin = whole,
              .end = blocks,
              .channel = rest,
              .channels = channels - rest,
              .are_whole = in_place};
}

ReadPlan::ReadPlan(const ChannelCall& call, bool in_place, int64_t most_columns)
    : call(call), in_place(in_place), multiplier(call.InMultiplier()) {
  const Axis &rows = call.rows, &columns = call.columns;
  const int64_t read_columns = columns.ReadCount();
  slots = std::min(rows.Span() + call.kernels.channel_lanes->rows, rows.ReadCount());
  slices = call.depth.MostMet();
  const int64_t slice_rows = slots * rows.phases.size();
  const int64_t phase_rows = multiplier * slices * slice_rows * columns.phases.size();
  const int64_t most_lines = kTileBytes / 64 / std::max<int64_t>(phase_rows, 1);
  const int64_t fitting = std::max(most_lines - columns.Span(), (most_lines - read_columns) / 2);
  tile = std::min(columns.Count(), most_columns);
  if (fitting < tile) {
    tile = std::min(tile, std::max<int64_t>(fitting / kTileColumns, 1) * kTileColumns);
  }
  tiles = CeilDiv(columns.Count(), tile);
  // A filter that is longer than what is read meets only a part of it at a time.
  reach = std::min(columns.Span(), read_columns - 1 + tile - 1);
  width = tile + reach;
  row_lines = columns.phases.size() * width;
  plane = Odd(slices * slice_rows * row_lines);
  block = multiplier * plane;

  const int64_t line = sizeof(Line), element = call.kernels.element_size;
  slice_bytes = call.in.slice * element;
  row_bytes = call.in.row * element;
  line_bytes = in_place ? call.in.column * element : line;
  column_bytes = in_place ? columns.read_step * line_bytes : line;
  block_bytes = in_place ? call.kernels.lanes * element : block * line;
}

bool ReadPlan::Meets(const AxisTap& tap, int64_t start) const {
  return reach == call.columns.Span() || (tap.begin < start + tile && tap.end > start);
}

int64_t ReadPlan::First(int64_t start) const {
  const Axis& columns = call.columns;
  return reach == columns.Span() ? columns.first : std::max(columns.first, 1 - tile - start);
}

int64_t ReadPlan::TapBytes(const AxisTap& tap, int64_t start) const {
  if (in_place) return call.columns.Element(tap, start + tap.offset) * line_bytes;
  return (tap.phase * width + tap.offset - First(start)) * line_bytes;
}

bool Reader::BeginTile(int64_t tile) {
  start = tile * plan.tile;
  if (std::exchange(scratch.tile, tile) == tile) return false;
  const Axis& columns = plan.call.columns;
  const int64_t period = plan.in_place ? 1 : columns.period;
  scratch.taps.clear();
  scratch.starts.assign(1, 0);
  for (int64_t phase = 0; phase < columns.WrittenPhases(); ++phase) {
    const std::span<const AxisTap> taps = columns.Taps(phase);
    const int64_t count = taps.size();
    for (int64_t first = 0; first < std::min(period, count); ++first) {
      for (int64_t i = first; i < count; i += period) {
        const AxisTap& tap = taps[columns.falls ? count - 1 - i : i];
        if (!plan.Meets(tap, start)) continue;
        scratch.taps.push_back({.read = plan.TapBytes(tap, start),
                                .weight = tap.k,
                                .begin = tap.begin - start,
                                .end = tap.end - start});
      }
    }
    scratch.starts.push_back(scratch.taps.size());
  }
  return true;
}

void Reader::BeginSlice(const char* in_image, int64_t slice) {
  const DepthAxis& depth = plan.call.depth;
  image = last = in_image;
  scratch.held.assign(plan.slices * plan.slots * plan.call.rows.phases.size(), -1);
  scratch.met.clear();
  for (int64_t k = 0; k < depth.kernel; ++k) {
    const int64_t read = depth.Read(k, slice);
    if (read < 0) continue;
    scratch.met.push_back({k, read});
    last = std::max(last, image + read * plan.slice_bytes);
  }
}

void Reader::Pack(const char* row, Line* to) {
  const Kernels& kernels = plan.call.kernels;
  const Axis &rows = plan.call.rows, &columns = plan.call.columns;
  const Tensor& in = plan.call.in;
  kernels.channel_moves->pack(
      {.data = const_cast<char*>(row),
       .lines = to,
       .plane = plan.plane,
       .channels = channels,
       .multiplier = plan.multiplier,
       .column_step = in.column,
       .channel_step = in.channel,
       .ahead = rows.read_size == 1 ? kAheadColumns * in.column : rows.read_step * in.row},
      {.phases = columns.phases.data(),
       .phase_count = static_cast<int64_t>(columns.phases.size()),
       .stride = columns.read_step,
       .first = start + plan.First(start),
       .width = plan.width,
       .size = columns.read_size});
}

// Where tiles share a row, only the tile's part of one row lies side by side. Of a single row, what
// comes next lies in it.
Ahead Reader::Next(int64_t next) const {
  if (scratch.rows.empty()) return {};
  const Axis& rows = plan.call.rows;
  const char* const first = last + start * plan.column_bytes;
  if (rows.read_size == 1) {
    return {.data = first + kAheadBytes, .rows = plan.row_bytes >= 4 * kAheadBytes};
  }
  const int64_t bytes = *std::max_element(scratch.rows.begin(), scratch.rows.end()) - last;
  const int64_t lowest = bytes / plan.row_bytes;
  const int64_t most = plan.tiles == 1 ? next * rows.read_step : 1;
  return {.data = first + (lowest + 1) * plan.row_bytes,
          .rows = std::min(most, rows.read_size - 1 - lowest)};
}

}  // namespace jax_dwbp
