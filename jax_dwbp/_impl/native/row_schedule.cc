// The forward op and the input gradient by rows.
//
// A stride and a depth multiplier of 1 leave one sum for both: tap k of an axis reads first + t + dilation * k
// to write t. A task packs what a part of a plane reads, with zeros around it, and computes the part from
// that: so no tap looks where it is, half types are widened once, and what is behind a row never counts.

#include "row_schedule.h"

#include "row_lanes.h"

namespace jax_dwbp {
namespace {

int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Bytes that a thread may pack, for a part of the result that is as large as what the filter spans.
constexpr int64_t kMostBytes = 2 << 20;

// How a result is cut to tasks: planes, of large ones bands of rows, of long rows tiles.
struct RowPlan {
  const RowCall& call;
  const RowKernels& kernels;
  int64_t period, lanes, planes;
  int64_t threads;
  int64_t tile, tiles;    // columns
  bool by_row;            // no rows are computed together
  int64_t band, bands;    // rows
  int64_t group, groups;  // planes
  int64_t in_step;        // values from one packed row to the next
  int64_t weight_lines, lines;

  RowPlan(const RowCall& call, int64_t pool_threads)
      : call(call),
        kernels(*call.kernels.row_lanes),
        period(call.Period()),
        lanes(call.kernels.lanes),
        planes(call.sizes.problems * call.sizes.batch * call.Planes()) {
    const RowAxis &rows = call.rows, &columns = call.columns;
    const int64_t element = sizeof(Line) / lanes;
    weight_lines = rows.kernel * columns.kernel;
    const int64_t work = planes * rows.out * CeilDiv(columns.out * period, lanes) * (weight_lines + 4);
    threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
    const int64_t wanted = threads == 1 ? 1 : CeilDiv(kTasks * threads, planes);

    const int64_t fitting = std::max(kRowBytes / element / period - columns.Span(), columns.Span() + 1);
    const int64_t of_one_row = rows.out == 1 ? wanted : 1;
    const int64_t least = 8 * lanes;
    tile = std::min(columns.out, std::max(std::min(fitting, CeilDiv(columns.out, of_one_row)), least));
    tiles = CeilDiv(columns.out, tile);
    in_step = (CeilDiv((tile + columns.Span()) * period, lanes) | 1) * lanes;

    // Rows are summed alike in any band that starts where the kernel's turn would start without bands.
    by_row = rows.kernel == 1 || rows.out <= rows.dilation;
    const int64_t turn = by_row ? 1 : kernels.rows * rows.dilation;
    const int64_t fitting_rows = std::max(kBandBytes / element / in_step - rows.Span(), rows.Span() + 1);
    band = std::min(fitting_rows, std::max(CeilDiv(rows.out, wanted), rows.Span() + 1));
    band = RoundUp(std::min(band, rows.out), turn);
    bands = CeilDiv(rows.out, band);
    group = tiles * bands > 1 ? 1 : CeilDiv(planes, kTasks * threads);
    groups = CeilDiv(planes, group);
    // With rows that are computed in vain, and what the last line reads behind its row.
    const int64_t most_rows = RoundUp(band, turn) + rows.Span();
    lines = weight_lines + CeilDiv(most_rows * in_step, lanes) + 1;
  }
};

// A part of a plane.
struct Part {
  const char* in;
  char* out;
  int64_t row, rows, column, columns;
};

// Packs what the part reads. Zeros around it are there already if another was packed to the same place.
void CopyPart(const RowPlan& plan, const Part& part, Line* to, bool has_zeros) {
  const RowCall& call = plan.call;
  const int64_t first = part.row + call.rows.first, rows = part.rows + call.rows.Span();
  const int64_t begin = std::clamp<int64_t>(-first, 0, rows);
  const int64_t end = std::clamp(call.rows.in - first, begin, rows);
  const int64_t row_bytes = plan.in_step * sizeof(Line) / plan.lanes;
  char* const bytes = reinterpret_cast<char*>(to);
  if (!has_zeros) {
    std::memset(bytes, 0, begin * row_bytes);
    std::memset(bytes + end * row_bytes, 0, (rows - end) * row_bytes);
  }
  CopyColumns(call.kernels, plan.period, call.in, part.in,
              {first + begin, end - begin, part.column + call.columns.first,
               part.columns + call.columns.Span(), call.columns.in, has_zeros},
              to, begin * plan.in_step, plan.in_step);
}

void ConvolvePart(const RowPlan& plan, const Part& part, const Line* weights, const Line* in) {
  const RowCall& call = plan.call;
  const int64_t dilation = call.rows.dilation;
  // Rows of the result that a dilated filter takes to the same rows.
  for (int64_t row = 0; row < std::min(dilation, part.rows); ++row) {
    const int64_t out = (part.row + row) * call.out.row + part.column * call.out.column;
    plan.kernels.convolve({in, row * plan.in_step, dilation * plan.in_step, weights, call.rows.kernel,
                           call.columns.kernel, call.columns.dilation * plan.period,
                           CeilDiv(part.rows - row, dilation), part.columns * plan.period,
                           plan.lanes / plan.period * plan.period,
                           part.out + out * call.kernels.element_size, dilation * call.out.row,
                           plan.by_row});
  }
}

void PackFilter(const RowPlan& plan, int64_t filter, Line* to) {
  const RowCall& call = plan.call;
  const int64_t planes = call.Planes(), channel = filter % planes;
  const int64_t first = filter / planes * call.filter.problem + channel;
  plan.kernels.weights({call.filter.data + first * call.kernels.element_size, plan.weight_lines,
                        call.sizes.channels, plan.period, call.flipped, to});
}

}  // namespace

void CopyColumns(const Kernels& kernels, int64_t period, const Tensor& tensor, const char* plane,
                 const RowWindow& window, Line* to, int64_t first, int64_t to_step) {
  if (window.rows <= 0) return;
  const int64_t begin = std::clamp<int64_t>(-window.column, 0, window.columns);
  const int64_t end = std::clamp(window.size - window.column, begin, window.columns);
  const int64_t column = std::clamp<int64_t>(window.column + begin, 0, window.size);
  kernels.row_lanes->copy(
      {plane + (window.row * tensor.row + column * tensor.column) * kernels.element_size, tensor.row,
       window.rows, (end - begin) * period, to, first + begin * period, to_step,
       window.has_zeros ? 0 : begin * period, window.has_zeros ? 0 : (window.columns - end) * period});
}

// By what both kinds of vectors cost in products of a line. Rough, as other programs ran meanwhile: times
// of the channels' kernel over those of this one on 2 cores with AVX-512, float32, of forward and filter
// gradient:
//   NHWC 8x56x56, 3x3: 4 channels 10, 7.0; 8 channels 4.1, 3.4; 15 channels 2.8, 2.9; 16, bfloat16 5.8, 3.2
//   NHWC 8x56x56, 5x5: 9 channels 1.7, 3.2; 15 channels 1.8, 2.7; of 16, read in place, 0.6, 1.0
//   NCHW 3x3: 8x32x56x56 2.6, 2.6; 8x576x14x14 1.9, 2.1; 8x960x7x7 0.9, 0.65; 8x384x3x3 0.6, 0.3
//   NCHW: 8x384x14x14, 7x7 1.2, 0.8; 8x384x7x7, 7x7 0.4, 0.35; 4x128x28x28, 31x31 0.7, 0.4
//   problems: 1000 of 8x8x1, 3x3 15, 5.0; 256 of 16x16x3, 5x5 4.1, 8.2
bool PrefersRows(const RowCall& call, bool is_filter_grad) {
  const int64_t lanes = call.kernels.lanes, period = call.Period(), channels = call.sizes.channels;
  if (period > lanes) return false;
  const bool is_packed = call.channels_first || channels % lanes > 0 ||
                         call.kernels.element_size * lanes < static_cast<int64_t>(sizeof(Line));
  if (!is_packed) return false;
  // What is packed for the padding.
  for (const RowAxis* axis : {&call.rows, &call.columns}) {
    if (axis->out + axis->Span() > 4 * axis->in + 64) return false;
  }
  const int64_t taps = call.rows.kernel * call.columns.kernel, out_rows = call.rows.out;
  const int64_t most_lines = kMostBytes / static_cast<int64_t>(sizeof(Line));
  if (taps > most_lines) return false;
  // By one thread, which has the largest parts. A filter gradient packs as much of dy.
  const RowPlan plan(call, 1);
  if (plan.lines > most_lines) return false;
  const int64_t dilation = call.rows.dilation, together = call.kernels.row_lanes->rows;
  const int64_t rows =
      plan.by_row ? out_rows : std::min(dilation, out_rows) * RoundUp(CeilDiv(out_rows, dilation), together);
  const int64_t lines = CeilDiv(call.columns.out * period, lanes / period * period);
  const int64_t line_cost = taps + (is_filter_grad ? taps / 2 : 0) + 2;
  const int64_t row_cost = call.Planes() * (30 + taps + rows * lines * line_cost);
  const int64_t channel_cost = CeilDiv(channels, lanes) * out_rows * call.columns.out * (taps + 26);
  // What was measured near a tie is within its noise: there channels stay.
  return 5 * row_cost <= 4 * channel_cost;
}

void ConvolveRows(ffi::ThreadPool& pool, const RowCall& call) {
  const RowPlan plan(call, pool.num_threads());
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  PreferHugePages(call.out.data, call.sizes.problems * call.sizes.batch * call.out.image * element);
  ParallelFor(
      pool, plan.threads, plan.groups * plan.bands * plan.tiles, plan.lines,
      [&](Scratch& scratch, int64_t task) {
        const int64_t tile = task % plan.tiles, band = task / plan.tiles % plan.bands;
        const int64_t group = task / plan.tiles / plan.bands;
        const int64_t row = band * plan.band, column = tile * plan.tile;
        Line* const weights = scratch.Lines(plan.lines);
        Line* const rows = weights + plan.weight_lines;
        const int64_t end = std::min((group + 1) * plan.group, plan.planes);
        // All images that a filter has, so that its weights are packed once for them.
        int64_t plane = group * plan.group, image = plane % call.sizes.batch;
        int64_t filter = plane / call.sizes.batch, channel = filter % channels;
        int64_t problem = filter / channels;
        for (bool is_first = true; plane < end; ++plane, is_first = false) {
          if (std::exchange(scratch.filter, filter) != filter) PackFilter(plan, filter, weights);
          const int64_t index = problem * call.sizes.batch + image;
          const int64_t in = index * call.in.image + channel * call.in.depth;
          const int64_t out = index * call.out.image + channel * call.out.depth;
          const Part part{call.in.data + in * element,
                          call.out.data + out * element,
                          row,
                          std::min(plan.band, call.rows.out - row),
                          column,
                          std::min(plan.tile, call.columns.out - column)};
          CopyPart(plan, part, rows, !is_first);
          ConvolvePart(plan, part, weights, rows);
          if (++image < call.sizes.batch) continue;
          image = 0, ++filter;
          if (++channel == channels) channel = 0, ++problem;
        }
      });
}

}  // namespace jax_dwbp
