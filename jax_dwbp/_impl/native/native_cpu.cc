// The three ops on a CPU: what is packed, convolved and emitted when, and by which thread.
//
// Here a vector is of channels of one pixel. What is better done by vectors of neighbours in a row goes to
// row_schedule.cc and row_reduction.cc.
//
// Along one axis each op reads t + offset to write t, for each tap of the filter. The forward op
// with a stride of s reads s phases of x (x[s * t + phase]); its transpose writes s phases of dx, each
// from the taps that meet it. So a stride is only a matter of which lines are packed and where
// results go: the vector code sees dense sums.
//
// A task takes the rows of one image one after the other. It packs the rows that the filter meets to a
// ring of rows, each once, and writes out a row at a time: what it works on stays in the cache.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.h"
#include "row_axis.h"
#include "row_schedule.h"
#include "runtime.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dwbp {
namespace {

// Bytes of packed rows that a task aims at: a part of the L2 cache.
constexpr int64_t kRingBytes = 512 << 10;
// Most bytes that one block of channels may take before the columns are tiled.
constexpr int64_t kTileBytes = 384 << 10;
// Columns of a tile are a multiple of this, which is one of the columns that a kernel takes at a time.
constexpr int64_t kTileColumns = 84;
// How far ahead a single long row is fetched.
constexpr int64_t kAheadBytes = 64 << 10;
// The filter gradient is reduced in parts, to have this many tasks, whatever the number of threads:
// the result may not depend on it. Their sums take at most so many bytes.
constexpr int64_t kReductionTasks = 32;
constexpr int64_t kReductionBytes = 4 << 20;
constexpr int64_t kReductionBlocks = 4;
// So many rows are added up before they join others.
constexpr int64_t kReductionRows = 32;

// Planes an odd number of lines apart don't compete for the same sets of the L1 cache.
int64_t Odd(int64_t lines) { return lines | 1; }

// ---------------------------------------------------------------------------------------------------
// What meets what along one axis.

struct AxisTap {
  int64_t k;           // in the filter
  int64_t phase;       // the index of the phase that it reads
  int64_t offset;      // reads t + offset of the phase to write t
  int64_t begin, end;  // the t that meet more than padding, as far as there are such t
  int64_t next;        // the index of the tap that reads the same to write t + 1, or -1
  bool is_next;        // of another tap

  bool Meets(int64_t t) const { return begin <= t && t < end; }
};

struct Axis {
  int64_t read_size, write_size;
  int64_t read_step = 1, write_step = 1;  // from one element of a phase to the next
  std::vector<int64_t> phases{};          // that are read
  // For each phase that is written its taps, one phase after the other, and where they start in the list.
  std::vector<AxisTap> taps{};
  std::vector<int64_t> starts{0};
  // In the list, from a tap to the next one of the same two phases. Their offsets rise or fall alike.
  int64_t period = 1;
  bool falls = false;
  int64_t first = 0, last = 0;  // the extreme offsets

  // The t of the phase with the most of them, and those of one phase before `end`.
  int64_t Count() const { return CeilDiv(write_size, write_step); }
  int64_t Count(int64_t phase, int64_t end) const {
    return std::min(end, CeilDiv(write_size - phase, write_step));
  }
  int64_t Span() const { return last - first; }

  int64_t WrittenPhases() const { return starts.size() - 1; }
  int64_t TapCount(int64_t phase) const { return starts[phase + 1] - starts[phase]; }
  ffi::Span<const AxisTap> Taps(int64_t phase) const {
    return {taps.data() + starts[phase], static_cast<size_t>(TapCount(phase))};
  }

  // Adds a tap of the phase whose list is the last, by rising k.
  void Add(int64_t k, int64_t offset, int64_t read_phase) {
    const int64_t write_phase = starts.size() - 1, index = taps.size();
    AxisTap tap{};
    tap.k = k;
    tap.offset = offset;
    tap.next = -1;
    tap.begin = -offset;
    tap.end = CeilDiv(read_size - read_phase, read_step) - offset;
    const int64_t end = std::min(tap.end, Count(write_phase, write_size));
    if (std::max<int64_t>(tap.begin, 0) >= end) return;
    const bool is_first = phases.empty();
    first = is_first ? tap.offset : std::min(first, tap.offset);
    last = is_first ? tap.offset : std::max(last, tap.offset);
    if (index - starts.back() < period) {
      if (is_first || phases.back() != read_phase) phases.push_back(read_phase);
      tap.phase = phases.size() - 1;
    } else {
      AxisTap& other = taps[index - period];
      tap.phase = other.phase;
      if (other.offset == tap.offset + 1) {
        other.next = index;
        tap.is_next = true;
      } else if (other.offset == tap.offset - 1) {
        tap.next = index - period;
        other.is_next = true;
      }
    }
    taps.push_back(tap);
  }
};

struct Window {
  int64_t kernel, stride, low, dilation;

  int64_t Distance(int64_t k) const { return dilation * k - low; }
  int64_t Offset(int64_t k) const { return FloorDiv(Distance(k), stride); }
  int64_t Phase(int64_t k) const { return Distance(k) - Offset(k) * stride; }
  // From one k to the next of the same phase.
  int64_t Period() const { return stride / std::gcd(stride, dilation); }
};

// y[p] = sum over k of x[stride * p - low + dilation * k] * f[k]
Axis ForwardAxis(int64_t in, int64_t out, const Window& window) {
  Axis axis{in, out};
  axis.read_step = window.stride;
  axis.period = 0;
  for (int64_t k = 0; k < std::min(window.Period(), window.kernel); ++k) {
    axis.period += window.Phase(k) < in;  // else its phase is empty
  }
  axis.taps.reserve(window.kernel);
  for (int64_t k = 0; k < window.kernel; ++k) axis.Add(k, window.Offset(k), window.Phase(k));
  axis.starts.push_back(axis.taps.size());
  return axis;
}

// x[h] = sum over k of y[(h + low - dilation * k) / stride] * f[k] where the division is exact
Axis TransposedAxis(int64_t in, int64_t out, const Window& window) {
  Axis axis{out, in};
  axis.write_step = window.stride;
  axis.falls = true;
  axis.taps.reserve(window.kernel);
  const int64_t phases = std::min(window.stride, in), period = window.Period();
  // The first k of each phase.
  std::vector<int64_t> first(phases, window.kernel);
  for (int64_t k = 0; k < std::min(period, window.kernel); ++k) {
    if (window.Phase(k) < in) first[window.Phase(k)] = k;
  }
  axis.starts.reserve(phases + 1);
  for (int64_t k : first) {
    for (; k < window.kernel; k += period) axis.Add(k, -window.Offset(k), 0);
    axis.starts.push_back(axis.taps.size());
  }
  return axis;
}

// ---------------------------------------------------------------------------------------------------
// The rows that are read, in a ring.

struct Ring {
  const Kernels& kernels;
  const Axis &rows, &columns;
  const Tensor& tensor;
  int64_t multiplier;
  int64_t tile;        // columns that are written at a time, of each phase
  int64_t reach;       // from the first offset that meets a tile to the last
  int64_t width;       // lines of one phase of a row
  int64_t row_lines;   // lines of a row
  int64_t slots;       // rows of each phase
  int64_t plane;       // lines of a block of channels
  int64_t block;       // lines of a block of channels, with all its multiples

  Ring(const Kernels& kernels, const Axis& rows, const Axis& columns, const Tensor& tensor,
       int64_t multiplier, int64_t most_columns)
      : kernels(kernels), rows(rows), columns(columns), tensor(tensor), multiplier(multiplier) {
    slots = std::min(rows.Span() + kernels.channel_lanes->rows, CeilDiv(rows.read_size, rows.read_step));
    const int64_t phase_rows = multiplier * slots * rows.phases.size() * columns.phases.size();
    const int64_t most_lines = kTileBytes / 64 / std::max<int64_t>(phase_rows, 1);
    const int64_t fitting = std::max(most_lines - columns.Span(), (most_lines - ReadColumns()) / 2);
    tile = std::min(columns.Count(), most_columns);
    if (fitting < tile) {
      tile = std::min(tile, std::max<int64_t>(fitting / kTileColumns, 1) * kTileColumns);
    }
    // A filter that is longer than what is read meets only a part of it at a time.
    reach = std::min(columns.Span(), ReadColumns() - 1 + tile - 1);
    width = tile + reach;
    row_lines = columns.phases.size() * width;
    plane = Odd(slots * rows.phases.size() * row_lines);
    block = multiplier * plane;
  }

  int64_t ReadColumns() const { return CeilDiv(columns.read_size, columns.read_step); }
  int64_t Tiles() const { return CeilDiv(columns.Count(), tile); }
  bool MeetsAll() const { return reach == columns.Span(); }
  // Whether the tile from column `start` on needs a tap, and the first offset of those.
  bool Meets(const AxisTap& tap, int64_t start) const {
    return MeetsAll() || (tap.begin < start + tile && tap.end > start);
  }
  int64_t First(int64_t start) const {
    return MeetsAll() ? columns.first : std::max(columns.first, 1 - tile - start);
  }
  int64_t BlockBytes() const { return block * sizeof(Line); }

  // Bytes from a row's first line to the first that `tap` reads.
  int64_t Read(const AxisTap& tap, int64_t start) const {
    return (tap.phase * width + tap.offset - First(start)) * sizeof(Line);
  }

  void Clear(Scratch& scratch) const {
    scratch.held.assign(slots * rows.phases.size(), -1);
  }

  // What `tap` reads to write row t of an image, packed if it is not there yet.
  const char* Row(Scratch& scratch, Line* lines, const AxisTap& tap, int64_t t, int64_t start,
                  const char* image, int64_t channels) const {
    const int64_t position = t + tap.offset;
    const int64_t slot = position % slots * rows.phases.size() + tap.phase;
    lines += slot * row_lines;
    if (scratch.held[slot] != position) {
      scratch.held[slot] = position;
      const int64_t row = position * rows.read_step + rows.phases[tap.phase];
      const char* const from = image + row * tensor.row * kernels.element_size;
      kernels.channel_moves->pack(
          {const_cast<char*>(from), lines, plane, channels, multiplier, tensor.column, tensor.depth,
           rows.read_step * tensor.row},
          {columns.phases.data(), static_cast<int64_t>(columns.phases.size()), columns.read_step,
           start + First(start), width, columns.read_size});
    }
    return reinterpret_cast<const char*>(lines);
  }
};

// Rows of an array of the caller that are read in place.
struct InPlace {
  const Axis &rows, &columns;
  const Tensor& tensor;
  int64_t element_size;
  bool all_channels;  // are read by a task

  int64_t ColumnBytes() const { return columns.read_step * tensor.column * element_size; }
  const char* Row(const AxisTap& tap, int64_t t, const char* image) const {
    const int64_t row = (t + tap.offset) * rows.read_step + rows.phases[tap.phase];
    return image + row * tensor.row * element_size;
  }
  // What to fetch from below the rows that are read now, before `next` more of each phase are. Where tiles
  // share a row, only the tile's part of one row lies side by side; of a chunk of channels nothing does.
  // Of a single row, what comes next lies in it.
  Ahead Next(const std::vector<const char*>& read, const char* image, int64_t start, int64_t tiles,
             int64_t next) const {
    if (read.empty() || !all_channels) return {};
    const int64_t row_bytes = tensor.row * element_size;
    const char* const first = image + start * ColumnBytes();
    if (rows.read_size == 1) return {first + kAheadBytes, row_bytes >= 4 * kAheadBytes};
    const int64_t lowest = (*std::max_element(read.begin(), read.end()) - image) / row_bytes;
    const int64_t most = tiles == 1 ? next * rows.read_step : 1;
    return {first + (lowest + 1) * row_bytes, std::min(most, rows.read_size - 1 - lowest)};
  }
  // Bytes from a row's start to what `tap` reads for column `start`.
  int64_t Read(const AxisTap& tap, int64_t start) const {
    const int64_t column = (start + tap.offset) * columns.read_step + columns.phases[tap.phase];
    return column * tensor.column * element_size;
  }
};

// Lists the taps of a row of the filter for a tile of columns, those of a phase in the order of what they
// read: in a ring, what is read of one phase lies side by side. False if they are what the thread has.
bool BeginTile(Scratch& scratch, int64_t tile, const Ring& ring, const InPlace* in_place) {
  if (std::exchange(scratch.tile, tile) == tile) return false;
  const Axis& columns = ring.columns;
  const int64_t start = tile * ring.tile, period = in_place ? 1 : columns.period;
  scratch.taps.clear();
  scratch.starts.assign(1, 0);
  for (int64_t phase = 0; phase < columns.WrittenPhases(); ++phase) {
    const ffi::Span<const AxisTap> taps = columns.Taps(phase);
    const int64_t count = taps.size();
    for (int64_t first = 0; first < std::min(period, count); ++first) {
      for (int64_t i = first; i < count; i += period) {
        const AxisTap& tap = taps[columns.falls ? count - 1 - i : i];
        if (!ring.Meets(tap, start)) continue;
        const int64_t read = in_place ? in_place->Read(tap, start) : ring.Read(tap, start);
        scratch.taps.push_back({read, tap.k, tap.begin - start, tap.end - start});
      }
    }
    scratch.starts.push_back(scratch.taps.size());
  }
  return true;
}

// Whether an array has lines that can be written in place or, as they are computed with, also read.
bool HasLines(const Kernels& kernels, const Tensor& tensor, int64_t channels, int64_t multiplier) {
  return multiplier == 1 && tensor.depth == 1 && channels >= kernels.lanes;
}
bool IsLines(const Kernels& kernels, const Tensor& tensor, int64_t channels, int64_t multiplier) {
  return HasLines(kernels, tensor, channels, multiplier) && kernels.element_size * kernels.lanes == 64;
}

// Blocks of channels for each task, of even size.
int64_t BlocksPerTask(int64_t blocks, int64_t block_lines, int64_t most) {
  const int64_t fitting = std::max<int64_t>(kRingBytes / 64 / block_lines, 1);
  return CeilDiv(blocks, CeilDiv(blocks, std::min(fitting, most)));
}

// ---------------------------------------------------------------------------------------------------
// The forward op and the input gradient.

void Convolve(ffi::ThreadPool& pool, const Kernels& kernels, const Sizes& sizes, const Axis& rows,
              const Axis& columns, const Tensor& in, int64_t in_multiplier, const Tensor& filter,
              const Tensor& out, int64_t out_multiplier) {
  const ChannelMoves& moves = *kernels.channel_moves;
  const int64_t lanes = kernels.lanes, element = kernels.element_size, together = kernels.channel_lanes->rows;
  const int64_t kernel = sizes.kernel_rows * sizes.kernel_columns;
  const bool in_place = IsLines(kernels, in, sizes.channels, in_multiplier) && kernel <= kInPlaceTaps;
  const bool out_in_place = HasLines(kernels, out, sizes.channels, out_multiplier);
  const Ring ring(kernels, rows, columns, in, in_multiplier, columns.Count());
  const int64_t blocks = CeilDiv(sizes.channels, lanes);
  const int64_t weight_plane = Odd(kernel), buffer_plane = Odd(ring.tile);
  const int64_t buffer_lines = together * out_multiplier * buffer_plane;
  const int64_t block_lines = (in_place ? 0 : ring.block) + sizes.multiplier * weight_plane +
                              (out_in_place ? 0 : buffer_lines);
  const int64_t task_blocks = BlocksPerTask(blocks, block_lines, blocks);
  const int64_t chunks = CeilDiv(blocks, task_blocks), tiles = ring.Tiles();
  const InPlace reader{rows, columns, in, element, chunks == 1};

  const int64_t out_rows = rows.Count();
  const int64_t work = sizes.problems * sizes.batch * blocks * sizes.multiplier * out_rows *
                       columns.Count() * (rows.taps.size() * columns.TapCount(0) + 4);
  const int64_t threads = work < kSmall ? 1 : pool.num_threads();
  // Bands of rows pack the rows that they share twice.
  const int64_t whole = sizes.problems * sizes.batch * chunks * tiles;
  const int64_t turns = CeilDiv(out_rows, together);
  const int64_t most_bands = threads == 1 ? 1 : std::min(turns, CeilDiv(out_rows, rows.Span() + 1));
  const int64_t bands = std::clamp<int64_t>(CeilDiv(4 * threads, whole), 1, most_bands);

  const int64_t weight_lines = task_blocks * sizes.multiplier * weight_plane;
  const int64_t ring_lines = in_place ? 0 : task_blocks * ring.block;
  const int64_t lines =
      weight_lines + ring_lines + (out_in_place ? 1 : task_blocks) * buffer_lines;

  PreferHugePages(out.data, sizes.problems * sizes.batch * out.image * element);
  ParallelFor(pool, threads, whole * bands, lines, [&](Scratch& scratch, int64_t task) {
    // The weights of a chunk of channels are packed once for all images that a thread takes.
    const int64_t band = task % bands, tile = task / bands % tiles;
    const int64_t image_of_chunk = task / bands / tiles;
    const int64_t chunk = image_of_chunk / sizes.batch % chunks;
    const int64_t problem = image_of_chunk / sizes.batch / chunks;
    const int64_t image = problem * sizes.batch + image_of_chunk % sizes.batch;
    Line* const weights = scratch.Lines(lines);
    Line* const ring_start = weights + weight_lines;
    Line* const buffer = ring_start + ring_lines;

    const int64_t first_channel = chunk * task_blocks * lanes;
    const int64_t channels = std::min(task_blocks * lanes, sizes.channels - first_channel);
    const int64_t chunk_blocks = CeilDiv(channels, lanes);
    // Blocks of whole lines, of which the input or the output is in place. The channels that are left
    // are packed or, in place, done together with some before them.
    const int64_t whole_blocks = in_place || out_in_place ? channels / lanes : 0;
    const int64_t rest = in_place ? channels - lanes : whole_blocks * lanes;
    const auto pack_weights = [&](int64_t block, int64_t channel, int64_t count) {
      if (count == 0) return;
      const int64_t zero = 0, first = first_channel + channel;
      moves.pack({filter.data + (problem * filter.problem + first * sizes.multiplier) * element,
                  weights + block * sizes.multiplier * weight_plane, weight_plane, count,
                  sizes.multiplier, sizes.channels * sizes.multiplier, 1},
                 {&zero, 1, 1, 0, kernel, kernel});
    };
    if (scratch.filter != problem * chunks + chunk) {
      scratch.filter = problem * chunks + chunk;
      pack_weights(0, 0, whole_blocks * lanes);
      if (whole_blocks < chunk_blocks) pack_weights(whole_blocks, rest, channels - rest);
    }
    ring.Clear(scratch);
    const char* const in_image =
        in.data + (image * in.image + first_channel * in_multiplier * in.depth) * element;
    char* const out_image =
        out.data + (image * out.image + first_channel * out_multiplier * out.depth) * element;
    const int64_t start = tile * ring.tile;
    BeginTile(scratch, tile, ring, in_place ? &reader : nullptr);

    // Bands start where a kernel's turn starts, so that each row is summed alike with any of them.
    const int64_t begin = band * turns / bands * together;
    const int64_t end = std::min((band + 1) * turns / bands * together, out_rows);
    for (int64_t t = begin; t < end; t += together) {
      for (int64_t row_phase = 0; row_phase < rows.WrittenPhases(); ++row_phase) {
        const int64_t out_row = t * rows.write_step + row_phase;
        if (out_row >= rows.write_size) break;
        const ffi::Span<const AxisTap> row_taps = rows.Taps(row_phase);
        const bool two = together == 2 && out_row + rows.write_step < rows.write_size;

        scratch.rows.clear();
        for (auto& row_weights : scratch.weights) row_weights.clear();
        const auto meet = [&](const AxisTap& tap, int64_t t, int64_t next_k) {
          if (!tap.Meets(t)) return;
          const char* const row =
              in_place ? reader.Row(tap, t, in_image)
                       : ring.Row(scratch, ring_start, tap, t, start, in_image, channels);
          for (int64_t m = 0; m < in_multiplier; ++m) {
            const Line* const first = weights + m * weight_plane;
            scratch.rows.push_back(row + m * ring.plane * sizeof(Line));
            scratch.weights[0].push_back(first + tap.k * sizes.kernel_columns);
            scratch.weights[1].push_back(first + next_k * sizes.kernel_columns);
          }
        };
        for (const AxisTap& tap : row_taps) {
          if (!two || tap.next < 0) meet(tap, t, tap.k);
        }
        const int64_t both_begin = scratch.rows.size();
        for (const AxisTap& tap : row_taps) {
          if (two && tap.next >= 0) meet(tap, t, rows.taps[tap.next].k);
        }
        const int64_t both_end = scratch.rows.size();
        for (const AxisTap& tap : row_taps) {
          if (two && !tap.is_next) meet(tap, t + 1, tap.k);
        }
        const int64_t row_count = scratch.rows.size();
        const Ahead ahead =
            in_place ? reader.Next(scratch.rows, in_image, start, tiles, together) : Ahead{};

        const auto move = [&](int64_t row_bytes, int64_t weight_lines) {
          for (const char*& row : scratch.rows) row += row_bytes;
          for (auto& row_weights : scratch.weights) {
            for (const Line*& row : row_weights) row += weight_lines;
          }
        };
        for (int64_t phase = 0; phase < columns.WrittenPhases(); ++phase) {
          const int64_t count = columns.Count(phase, start + ring.tile) - start;
          if (count <= 0) break;
          const int64_t column = start * columns.write_step + phase;
          char* const to = out_image + (out_row * out.row + column * out.column) * element;
          const int64_t next_row = rows.write_step * out.row * element;
          const int64_t out_step = columns.write_step * out.column;

          const int64_t line = sizeof(Line);

          const auto convolve = [&](int64_t block, int64_t end, int64_t channel, bool out_in_place) {
            if (block == end) return;
            const int64_t skipped = in_place ? channel * element : block * ring.BlockBytes();
            const int64_t skipped_weights = block * sizes.multiplier * weight_plane;
            move(skipped, skipped_weights);
            Convolution conv{{scratch.rows.data(), row_count,
                              in_place ? reader.ColumnBytes() : line,
                              in_place ? in.column * element : line,
                              in_place ? line : ring.BlockBytes(), !in_place,
                              phase == 0 && channel == 0 ? ahead : Ahead{}},
                             {scratch.weights[0].data(), scratch.weights[1].data()},
                             both_begin,
                             both_end,
                             scratch.taps.data() + scratch.starts[phase],
                             scratch.starts[phase + 1] - scratch.starts[phase],
                             count,
                             {},
                             out_in_place ? out_step * element : line,
                             out_in_place && lanes * element < line ? moves.store : nullptr,
                             end - block,
                             sizes.multiplier * weight_plane,
                             out_in_place ? lanes * element : out_multiplier * buffer_plane * line};
            char* const result = to + channel * out_multiplier * out.depth * element;
            for (int64_t m = 0; m < out_multiplier; ++m) {
              for (int i = 0; i <= two; ++i) {
                Line* const lines = buffer + (i * conv.blocks * out_multiplier + m) * buffer_plane;
                conv.out[i] = out_in_place ? result + i * next_row : reinterpret_cast<char*>(lines);
              }
              kernels.channel_lanes->convolve(conv);
              conv.in.ahead = {};
              move(0, weight_plane);
            }
            move(-skipped, -skipped_weights - out_multiplier * weight_plane);
            for (int i = 0; i <= two && !out_in_place; ++i) {
              moves.emit({result + i * next_row,
                          buffer + i * conv.blocks * out_multiplier * buffer_plane, buffer_plane,
                          std::min(channels - channel, conv.blocks * lanes), out_multiplier,
                          out_step, out.depth},
                         count);
            }
          };
          convolve(0, whole_blocks, 0, out_in_place);
          convolve(whole_blocks, chunk_blocks, rest, in_place && out_in_place);
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------
// The filter gradient.

void Correlate(ffi::ThreadPool& pool, const Kernels& kernels, const Sizes& sizes, const Axis& rows,
               const Axis& columns, const Tensor& in, const Tensor& dy, const Tensor& out) {
  const ChannelMoves& moves = *kernels.channel_moves;
  const int64_t lanes = kernels.lanes, element = kernels.element_size, m_count = sizes.multiplier;
  const bool in_place = IsLines(kernels, in, sizes.channels, 1);
  const bool dy_in_place = IsLines(kernels, dy, sizes.channels, m_count);
  const Ring ring(kernels, rows, columns, in, 1, kReductionColumns);
  const int64_t kernel = sizes.kernel_rows * sizes.kernel_columns, sum_plane = Odd(kernel);
  const int64_t dy_plane = Odd(ring.tile), tiles = ring.Tiles();
  const int64_t blocks = CeilDiv(sizes.channels, lanes);
  const int64_t block_lines = (in_place ? 0 : ring.block) +
                              m_count * ((dy_in_place ? 0 : dy_plane) + sum_plane);

  // Fixed by the shapes alone, as is the order of all sums.
  const int64_t dy_rows = rows.Count(), all_rows = sizes.batch * dy_rows;
  const int64_t row_parts = std::max<int64_t>(CeilDiv(all_rows, 4 * (rows.Span() + 1)), 1);
  const int64_t most_blocks =
      HasLines(kernels, in, sizes.channels, 1) && HasLines(kernels, dy, sizes.channels, m_count)
          ? std::max(blocks / CeilDiv(kReductionTasks, sizes.problems * row_parts), 2 * kReductionBlocks)
          : kReductionBlocks;
  const int64_t task_blocks = BlocksPerTask(blocks, block_lines, most_blocks);
  const int64_t chunks = CeilDiv(blocks, task_blocks);
  const InPlace reader{rows, columns, in, element, chunks == 1};
  const int64_t sum_lines = sizes.problems * blocks * m_count * sum_plane;  // of one part
  const int64_t most_parts = std::max<int64_t>(1, kReductionBytes / 64 / sum_lines);
  const int64_t wanted = CeilDiv(kReductionTasks, sizes.problems * chunks);
  const int64_t parts = std::min({wanted, most_parts, row_parts});
  const std::unique_ptr<Line[]> memory(new Line[parts * sum_lines]);
  Line* const sums = memory.get();

  const int64_t ring_lines = in_place ? 0 : task_blocks * ring.block;
  const int64_t dy_lines = in_place && dy_in_place ? 0 : task_blocks * m_count * dy_plane;
  const int64_t task_sum_lines = task_blocks * m_count * sum_plane;
  const int64_t lines = ring_lines + dy_lines + task_sum_lines;
  const int64_t work = sum_lines * all_rows * columns.Count();
  const int64_t threads = work < kSmall ? 1 : pool.num_threads();
  const int64_t tasks = sizes.problems * chunks;
  const int64_t adders = parts * sum_lines < kSmall ? 1 : threads;

  ParallelFor(
      pool, threads, tasks * parts, lines, [&](Scratch& scratch, int64_t task) {
        const int64_t chunk = task % chunks, part = task / chunks % parts;
        const int64_t problem = task / chunks / parts;
        Line* const ring_start = scratch.Lines(lines);
        Line* const packed_dy = ring_start + ring_lines;
        Line* const sum = packed_dy + dy_lines;
        const int64_t first_channel = chunk * task_blocks * lanes;
        const int64_t channels = std::min(task_blocks * lanes, sizes.channels - first_channel);
        const int64_t chunk_blocks = CeilDiv(channels, lanes);
        // Blocks of whole lines, of which the input or dy is in place. The channels that are left are
        // packed or, where the input is in place, done together with some before them.
        const int64_t whole_blocks = in_place || dy_in_place ? channels / lanes : 0;
        const int64_t rest = in_place ? channels - lanes : whole_blocks * lanes;
        Line* const total = sums + part * sum_lines +
                            (problem * blocks + chunk * task_blocks) * m_count * sum_plane;
        const int64_t count_of_sums = chunk_blocks * m_count * sum_plane;
        std::fill_n(sum, count_of_sums, Line{});
        std::fill_n(total, count_of_sums, Line{});

        int64_t rows_summed = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t start = tile * ring.tile;
          const int64_t count = columns.Count(0, start + ring.tile) - start;
          if (BeginTile(scratch, tile, ring, in_place ? &reader : nullptr)) {
            for (Tap& tap : scratch.taps) {
              tap.begin = std::clamp<int64_t>(tap.begin, 0, count);
              tap.end = std::clamp(tap.end, tap.begin, count);
            }
          }
          int64_t held_image = -1;
          for (int64_t i = part * all_rows / parts; i < (part + 1) * all_rows / parts; ++i) {
            const int64_t image = problem * sizes.batch + i / rows.Count(), t = i % rows.Count();
            if (image != held_image) {
              held_image = image;
              ring.Clear(scratch);
            }
            const char* const in_image =
                in.data + (image * in.image + first_channel * in.depth) * element;
            const char* const dy_row =
                dy.data + (image * dy.image + t * dy.row + start * dy.column +
                           first_channel * m_count * dy.depth) *
                              element;
            scratch.rows.clear();
            scratch.sums.clear();
            for (const AxisTap& tap : rows.taps) {
              if (!tap.Meets(t)) continue;
              scratch.rows.push_back(
                  in_place ? reader.Row(tap, t, in_image)
                           : ring.Row(scratch, ring_start, tap, t, start, in_image, channels));
              scratch.sums.push_back(sum + tap.k * sizes.kernel_columns);
            }
            if (scratch.sums.empty()) continue;
            const int64_t line = sizeof(Line), row_count = scratch.rows.size();
            // After a single row, that of the next image is read.
            const Ahead ahead = in_place && rows.read_size > 1
                                    ? reader.Next(scratch.rows, in_image, start, tiles, 1)
                                    : Ahead{};

            const auto correlate = [&](int64_t block, int64_t end, int64_t channel,
                                       bool dy_in_place) {
              if (block == end) return;
              const int64_t skipped = in_place ? channel * element : block * ring.BlockBytes();
              for (const char*& row : scratch.rows) row += skipped;
              for (Line*& row : scratch.sums) row += block * m_count * sum_plane;
              const char* const dy_start = dy_row + channel * m_count * dy.depth * element;
              if (!dy_in_place) {
                const int64_t zero = 0;
                moves.pack({const_cast<char*>(dy_start), packed_dy, dy_plane,
                            std::min(channels - channel, (end - block) * lanes), m_count,
                            dy.column, dy.depth, dy.row},
                           {&zero, 1, 1, 0, count, count});
              }
              for (int64_t m = 0; m < m_count; ++m) {
                const char* const dy_of_multiple =
                    dy_in_place ? dy_start
                                : reinterpret_cast<const char*>(packed_dy + m * dy_plane);
                kernels.channel_sums->correlate(
                    {{scratch.rows.data(), row_count, in_place ? reader.ColumnBytes() : line,
                      in_place ? in.column * element : line, in_place ? line : ring.BlockBytes(),
                      !in_place, m == 0 && channel == 0 ? ahead : Ahead{}},
                     {&dy_of_multiple, 1,
                      dy_in_place ? dy.column * element : line,
                      dy_in_place ? dy.column * element : line,
                      dy_in_place ? line : m_count * dy_plane * line, !dy_in_place,
                      {dy_start + dy.row * element,
                       dy_in_place && chunks == 1 && channel == 0 && t + 1 < dy_rows}},
                     scratch.sums.data(), scratch.taps.data(), scratch.starts[1], count, end - block,
                     m_count * sum_plane});
                for (Line*& row : scratch.sums) row += sum_plane;
              }
              for (Line*& row : scratch.sums) row -= (block + 1) * m_count * sum_plane;
              for (const char*& row : scratch.rows) row -= skipped;
            };
            correlate(0, whole_blocks, 0, dy_in_place);
            correlate(whole_blocks, chunk_blocks, rest, in_place && dy_in_place);
            if (++rows_summed % kReductionRows == 0) {
              moves.add(total, sum, count_of_sums);
              std::fill_n(sum, count_of_sums, Line{});
            }
          }
        }
        moves.add(total, sum, count_of_sums);
      });
  ParallelFor(pool, adders, tasks, 1, [&](Scratch&, int64_t task) {
    const int64_t chunk = task % chunks, problem = task / chunks;
    const int64_t first_channel = chunk * task_blocks * lanes;
    const int64_t channels = std::min(task_blocks * lanes, sizes.channels - first_channel);
    Line* const sum = sums + (problem * blocks + chunk * task_blocks) * m_count * sum_plane;
    const int64_t count = CeilDiv(channels, lanes) * m_count * sum_plane;
    for (int64_t step = 1; step < parts; step *= 2) {
      for (int64_t part = 0; part + step < parts; part += 2 * step) {
        moves.add(sum + part * sum_lines, sum + (part + step) * sum_lines, count);
      }
    }
    const int64_t whole_blocks = in_place ? channels / lanes : 0;
    const int64_t rest = in_place ? channels - lanes : 0;
    const auto emit = [&](int64_t block, int64_t channel, int64_t count) {
      if (count == 0) return;
      moves.emit({out.data + (problem * out.problem + (first_channel + channel) * m_count) * element,
                  sum + block * m_count * sum_plane, sum_plane, count, m_count,
                  sizes.channels * m_count, 1},
                 kernel);
    };
    emit(0, 0, whole_blocks * lanes);
    if (whole_blocks * lanes < channels) emit(whole_blocks, rest, channels - rest);
  });
}

// ---------------------------------------------------------------------------------------------------
// What XLA calls.

const Kernels* KernelsFor(ffi::DataType dtype) {
  Type type;
  switch (dtype) {
    case ffi::F16:
      type = Type::kFloat16;
      break;
    case ffi::BF16:
      type = Type::kBFloat16;
      break;
    case ffi::F32:
      type = Type::kFloat32;
      break;
    case ffi::F64:
      type = Type::kFloat64;
      break;
    default:
      return nullptr;
  }
#ifdef JAX_DWBP_X86
  // For tests, and to find out what an instruction set is worth.
  static const std::string most = [] {
    const char* value = std::getenv("JAX_DWBP_MAX_ISA");
    return std::string(value ? value : "");
  }();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && most != "avx2" && most != "baseline") return &Avx512Kernels(type);
  if (avx2 && most != "baseline") return &Avx2Kernels(type);
#endif
  return &BaselineKernels(type);
}

enum class Op { kForward, kInputGrad, kFilterGrad };

std::optional<Op> OpOf(std::string_view name) {
  if (name == "forward") return Op::kForward;
  if (name == "input_grad") return Op::kInputGrad;
  if (name == "filter_grad") return Op::kFilterGrad;
  return std::nullopt;
}

// The sizes of the three arrays, with an axis of problems, be it one of size 1.
struct Shapes {
  int64_t x[5] = {1}, f[5] = {1}, y[5] = {1};
};

// Of each of these what is wrong, or null. Nothing below looks at it again.
const char* WrongWindow(ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                        ffi::Span<const int64_t> rhs_dilation) {
  const auto positive = [](ffi::Span<const int64_t> values) {
    return values.size() == 2 && values[0] >= 1 && values[1] >= 1;
  };
  if (!positive(window_strides)) return "`window_strides` must be two positive integers";
  if (low.size() != 2) return "`low` must be two integers";
  if (!positive(rhs_dilation)) return "`rhs_dilation` must be two positive integers";
  return nullptr;
}

const char* WrongArrays(const ffi::AnyBuffer& x, const ffi::AnyBuffer& f, const ffi::AnyBuffer& y) {
  const size_t rank = x.dimensions().size(), filter_rank = f.dimensions().size();
  if (f.element_type() != x.element_type() || y.element_type() != x.element_type()) {
    return "x, f and y must be of one dtype";
  }
  if (rank < 4 || rank > 5) return "x must have 4 or 5 dimensions";
  if (y.dimensions().size() != rank) return "y must have as many dimensions as x";
  if (filter_rank < 4 || filter_rank > rank) return "f must have 4 dimensions or those of x";
  for (const ffi::AnyBuffer* array : {&x, &f, &y}) {
    if (array->element_count() == 0) return "no array may be empty";
  }
  return nullptr;
}

const char* WrongShapes(const Shapes& shapes, bool shared_filter, bool channels_first) {
  const auto& [x, f, y] = shapes;
  const int depth = channels_first ? 2 : 4;
  if (y[0] != x[0]) return "y must have the problems of x";
  if (!shared_filter && f[0] != x[0]) return "f must have the problems of x";
  if (y[1] != x[1]) return "y must have the batch size of x";
  if (f[3] != x[depth]) return "f must have the channels of x";
  if (y[depth] != f[3] * f[4]) return "y must have the channels of x times the multiplier of f";
  return nullptr;
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
               ffi::Result<ffi::AnyBuffer> result, std::string_view op_name,
               ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
               ffi::Span<const int64_t> rhs_dilation, bool channels_first) try {
  const std::optional<Op> op = OpOf(op_name);
  if (!op) return ffi::Error::InvalidArgument("`op` must be forward, input_grad or filter_grad");
  const ffi::AnyBuffer &x = op == Op::kInputGrad ? *result : a;
  const ffi::AnyBuffer &f = op == Op::kForward ? b : op == Op::kInputGrad ? a : *result;
  const ffi::AnyBuffer &y = op == Op::kForward ? *result : b;
  const Kernels* kernels = KernelsFor(x.element_type());
  if (!kernels) return ffi::Error::InvalidArgument("x must be of float16, bfloat16, float32 or float64");
  const char* wrong = WrongWindow(window_strides, low, rhs_dilation);
  if (!wrong) wrong = WrongArrays(x, f, y);
  if (wrong) return ffi::Error::InvalidArgument(wrong);

  Shapes shapes;
  auto& [xs, fs, ys] = shapes;
  const auto copy = [](const ffi::AnyBuffer& from, int64_t* to) {
    std::copy_backward(from.dimensions().begin(), from.dimensions().end(), to + 5);
  };
  copy(x, xs), copy(f, fs), copy(y, ys);
  const bool shared_filter = f.dimensions().size() < x.dimensions().size();
  if ((wrong = WrongShapes(shapes, shared_filter, channels_first))) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (shared_filter) {
    // All problems are one.
    for (int64_t* shape : {xs, ys}) shape[1] *= std::exchange(shape[0], 1);
  }
  const int height = channels_first ? 3 : 2;
  const Sizes sizes{xs[0], xs[1], fs[3], fs[4], fs[1], fs[2]};
  const Tensor xt(x.untyped_data(), xs, channels_first), yt(y.untyped_data(), ys, channels_first);
  const Tensor ft(f.untyped_data(), fs, false);
  const bool is_transposed = *op == Op::kInputGrad;
  const auto row_axis = [&](int i) {
    const int64_t kernel = fs[1 + i], dilation = kernel == 1 ? 1 : rhs_dilation[i];
    const int64_t x_size = xs[height + i], y_size = ys[height + i];
    const int64_t stride = window_strides[i], last = dilation * (kernel - 1);
    if (!is_transposed) return RowAxis(x_size, y_size, kernel, dilation, -low[i], stride, false);
    return RowAxis(y_size, x_size, kernel, dilation, low[i] - last, stride, true);
  };
  const RowCall call{*kernels, sizes, channels_first, is_transposed, row_axis(0), row_axis(1),
                     is_transposed ? yt : xt, ft, is_transposed ? xt : yt};
  const bool is_filter_grad = *op == Op::kFilterGrad;
  if (PrefersRows(call, is_filter_grad)) {
    (is_filter_grad ? CorrelateRows : ConvolveRows)(pool, call);
    return ffi::Error::Success();
  }
  Axis axes[2];
  for (int i = 0; i < 2; ++i) {
    const Window window{fs[1 + i], window_strides[i], low[i], rhs_dilation[i]};
    axes[i] = (op == Op::kInputGrad ? TransposedAxis : ForwardAxis)(xs[height + i], ys[height + i], window);
  }
  switch (*op) {
    case Op::kForward:
      Convolve(pool, *kernels, sizes, axes[0], axes[1], xt, 1, ft, yt, sizes.multiplier);
      break;
    case Op::kInputGrad:
      Convolve(pool, *kernels, sizes, axes[0], axes[1], yt, sizes.multiplier, ft, xt, 1);
      break;
    case Op::kFilterGrad:
      Correlate(pool, *kernels, sizes, axes[0], axes[1], xt, yt, ft);
      break;
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  // A text that is short enough to take no memory.
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
} catch (const std::exception& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, error.what());
}

}  // namespace
}  // namespace jax_dwbp

// Of the headers. A jaxlib with an older one refuses the handler.
extern "C" __attribute__((visibility("default"))) const int jax_dwbp_ffi_version[] = {
    XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* jax_dwbp_depthwise_conv2d(
    XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_dwbp_depthwise_conv2d, jax_dwbp::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("op")
                                  .Attr<xla::ffi::Span<const int64_t>>("window_strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("low")
                                  .Attr<xla::ffi::Span<const int64_t>>("rhs_dilation")
                                  .Attr<bool>("channels_first"));
