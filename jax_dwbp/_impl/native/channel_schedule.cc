// The forward op and the input gradient by channels.
//
// Both are sums of what taps read (channel_axis.h). A task takes a band of rows of one image, or one
// tile of long rows, and as many channels as have their packed rows in the cache (channel_ring.h). It
// packs the weights of these channels, then writes one or two rows of the result at a time, a phase of
// columns after the other. The vector code (kernels.h) sees dense sums.

#include "channel_schedule.h"

#include "channel_ring.h"

namespace jax_dwbp {
namespace {

// How a result is cut to tasks. Bands of rows pack the rows that they share twice.
struct ChannelPlan {
  const ChannelCall& call;
  ReadPlan read;
  bool out_in_place;
  int64_t together;             // rows of the result that are computed at a time
  int64_t task_blocks, chunks;  // of channels
  bool fetches_ahead;           // what is read next, which lies side by side
  int64_t threads;
  int64_t slices;                      // of all images
  int64_t turns, bands;                // of rows
  int64_t weight_plane, buffer_plane;  // lines from one multiple to the next
  int64_t weight_lines, ring_lines, lines;

  ChannelPlan(const ChannelCall& call, const ffi::ThreadPool& pool)
      : call(call),
        read(call,
             call.sizes.SliceTaps() <= kInPlaceTaps && IsLines(call, call.in, call.InMultiplier()),
             call.columns.Count()),
        out_in_place(HasLines(call, call.out, call.OutMultiplier())),
        together(call.kernels.channel_lanes->rows),
        slices(call.sizes.problems * call.sizes.batch * call.depth.out),
        weight_plane(Odd(call.Taps())),
        buffer_plane(Odd(read.tile)) {
    const Axis &rows = call.rows, &columns = call.columns;
    const int64_t blocks = call.Blocks(), multiplier = call.sizes.multiplier;
    const int64_t buffer_lines = together * call.OutMultiplier() * buffer_plane;
    const int64_t block_lines =
        read.BlockLines() + multiplier * weight_plane + (out_in_place ? 0 : buffer_lines);
    task_blocks = BlocksPerTask(blocks, block_lines, blocks);
    chunks = CeilDiv(blocks, task_blocks);
    fetches_ahead = read.in_place && chunks == 1;

    const int64_t out_rows = rows.Count();
    const int64_t work = slices * blocks * multiplier * out_rows * columns.Count() *
                         (read.slices * rows.taps.size() * columns.TapCount(0) + 4);
    threads = work < kSmall ? 1 : pool.num_threads();
    turns = CeilDiv(out_rows, together);
    const int64_t most_bands = threads == 1 ? 1 : std::min(turns, CeilDiv(out_rows, rows.Span() + 1));
    bands = std::clamp<int64_t>(CeilDiv(4 * threads, slices * chunks * read.tiles), 1, most_bands);

    weight_lines = task_blocks * multiplier * weight_plane;
    ring_lines = task_blocks * read.BlockLines();
    lines = weight_lines + ring_lines + (out_in_place ? 1 : task_blocks) * buffer_lines;
  }

  int64_t Tasks() const { return slices * chunks * read.tiles * bands; }
};

// What a task is of. The chunks of a problem follow one another, and for each of them its images, slice
// by slice: its weights are packed once for all images that a thread takes.
struct TaskPlace {
  int64_t band, tile, slice, image, chunk, problem;

  TaskPlace(const ChannelPlan& plan, int64_t task) {
    const int64_t batch = plan.call.sizes.batch, slices = plan.call.depth.out;
    band = task % plan.bands, task /= plan.bands;
    tile = task % plan.read.tiles, task /= plan.read.tiles;
    slice = task % slices, task /= slices;
    const int64_t image_of_problem = task % batch;
    chunk = task / batch % plan.chunks;
    problem = task / batch / plan.chunks;
    image = problem * batch + image_of_problem;
  }
};

// The rows of the result that are computed at a time, of one phase, and what of the rows that are
// listed in scratch both of them read.
struct OutRows {
  int64_t first;
  bool two;
  int64_t both_begin, both_end;
  Ahead ahead;
};

// Columns of one phase of them, in the tile.
struct OutColumns {
  int64_t phase, count;
  char* out;  // the first of them, of the first row
};

struct ConvolveTask {
  const ChannelPlan& plan;
  const ChannelCall& call;
  Scratch& scratch;
  TaskPlace place;
  Chunk chunk;
  Line *weights, *buffer;
  Reader reader;
  char* out;  // the slice of the image, from the first channel of the chunk on

  ConvolveTask(const ChannelPlan& plan, Scratch& scratch, int64_t task)
      : plan(plan),
        call(plan.call),
        scratch(scratch),
        place(plan, task),
        chunk(call, place.chunk * plan.task_blocks, plan.task_blocks, plan.read.in_place,
              plan.read.in_place || plan.out_in_place),
        weights(scratch.Lines(plan.lines)),
        buffer(weights + plan.weight_lines + plan.ring_lines),
        reader{.plan = plan.read,
               .scratch = scratch,
               .ring = weights + plan.weight_lines,
               .channels = chunk.channels} {
    const Tensor& to = call.out;
    const int64_t channel = chunk.first_channel * call.OutMultiplier() * to.channel;
    out = to.data +
          (place.image * to.image + place.slice * to.slice + channel) * call.kernels.element_size;
  }

  void Run() {
    PackWeights();
    const Tensor& in = call.in;
    const int64_t channel = chunk.first_channel * call.InMultiplier() * in.channel;
    reader.BeginSlice(in.data + (place.image * in.image + channel) * call.kernels.element_size,
                      place.slice);
    reader.BeginTile(place.tile);
    // Bands start where a kernel's turn starts, so that each row is summed alike with any of them.
    const int64_t begin = place.band * plan.turns / plan.bands * plan.together;
    const int64_t end =
        std::min((place.band + 1) * plan.turns / plan.bands * plan.together, call.rows.Count());
    for (int64_t t = begin; t < end; t += plan.together) {
      for (int64_t phase = 0; phase < call.rows.WrittenPhases(); ++phase) {
        if (t * call.rows.write_step + phase >= call.rows.write_size) break;
        WriteRows(ListRows(t, phase));
      }
    }
  }

 private:
  void PackWeights() {
    const int64_t filter = place.problem * plan.chunks + place.chunk;
    if (std::exchange(scratch.filter, filter) == filter) return;
    const int64_t multiplier = call.sizes.multiplier, taps = call.Taps();
    for (const Blocks& blocks : chunk.parts) {
      if (blocks.Count() == 0) continue;
      const int64_t first = (chunk.first_channel + blocks.channel) * multiplier;
      const int64_t element = place.problem * call.filter.problem + first;
      call.kernels.channel_moves->pack(
          {.data = call.filter.data + element * call.kernels.element_size,
           .lines = weights + blocks.begin * multiplier * plan.weight_plane,
           .plane = plan.weight_plane,
           .channels = blocks.channels,
           .multiplier = multiplier,
           .column_step = call.sizes.channels * multiplier,
           .channel_step = 1},
          {.width = taps, .size = taps});
    }
  }

  // Lists what `tap` reads to write row t, of the i-th of the slices that are read, and its weights.
  // Where a second row reads the same, `next_k` has the weights of that.
  void List(int64_t i, const AxisTap& tap, int64_t t, int64_t next_k) {
    if (!tap.Meets(t)) return;
    const char* const row = reader.Row(i, tap, t);
    const Line* first = weights + scratch.met[i].k * call.sizes.SliceTaps();
    for (int64_t m = 0; m < plan.read.multiplier; ++m, first += plan.weight_plane) {
      scratch.rows.push_back(row + m * plan.read.plane * sizeof(Line));
      scratch.weights[0].push_back(first + tap.k * call.sizes.kernel_columns);
      scratch.weights[1].push_back(first + next_k * call.sizes.kernel_columns);
    }
  }

  // Lists what is read to write rows t and t + 1 of a phase, in the order of Convolution.
  OutRows ListRows(int64_t t, int64_t phase) {
    const Axis& rows = call.rows;
    const std::span<const AxisTap> taps = rows.Taps(phase);
    const int64_t out_row = t * rows.write_step + phase;
    const bool two = plan.together == 2 && out_row + rows.write_step < rows.write_size;
    const int64_t slices = scratch.met.size();
    scratch.rows.clear();
    for (auto& row_weights : scratch.weights) row_weights.clear();
    for (int64_t i = 0; i < slices; ++i) {
      for (const AxisTap& tap : taps) {
        if (!two || tap.next < 0) List(i, tap, t, tap.k);
      }
    }
    const int64_t both_begin = scratch.rows.size();
    for (int64_t i = 0; i < slices; ++i) {
      for (const AxisTap& tap : taps) {
        if (two && tap.next >= 0) List(i, tap, t, rows.taps[tap.next].k);
      }
    }
    const int64_t both_end = scratch.rows.size();
    for (int64_t i = 0; i < slices; ++i) {
      for (const AxisTap& tap : taps) {
        if (two && !tap.is_next) List(i, tap, t + 1, tap.k);
      }
    }
    return {.first = out_row,
            .two = two,
            .both_begin = both_begin,
            .both_end = both_end,
            .ahead = plan.fetches_ahead ? reader.Next(plan.together) : Ahead{}};
  }

  void WriteRows(const OutRows& rows) {
    const Axis& columns = call.columns;
    for (int64_t phase = 0; phase < columns.WrittenPhases(); ++phase) {
      const int64_t count = columns.Count(phase, reader.start + plan.read.tile) - reader.start;
      if (count <= 0) break;
      const int64_t column = reader.start * columns.write_step + phase;
      const int64_t element = rows.first * call.out.row + column * call.out.column;
      const OutColumns some{
          .phase = phase, .count = count, .out = out + element * call.kernels.element_size};
      for (const Blocks& blocks : chunk.parts) {
        if (blocks.Count() > 0) WriteBlocks(rows, some, blocks);
      }
    }
  }

  void WriteBlocks(const OutRows& rows, const OutColumns& columns, const Blocks& blocks) {
    const int64_t line = sizeof(Line), element = call.kernels.element_size;
    const int64_t line_values = call.kernels.lanes * element, multiplier = call.OutMultiplier();
    const int64_t out_step = call.columns.write_step * call.out.column;
    const int64_t next_row = call.rows.write_step * call.out.row * element;
    const bool in_place = plan.out_in_place && blocks.are_whole;
    const Ahead ahead = columns.phase == 0 && blocks.channel == 0 ? rows.ahead : Ahead{};
    const int64_t weight_lines = call.sizes.multiplier * plan.weight_plane;
    const int64_t first_tap = scratch.starts[columns.phase];
    Convolution conv{
        .in = reader.Rows(blocks, ahead),
        .weights = {scratch.weights[0].data(), scratch.weights[1].data()},
        .weight_start = blocks.begin * weight_lines,
        .both_begin = rows.both_begin,
        .both_end = rows.both_end,
        .taps = scratch.taps.data() + first_tap,
        .tap_count = scratch.starts[columns.phase + 1] - first_tap,
        .columns = columns.count,
        .column_bytes = in_place ? out_step * element : line,
        .store = in_place && line_values < line ? call.kernels.channel_moves->store : nullptr,
        .blocks = blocks.Count(),
        .weight_lines = weight_lines,
        .out_bytes = in_place ? line_values : multiplier * plan.buffer_plane * line};
    char* const result = columns.out + blocks.channel * multiplier * call.out.channel * element;
    const int64_t buffer_row = conv.blocks * multiplier * plan.buffer_plane;
    for (int64_t m = 0; m < multiplier; ++m) {
      for (int i = 0; i <= rows.two; ++i) {
        Line* const lines = buffer + i * buffer_row + m * plan.buffer_plane;
        conv.out[i] = in_place ? result + i * next_row : reinterpret_cast<char*>(lines);
      }
      const ChannelKernels& lanes = *call.kernels.channel_lanes;
      (plan.read.in_place ? lanes.convolve_in_place : lanes.convolve)(conv);
      conv.in.ahead = {};
      conv.weight_start += plan.weight_plane;
    }
    for (int i = 0; i <= rows.two && !in_place; ++i) {
      call.kernels.channel_moves->emit({.data = result + i * next_row,
                                        .lines = buffer + i * buffer_row,
                                        .plane = plan.buffer_plane,
                                        .channels = blocks.channels,
                                        .multiplier = multiplier,
                                        .column_step = out_step,
                                        .channel_step = call.out.channel},
                                       columns.count);
    }
  }
};

}  // namespace

void ConvolveChannels(ffi::ThreadPool& pool, const ChannelCall& call) {
  const ChannelPlan plan(call, pool);
  PreferHugePages(call.out.data, call.sizes.problems * call.out.problem * call.kernels.element_size);
  ParallelFor(pool, plan.threads, plan.Tasks(), plan.lines,
              [&](Scratch& scratch, int64_t task) { ConvolveTask(plan, scratch, task).Run(); });
}

}  // namespace jax_dwbp
