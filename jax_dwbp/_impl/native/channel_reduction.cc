// The filter gradient by channels.
//
// Each tap has a sum over all rows of all slices of all images. A task takes a part of the rows and a
// few blocks of channels. For each row of dy it lists the rows of the input that taps meet
// (channel_ring.h), and the vector code (kernels.h) adds up the products of both. The parts are added
// afterwards, pairwise.

#include "channel_ring.h"
#include "channel_schedule.h"

namespace jax_dwbp {
namespace {

// The filter gradient is reduced in parts, to have this many tasks, whatever the number of threads:
// the result may not depend on it. Their sums take at most so many bytes.
constexpr int64_t kReductionTasks = 32;
constexpr int64_t kReductionBytes = 4 << 20;
constexpr int64_t kReductionBlocks = 4;
// So many rows are added up before they join others.
constexpr int64_t kReductionRows = 32;

// Whether the input or dy is read in place: of a half type only where both are. In planes of one pixel
// channels lie side by side too, whatever the other planes are.
bool ReadsInPlace(const ChannelCall& call, bool is_dy) {
  const bool in = IsLines(call, call.in, 1), dy = IsLines(call, call.out, call.sizes.multiplier);
  return call.kernels.element_size == 2 ? in && dy : is_dy ? dy : in;
}

// How the work is cut. All but the threads is fixed by the shapes, as is the order of all sums.
struct ChannelSumPlan {
  const ChannelCall& call;
  ReadPlan read;
  bool dy_in_place;
  int64_t multiplier, blocks;
  int64_t sum_plane, dy_plane;     // lines from one multiple to the next
  int64_t dy_rows, rows;           // of a slice, and of all of a problem
  int64_t task_blocks, chunks;     // of channels
  bool fetches_ahead, fetches_dy;  // what is read next, which lies side by side
  int64_t part_lines, parts;       // of the rows: what the sums of one take, and how many
  int64_t ring_lines, dy_lines, lines;
  int64_t threads, adders;

  ChannelSumPlan(const ChannelCall& call, const ffi::ThreadPool& pool)
      : call(call),
        read(call, ReadsInPlace(call, false), kReductionColumns),
        dy_in_place(ReadsInPlace(call, true)),
        multiplier(call.sizes.multiplier),
        blocks(call.Blocks()),
        sum_plane(Odd(call.Taps())),
        dy_plane(Odd(read.tile)),
        dy_rows(call.rows.Count()),
        rows(call.sizes.batch * call.depth.out * dy_rows) {
    const int64_t problems = call.sizes.problems;
    const int64_t row_parts = std::max<int64_t>(CeilDiv(rows, 4 * (call.rows.Span() + 1)), 1);
    const bool have_lines = HasLines(call, call.in, 1) && HasLines(call, call.out, multiplier);
    const int64_t most_blocks =
        have_lines
            ? std::max(blocks / CeilDiv(kReductionTasks, problems * row_parts), 2 * kReductionBlocks)
            : kReductionBlocks;
    const int64_t block_lines =
        read.BlockLines() + multiplier * ((dy_in_place ? 0 : dy_plane) + sum_plane);
    task_blocks = BlocksPerTask(blocks, block_lines, most_blocks);
    chunks = CeilDiv(blocks, task_blocks);
    // After a single row, that of the next image is read.
    fetches_ahead = read.in_place && chunks == 1 && call.rows.read_size > 1;
    fetches_dy = dy_in_place && chunks == 1;

    part_lines = problems * blocks * multiplier * sum_plane;
    const int64_t most_parts = std::max<int64_t>(1, kReductionBytes / 64 / part_lines);
    parts = std::min({CeilDiv(kReductionTasks, problems * chunks), most_parts, row_parts});
    ring_lines = task_blocks * read.BlockLines();
    dy_lines = read.in_place && dy_in_place ? 0 : task_blocks * multiplier * dy_plane;
    lines = ring_lines + dy_lines + SumLines(task_blocks);
    const int64_t work = part_lines * rows * call.columns.Count();
    threads = work < kSmall ? 1 : pool.num_threads();
    adders = parts * part_lines < kSmall ? 1 : threads;
  }

  // A filter is a chunk of channels of one problem.
  int64_t Filters() const { return call.sizes.problems * chunks; }
  int64_t SumLines(int64_t block_count) const { return block_count * multiplier * sum_plane; }
  // Where the sums of a filter start in those of a part.
  int64_t FirstSum(int64_t filter) const {
    return SumLines(filter / chunks * blocks + filter % chunks * task_blocks);
  }
  Chunk ChunkOf(int64_t filter) const {
    return Chunk(call, filter % chunks * task_blocks, task_blocks, read.in_place,
                 read.in_place || dy_in_place);
  }
};

// Sums a part of the rows, of one filter.
struct SumTask {
  const ChannelSumPlan& plan;
  const ChannelCall& call;
  Scratch& scratch;
  int64_t filter, part, problem;
  Chunk chunk;
  Reader reader;
  const char* dy_slice = nullptr;  // from the first channel of the chunk and column of the tile on
  Line *packed_dy, *sum, *total;
  int64_t sum_lines;
  int64_t rows_summed = 0;
  int64_t columns = 0;  // of the tile

  SumTask(const ChannelSumPlan& plan, Scratch& scratch, int64_t task, Line* sums)
      : plan(plan),
        call(plan.call),
        scratch(scratch),
        filter(task / (plan.chunks * plan.parts) * plan.chunks + task % plan.chunks),
        part(task / plan.chunks % plan.parts),
        problem(filter / plan.chunks),
        chunk(plan.ChunkOf(filter)),
        reader{.plan = plan.read,
               .scratch = scratch,
               .ring = scratch.Lines(plan.lines),
               .channels = chunk.channels},
        packed_dy(reader.ring + plan.ring_lines),
        sum(packed_dy + plan.dy_lines),
        total(sums + part * plan.part_lines + plan.FirstSum(filter)),
        sum_lines(plan.SumLines(chunk.blocks)) {}

  void Run() {
    std::fill_n(sum, sum_lines, Line{});
    std::fill_n(total, sum_lines, Line{});
    for (int64_t tile = 0; tile < plan.read.tiles; ++tile) AddTile(tile);
    call.kernels.channel_moves->add(total, sum, sum_lines);
  }

 private:
  void AddTile(int64_t tile) {
    const bool is_new = reader.BeginTile(tile);
    columns = call.columns.Count(0, reader.start + plan.read.tile) - reader.start;
    if (is_new) {
      for (Tap& tap : scratch.taps) {
        tap.begin = std::clamp<int64_t>(tap.begin, 0, columns);
        tap.end = std::clamp(tap.end, tap.begin, columns);
      }
    }
    int64_t held_slice = -1;
    const int64_t end = (part + 1) * plan.rows / plan.parts;
    for (int64_t i = part * plan.rows / plan.parts; i < end; ++i) {
      const int64_t slice = i / plan.dy_rows;
      if (std::exchange(held_slice, slice) != slice) BeginSlice(slice);
      AddRow(i % plan.dy_rows);
    }
  }

  // What comes next is of that slice, of all that the problem has.
  void BeginSlice(int64_t slice) {
    const Tensor &in = call.in, &dy = call.out;
    const int64_t element = call.kernels.element_size, first = chunk.first_channel;
    const int64_t image = problem * call.sizes.batch + slice / call.depth.out;
    slice %= call.depth.out;
    reader.BeginSlice(in.data + (image * in.image + first * in.channel) * element, slice);
    dy_slice = dy.data + (image * dy.image + slice * dy.slice + reader.start * dy.column +
                          first * plan.multiplier * dy.channel) *
                             element;
  }

  // Adds what row t of dy gives.
  void AddRow(int64_t t) {
    const char* const dy_row = dy_slice + t * call.out.row * call.kernels.element_size;
    const int64_t slices = scratch.met.size();
    scratch.rows.clear();
    scratch.sums.clear();
    for (int64_t i = 0; i < slices; ++i) {
      Line* const first = sum + scratch.met[i].k * call.sizes.SliceTaps();
      for (const AxisTap& tap : call.rows.taps) {
        if (!tap.Meets(t)) continue;
        scratch.rows.push_back(reader.Row(i, tap, t));
        scratch.sums.push_back(first + tap.k * call.sizes.kernel_columns);
      }
    }
    if (scratch.sums.empty()) return;
    const Ahead ahead = plan.fetches_ahead ? reader.Next(1) : Ahead{};
    const bool is_last = t + 1 == plan.dy_rows;
    for (const Blocks& blocks : chunk.parts) {
      if (blocks.Count() > 0) AddBlocks(blocks, dy_row, ahead, is_last);
    }
    if (++rows_summed % kReductionRows == 0) {
      call.kernels.channel_moves->add(total, sum, sum_lines);
      std::fill_n(sum, sum_lines, Line{});
    }
  }

  void AddBlocks(const Blocks& blocks, const char* dy_row, const Ahead& ahead, bool is_last) {
    const Tensor& dy = call.out;
    const int64_t element = call.kernels.element_size, line = sizeof(Line);
    const bool in_place = plan.dy_in_place && blocks.are_whole, is_first = blocks.channel == 0;
    const char* from = dy_row + blocks.channel * plan.multiplier * dy.channel * element;
    const Ahead dy_ahead{.data = from + dy.row * element,
                         .rows = in_place && plan.fetches_dy && is_first && !is_last};
    if (!in_place) {
      call.kernels.channel_moves->pack({.data = const_cast<char*>(from),
                                        .lines = packed_dy,
                                        .plane = plan.dy_plane,
                                        .channels = blocks.channels,
                                        .multiplier = plan.multiplier,
                                        .column_step = dy.column,
                                        .channel_step = dy.channel,
                                        .ahead = dy.row},
                                       {.width = columns, .size = columns});
      from = reinterpret_cast<const char*>(packed_dy);
    }
    const int64_t dy_column = in_place ? dy.column * element : line;
    Correlation corr{.in = reader.Rows(blocks, is_first ? ahead : Ahead{}),
                     .dy = {.rows = &from,
                            .row_count = 1,
                            .start_bytes = 0,
                            .column_bytes = dy_column,
                            .line_bytes = dy_column,
                            .block_bytes = in_place ? call.kernels.lanes * element
                                                    : plan.multiplier * plan.dy_plane * line,
                            .packed = !in_place,
                            .ahead = dy_ahead},
                     .sums = scratch.sums.data(),
                     .sum_start = plan.SumLines(blocks.begin),
                     .taps = scratch.taps.data(),
                     .tap_count = scratch.starts[1],
                     .columns = columns,
                     .blocks = blocks.Count(),
                     .sum_lines = plan.SumLines(1)};
    for (int64_t m = 0; m < plan.multiplier; ++m) {
      const ChannelSums& sums = *call.kernels.channel_sums;
      (plan.read.in_place ? sums.correlate_in_place : sums.correlate)(corr);
      corr.in.ahead = {};
      corr.dy.start_bytes += plan.dy_plane * line;
      corr.sum_start += plan.sum_plane;
    }
  }
};

// Adds the parts of a filter's sums to the first of them, pairwise, and rounds these to the result.
void Join(const ChannelSumPlan& plan, int64_t filter, Line* sums) {
  const ChannelCall& call = plan.call;
  const Chunk chunk = plan.ChunkOf(filter);
  Line* const sum = sums + plan.FirstSum(filter);
  const int64_t count = plan.SumLines(chunk.blocks);
  for (int64_t step = 1; step < plan.parts; step *= 2) {
    for (int64_t part = 0; part + step < plan.parts; part += 2 * step) {
      call.kernels.channel_moves->add(sum + part * plan.part_lines,
                                      sum + (part + step) * plan.part_lines, count);
    }
  }
  for (const Blocks& blocks : chunk.parts) {
    if (blocks.Count() == 0) continue;
    const int64_t first = (chunk.first_channel + blocks.channel) * plan.multiplier;
    const int64_t element = filter / plan.chunks * call.filter.problem + first;
    call.kernels.channel_moves->emit({.data = call.filter.data + element * call.kernels.element_size,
                                      .lines = sum + plan.SumLines(blocks.begin),
                                      .plane = plan.sum_plane,
                                      .channels = blocks.channels,
                                      .multiplier = plan.multiplier,
                                      .column_step = call.sizes.channels * plan.multiplier,
                                      .channel_step = 1},
                                     call.Taps());
  }
}

}  // namespace

void CorrelateChannels(ffi::ThreadPool& pool, const ChannelCall& call) {
  const ChannelSumPlan plan(call, pool);
  const std::unique_ptr<Line[]> memory(new Line[plan.parts * plan.part_lines]);
  Line* const sums = memory.get();
  ParallelFor(pool, plan.threads, plan.Filters() * plan.parts, plan.lines,
              [&](Scratch& scratch, int64_t task) { SumTask(plan, scratch, task, sums).Run(); });
  ParallelFor(pool, plan.adders, plan.Filters(), 1,
              [&](Scratch&, int64_t filter) { Join(plan, filter, sums); });
}

}  // namespace jax_dwbp
