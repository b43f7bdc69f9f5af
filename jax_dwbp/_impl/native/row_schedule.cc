// The forward op and the input gradient by rows.
//
// Under a stride the forward op adds what phases of its source give, and the input gradient has phases of its
// result (row_axis.h): so both are sums where tap k reads t + offset + dilation * k to write t. A task packs
// what a part of a plane reads, with zeros around it, and computes the part from that: so no tap looks where
// it is, half types are widened once, and what is behind a row never counts.

#include "row_schedule.h"

#include "row_lanes.h"

namespace jax_dwbp {
namespace {

int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Bytes that a thread may pack, for a part of the result that is as large as what the filter spans.
constexpr int64_t kMostBytes = 2 << 20;

// How a result is cut to tasks: planes, of large ones bands of rows, of long rows tiles. All of a part is of
// each phase.
struct RowPlan {
  const RowCall& call;
  const RowKernels& kernels;
  int64_t period, lanes, planes;
  int64_t threads;
  int64_t tile, tiles;    // columns
  bool by_row;            // no rows are computed together
  int64_t band, bands;    // rows
  int64_t group, groups;  // planes
  int64_t packed_rows;    // of a region, with those that are computed in vain
  int64_t in_step;        // values from one packed row to the next
  int64_t phase_step;     // elements from one phase of a row to the next, before they are stored
  int64_t variant_lines, weight_lines, phase_lines, source_lines, lines;
  std::vector<int64_t> reads;  // of the columns of the filter: values from where a row starts

  RowPlan(const RowCall& call, int64_t pool_threads)
      : call(call),
        kernels(*call.kernels.row_lanes),
        period(call.Period()),
        lanes(call.kernels.lanes),
        planes(call.sizes.problems * call.sizes.batch * call.Planes()) {
    const RowAxis &rows = call.rows, &columns = call.columns;
    const int64_t element = sizeof(Line) / lanes, width = columns.OutSize(0), height = rows.OutSize(0);
    variant_lines = call.Sources() * rows.kernel * columns.kernel;
    weight_lines = call.Variants() * variant_lines;
    const int64_t work = planes * height * CeilDiv(width * period, lanes) * (variant_lines + 4);
    threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
    const int64_t wanted = threads == 1 ? 1 : CeilDiv(kTasks * threads, planes);

    const int64_t fitting = columns.Fitting(kRowBytes / element / period);
    const int64_t of_one_row = height == 1 ? wanted : 1;
    const int64_t least = 8 * lanes;
    tile = std::min(width, std::max(std::min(fitting, CeilDiv(width, of_one_row)), least));
    tiles = CeilDiv(width, tile);
    in_step = (CeilDiv(columns.Packed(tile) * period, lanes) | 1) * lanes;

    // Rows are summed alike in any band that starts where the kernel's turn would start without bands.
    by_row = rows.MostTaps() == 1 || height <= rows.dilation;
    const int64_t turn = by_row ? 1 : kernels.rows * rows.dilation;
    band = std::min(rows.Fitting(kBandBytes / element / in_step / call.Sources()),
                    std::max(CeilDiv(height, wanted), rows.Least()));
    band = RoundUp(std::min(band, height), turn);
    bands = CeilDiv(height, band);
    group = tiles * bands > 1 ? 1 : CeilDiv(planes, kTasks * threads);
    groups = CeilDiv(planes, group);
    packed_rows = RoundUp(band, turn);
    phase_step = RoundUp(tile * period, lanes);
    const int64_t phases = columns.OutPhases();
    const int64_t phase_bytes = band * phases * phase_step * call.kernels.element_size;
    // What is read last is read up to a line too far.
    phase_lines = columns.write_step == 1 ? 0 : CeilDiv(phase_bytes, sizeof(Line)) + 1;
    source_lines = CeilDiv(rows.Packed(packed_rows) * in_step, lanes);
    lines = weight_lines + phase_lines + call.Sources() * source_lines + 1;
    reads.reserve(columns.kernel);
    for (int64_t i = 0; i < columns.taps.Size(); ++i) {
      const int64_t first = columns.Read(i, tile);
      for (int64_t k = 0; k < columns.taps[i].count; ++k) {
        reads.push_back((first + k * columns.dilation) * period);
      }
    }
  }
};

// A part of a plane: rows and columns of each phase.
struct Part {
  const char* in;
  char* out;
  int64_t row, rows, column, columns;
};

// Packs what the part reads of a source. Zeros around it are there already if another was packed to the same
// place.
void CopySource(const RowPlan& plan, const Part& part, const char* in, Line* to, bool has_zeros) {
  const RowCall& call = plan.call;
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t row_bytes = plan.in_step * sizeof(Line) / plan.lanes;
  for (int64_t i = 0; i < rows.regions.Size(); ++i) {
    const RowRegion& region = rows.regions[i];
    const int64_t first = part.row + region.first, count = part.rows + region.extra;
    const int64_t begin = std::clamp<int64_t>(-first, 0, count);
    const int64_t end = std::clamp(rows.InSize(region.phase) - first, begin, count);
    const int64_t start = rows.Start(i, plan.packed_rows);
    char* const bytes = reinterpret_cast<char*>(to) + start * row_bytes;
    if (!has_zeros) {
      std::memset(bytes, 0, begin * row_bytes);
      std::memset(bytes + end * row_bytes, 0, (count - end) * row_bytes);
    }
    for (int64_t j = 0; j < columns.regions.Size(); ++j) {
      const RowRegion& side = columns.regions[j];
      CopyWindow(call.kernels, call.InPixels(), call.in.row, in,
                 {(first + begin) * rows.read_step + region.phase, rows.read_step, end - begin, side.phase,
                  columns.read_step, part.column + side.first, part.columns + side.extra,
                  columns.InSize(side.phase), has_zeros},
                 to, (start + begin) * plan.in_step + columns.Start(j, plan.tile) * plan.period,
                 plan.in_step);
    }
  }
}

void CopyPart(const RowPlan& plan, const Part& part, Line* to, bool has_zeros) {
  const int64_t source_bytes = plan.call.SourceStep() * plan.call.kernels.element_size;
  for (int64_t i = 0; i < plan.call.Sources(); ++i) {
    CopySource(plan, part, part.in + i * source_bytes, to + i * plan.source_lines, has_zeros);
  }
}

// Computes one phase of rows and of columns. What no tap meets is a sum of nothing.
void ConvolvePhase(const RowPlan& plan, const Part& part, int64_t row_phase, int64_t column_phase,
                   const Line* weights, const Line* in, char* out, int64_t out_step) {
  const RowCall& call = plan.call;
  const RowAxis &rows = call.rows, &columns = call.columns;
  const RowAxis::Range row_taps = rows.Meeting(row_phase), column_taps = columns.Meeting(column_phase);
  const int64_t first_column = columns.Before(column_taps.begin);
  const int64_t column_count = columns.Before(column_taps.end) - first_column;
  const int64_t count = std::min(part.rows, rows.OutSize(row_phase) - part.row);
  // Rows of the result that a dilated filter takes to the same rows.
  for (int64_t row = 0; row < std::min(rows.dilation, count); ++row) {
    RowPiece pieces[kMostPieces];
    int64_t piece_count = 0;
    for (int64_t i = row_taps.begin; i < row_taps.end && column_count > 0; ++i) {
      const int64_t first = (rows.Read(i, plan.packed_rows) + row) * plan.in_step;
      const int64_t weight = rows.Before(i) * columns.kernel + first_column;
      for (int64_t source = 0; source < call.Sources(); ++source) {
        pieces[piece_count++] = {first + source * plan.source_lines * plan.lanes,
                                 weight + source * rows.kernel * columns.kernel, rows.taps[i].count};
      }
    }
    const int64_t width = part.columns * plan.period, element = call.kernels.element_size;
    char* const out_row = out + row * out_step * element;
    for (int64_t variant = 0; variant * plan.lanes < std::min(call.LineStep(), width); ++variant) {
      const int64_t first = variant * plan.lanes;
      plan.kernels.convolve({in + variant, rows.dilation * plan.in_step, pieces, piece_count,
                             plan.reads.data() + first_column, column_count,
                             weights + variant * plan.variant_lines, columns.kernel,
                             CeilDiv(count - row, rows.dilation), width - first, call.LineStep(),
                             out_row + first * element, rows.dilation * out_step, plan.by_row});
    }
  }
}

void ConvolvePart(const RowPlan& plan, const Part& part, const Line* weights, const Line* in, Line* phases) {
  const RowCall& call = plan.call;
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t element = call.kernels.element_size, out_row = rows.write_step * call.out.row;
  const int64_t first_column = part.column * columns.write_step, phase_count = columns.OutPhases();
  for (int64_t row_phase = 0; row_phase < rows.OutPhases(); ++row_phase) {
    const int64_t first_row = part.row * rows.write_step + row_phase;
    char* const out = part.out + (first_row * call.out.row + first_column * call.out.column) * element;
    if (columns.write_step == 1) {
      ConvolvePhase(plan, part, row_phase, 0, weights, in, out, out_row);
      continue;
    }
    char* const bytes = reinterpret_cast<char*>(phases);
    const int64_t row_values = phase_count * plan.phase_step;
    for (int64_t phase = 0; phase < phase_count; ++phase) {
      ConvolvePhase(plan, part, row_phase, phase, weights, in, bytes + phase * plan.phase_step * element,
                    row_values);
    }
    const int64_t count = std::min(part.columns * columns.write_step, columns.out - first_column);
    call.kernels.row_moves->interleave({bytes, plan.phase_step, row_values,
                                        std::min(part.rows, rows.OutSize(row_phase) - part.row), phase_count,
                                        plan.period, count * plan.period, out, out_row});
  }
}

void PackFilter(const RowPlan& plan, const std::vector<int64_t>& taps, int64_t filter, Line* to) {
  const RowCall& call = plan.call;
  const int64_t planes = call.Planes(), tap_count = taps.size();
  const int64_t first = filter / planes * call.filter.problem + call.FilterPlane(filter % planes);
  for (int64_t variant = 0; variant < call.Variants(); ++variant) {
    for (int64_t i = 0; i < call.Sources(); ++i) {
      call.kernels.row_moves->weights({call.filter.data + (first + i) * call.kernels.element_size,
                                       taps.data(), tap_count, call.TapStep(), plan.period,
                                       variant * plan.lanes % plan.period, call.ValueStep(),
                                       to + variant * plan.variant_lines + i * tap_count});
    }
  }
}

}  // namespace

std::vector<int64_t> RowCall::Taps() const {
  std::vector<int64_t> taps;
  taps.reserve(rows.kernel * columns.kernel);
  const std::vector<int64_t> columns_in_order = columns.Order();
  for (int64_t row : rows.Order()) {
    for (int64_t column : columns_in_order) taps.push_back(row * columns.kernel + column);
  }
  if (is_transposed) {
    for (int64_t& tap : taps) tap = rows.kernel * columns.kernel - 1 - tap;
  }
  return taps;
}

void CopyWindow(const Kernels& kernels, RowPixels pixels, int64_t row_step, const char* plane,
                const RowWindow& window, Line* to, int64_t first, int64_t to_step) {
  if (window.rows <= 0) return;
  const int64_t begin = std::clamp<int64_t>(-window.column, 0, window.columns);
  const int64_t end = std::clamp(window.size - window.column, begin, window.columns);
  const int64_t in_phase = std::clamp<int64_t>(window.column + begin, 0, window.size);
  const int64_t column = window.phase + in_phase * window.column_step;
  const int64_t element = window.row * row_step + column * pixels.column_step, period = pixels.period;
  pixels.column_step *= window.column_step;
  kernels.row_moves->copy({plane + element * kernels.element_size, window.row_step * row_step, window.rows,
                           pixels, (end - begin) * period, to, first + begin * period, to_step,
                           window.has_zeros ? 0 : begin * period,
                           window.has_zeros ? 0 : (window.columns - end) * period});
}

// By what both kinds of vectors cost in products of a line. Rough, as other programs ran meanwhile: times
// of the channels' kernel over those of this one on 2 cores with AVX-512, float32, of forward and filter
// gradient:
//   NHWC 8x56x56, 3x3: 4 channels 10, 7.0; 8 channels 4.1, 3.4; 15 channels 2.8, 2.9; 16, bfloat16 5.8, 3.2
//   NHWC 8x56x56, 5x5: 9 channels 1.7, 3.2; 15 channels 1.8, 2.7; of 16, read in place, 0.6, 1.0
//   NCHW 3x3: 8x32x56x56 2.6, 2.6; 8x576x14x14 1.9, 2.1; 8x960x7x7 0.9, 0.65; 8x384x3x3 0.6, 0.3
//   NCHW: 8x384x14x14, 7x7 1.2, 0.8; 8x384x7x7, 7x7 0.4, 0.35; 4x128x28x28, 31x31 0.7, 0.4
//   stride of 2: 8x256x256x3, 3x3, NHWC 7.0, 7.5; 8x192x28x28, 5x5, NCHW 1.1, 1.7; 16x16000x8, 1x16 4.3, 4.1
//   multiplier: 8x128x128x1, 5x5, M=16 11, 13; 1x224x224x3, 3x3, M=8, stride 2, forward 1.7
//   problems: 1000 of 8x8x1, 3x3 15, 5.0; 256 of 16x16x3, 5x5 4.1, 8.2
bool PrefersRows(const RowCall& call, bool is_filter_grad) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t lanes = call.kernels.lanes, period = call.Period(), channels = call.sizes.channels;
  if (period > lanes && call.Repeats() == 1) return false;
  if (call.Variants() > kMostLinesOfPixel || period > kMostLinesOfPixel * lanes) return false;
  const bool is_packed = call.channels_first || channels % lanes > 0 ||
                         call.kernels.element_size * lanes < static_cast<int64_t>(sizeof(Line));
  if (!is_packed) return false;
  for (const RowAxis* axis : {&rows, &columns}) {
    if (axis->taps.Size() == 0 || axis->write_step > kMostPhases) return false;
    // What is packed for the padding.
    if (axis->Packed(axis->OutSize(0)) > 4 * axis->in + 64) return false;
  }
  if (rows.taps.Size() * call.Sources() > kMostPieces) return false;
  const int64_t taps = call.Sources() * rows.kernel * columns.kernel;
  const int64_t most_lines = kMostBytes / static_cast<int64_t>(sizeof(Line));
  if (taps > most_lines) return false;
  // By one thread, which has the largest parts. A filter gradient packs as much of dy.
  const RowPlan plan(call, 1);
  if (plan.lines > most_lines) return false;
  const int64_t height = rows.OutSize(0), dilation = rows.dilation;
  const int64_t together = call.kernels.row_lanes->rows, line_step = std::min(call.LineStep(), lanes);
  const int64_t turns = std::min(dilation, height) * RoundUp(CeilDiv(height, dilation), together);
  const int64_t lines = (plan.by_row ? height : turns) * CeilDiv(columns.OutSize(0) * period, line_step);
  const int64_t phases = rows.OutPhases() * columns.OutPhases();
  int64_t row_cost = 30 + taps + lines * (taps + (is_filter_grad ? taps / 2 : 0) + 2 * phases);
  // What is moved other than by whole lines.
  RowPixels pixels = call.InPixels();
  pixels.column_step *= columns.read_step;
  const bool by_vectors = call.kernels.row_moves->by_vectors;
  const int64_t in = rows.in * columns.in, out = rows.out * columns.out;
  if (!pixels.AreDense()) {
    const int64_t at_once = pixels.AtOnce(lanes);
    const int64_t moves = at_once > 0 ? CeilDiv(in, at_once) : in * CeilDiv(period, lanes);
    row_cost += call.Sources() * (by_vectors && pixels.Span() <= 2 * lanes ? 4 * moves : in * period);
  }
  if (columns.write_step > 1) {
    row_cost += by_vectors && columns.write_step == 2 ? CeilDiv(out * period, line_step) * 4 : out * period;
  }
  const int64_t channel_cost =
      out * call.sizes.multiplier * (rows.kernel * columns.kernel / phases + 6) + in * call.Sources() * 20;
  // What was measured near a tie is within its noise: there channels stay.
  return 5 * call.Planes() * row_cost <= 4 * CeilDiv(channels, lanes) * channel_cost;
}

void ConvolveRows(ffi::ThreadPool& pool, const RowCall& call) {
  const RowPlan plan(call, pool.num_threads());
  const std::vector<int64_t> taps = call.Taps();
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  PreferHugePages(call.out.data, call.sizes.problems * call.sizes.batch * call.out.image * element);
  ParallelFor(
      pool, plan.threads, plan.groups * plan.bands * plan.tiles, plan.lines,
      [&](Scratch& scratch, int64_t task) {
        const int64_t tile = task % plan.tiles, band = task / plan.tiles % plan.bands;
        const int64_t group = task / plan.tiles / plan.bands;
        const int64_t row = band * plan.band, column = tile * plan.tile;
        Line* const weights = scratch.Lines(plan.lines);
        Line* const phases = weights + plan.weight_lines;
        Line* const rows = phases + plan.phase_lines;
        const int64_t end = std::min((group + 1) * plan.group, plan.planes);
        // All images that a filter has, so that its weights are packed once for them.
        int64_t plane = group * plan.group, image = plane % call.sizes.batch;
        int64_t filter = plane / call.sizes.batch, channel = filter % channels;
        int64_t problem = filter / channels;
        for (bool is_first = true; plane < end; ++plane, is_first = false) {
          if (std::exchange(scratch.filter, filter) != filter) PackFilter(plan, taps, filter, weights);
          const int64_t index = problem * call.sizes.batch + image;
          const int64_t in = index * call.in.image + call.InPlane(channel);
          const int64_t out = index * call.out.image + call.OutPlane(channel);
          const Part part{call.in.data + in * element,
                          call.out.data + out * element,
                          row,
                          std::min(plan.band, call.rows.OutSize(0) - row),
                          column,
                          std::min(plan.tile, call.columns.OutSize(0) - column)};
          CopyPart(plan, part, rows, !is_first);
          ConvolvePart(plan, part, weights, rows, phases);
          if (++image < call.sizes.batch) continue;
          image = 0, ++filter;
          if (++channel == channels) channel = 0, ++problem;
        }
      });
}

}  // namespace jax_dwbp
