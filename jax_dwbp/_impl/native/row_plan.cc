#include "row_plan.h"

namespace jax_dwbp {
namespace {

int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Bytes that a thread may pack, for a part of the result that is as large as what the filter spans.
constexpr int64_t kMostBytes = 2 << 20;
// Bytes of weights that are packed for all images.
constexpr int64_t kFilterBytes = 16 << 10;
// Calls of a kernel for a part, which are listed.
constexpr int64_t kMostSums = 1024;

}  // namespace

RowPlan::RowPlan(const RowCall& call, int64_t pool_threads)
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
  const int64_t fitting_filters = kFilterBytes / static_cast<int64_t>(sizeof(Line)) / weight_lines;
  filters =
      group == 1 || call.sizes.batch == 1 ? 1 : std::clamp<int64_t>(fitting_filters, 1, call.Planes());
  phase_step = RoundUp(tile * period, lanes);
  const int64_t phases = columns.OutPhases();
  const int64_t phase_bytes = band * phases * phase_step * call.kernels.element_size;
  // What is read last is read up to a line too far.
  phase_lines = columns.write_step == 1 ? 0 : CeilDiv(phase_bytes, sizeof(Line)) + 1;
  source_lines = CeilDiv(rows.Packed(band) * in_step, lanes);
  lines = filters * weight_lines + phase_lines + call.Sources() * source_lines + 1;
  reads.reserve(columns.kernel);
  for (int64_t i = 0; i < columns.taps.Size(); ++i) {
    const int64_t first = columns.Read(i, tile);
    for (int64_t k = 0; k < columns.taps[i].count; ++k) {
      reads.push_back((first + k * columns.dilation) * period);
    }
  }
}

// By what both kinds of vectors cost in products of a line. Roughly so: the times of the channels'
// kernel over those of this one, of forward and filter gradient, on 2 cores with AVX-512 in float32.
//   NHWC 8x56x56, 3x3: 4 channels 4.4, 4.8; 15 channels 1.4, 1.3; 16, bfloat16 1.5, 2.0
//   NHWC 8x56x56, 15 channels: 7x7 0.95, 1.04; 11x11 1.04, 1.2
//   NCHW 3x3: 8x32x56x56 1.8, 1.7; 8x576x14x14 2.2, 1.7; 8x960x7x7 1.3, 0.9; 8x384x3x3 0.6, 0.8
//   NCHW: 8x384x14x14, 7x7 1.0, 1.0; 8x384x7x7, 7x7 0.5, 0.5; 4x128x28x28, 31x31 0.6, 0.6
//   stride of 2, NCHW, 5x5: 8x192x28x28 1.5, 1.2; 8x672x14x14 1.0, 0.8
//   stride of 2, 16x16000x8, 1x16 2.1, 2.1; 1x224x224x3, 3x3, M=8 2.4, 1.6
//   8x128x128x1, 5x5, M=16 8.3, 9.7
// With AVX2: 8x576x14x14 1.5, 1.2; 8x960x7x7 0.8, 0.8; stride of 2, 8x32x112x112 0.5, 0.5.
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
  // By one thread, which has the largest parts. A filter gradient packs about as much: dy instead of
  // phases, and twice the lines of sums.
  const RowPlan plan(call, 1);
  if (plan.lines > most_lines) return false;
  if (plan.Sums(plan.band) > kMostSums) return false;
  const int64_t height = rows.OutSize(0), dilation = rows.dilation;
  const int64_t together = call.kernels.row_lanes->rows, line_step = std::min(call.LineStep(), lanes);
  const int64_t turns = std::min(dilation, height) * RoundUp(CeilDiv(height, dilation), together);
  const int64_t lines =
      (plan.by_row ? height : turns) * CeilDiv(columns.OutSize(0) * period, line_step);
  const int64_t phases = rows.OutPhases() * columns.OutPhases();
  int64_t row_cost = taps + lines * (taps + (is_filter_grad ? taps / 2 : 0) + 2 * phases);
  // What is moved other than by whole lines.
  RowPixels pixels = call.InPixels();
  pixels.column_step *= columns.read_step;
  const bool by_vectors = call.kernels.row_moves->by_vectors;
  const int64_t in = rows.in * columns.in, out = rows.out * columns.out;
  if (!pixels.AreDense()) {
    const int64_t at_once = pixels.AtOnce(lanes);
    const int64_t moves = at_once > 0 ? CeilDiv(in, at_once) : in * CeilDiv(period, lanes);
    const bool are_moved = by_vectors && pixels.Span() <= 2 * lanes;
    row_cost += call.Sources() * (are_moved ? 4 * moves : 2 * in * period / call.Repeats());
  }
  if (columns.write_step > 1) {
    row_cost +=
        by_vectors && columns.write_step == 2 ? CeilDiv(out * period, line_step) * 4 : 2 * out * period;
  }
  const int64_t channel_cost =
      out * call.sizes.multiplier * (rows.kernel * columns.kernel / phases + 6) +
      in * call.Sources() * 20;
  return call.Planes() * row_cost <= CeilDiv(channels, lanes) * channel_cost;
}

}  // namespace jax_dwbp
