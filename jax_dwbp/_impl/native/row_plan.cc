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
      planes(call.sizes.problems * call.sizes.batch * call.Planes()),
      pixels(call.InPixels(call.PackedRepeats())),
      repeats(call.Repeats() / call.PackedRepeats()) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t element = sizeof(Line) / lanes, width = columns.OutSize(0), height = rows.OutSize(0);
  variant_lines = call.Sources() * rows.kernel * columns.kernel;
  weight_lines = call.Variants() * variant_lines;
  const int64_t work = planes * height * CeilDiv(width * period, lanes) * (variant_lines + 4);
  threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
  const int64_t wanted = threads == 1 ? 1 : CeilDiv(kTasks * threads, planes);

  const int64_t fitting = columns.Fitting(kRowBytes / element / pixels.period);
  const int64_t of_one_row = height == 1 ? wanted : 1;
  const int64_t least = 8 * lanes;
  tile = std::min(width, std::max(std::min(fitting, CeilDiv(width, of_one_row)), least));
  tiles = CeilDiv(width, tile);
  in_step = (CeilDiv(columns.Packed(tile) * pixels.period, lanes) | 1) * lanes;

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
      reads.push_back((first + k * columns.dilation) * pixels.period);
    }
  }
}

// By what both kinds of vectors cost in cycles of a processor that multiplies a line in one. Roughly
// so: the times of the channels' kernel over those of this one, of forward and filter gradient, on 2
// cores with AVX-512 in float32.
//   NHWC 8x56x56, 3x3: 1 channel 12, 11; 9 channels 2.4, 3.3; 15 channels 2.4, 2.7; 16,
//   bfloat16 2.0, 2.8 NHWC 8x56x56, 7x7: 9 channels 1.3, 1.6; 15 channels 1.3, 1.5; 11x11, 15
//   channels 1.1, 1.6 NHWC 8x56x56, stride of 2, 5x5: 6 channels 2.8, 3.5; 12 channels 1.6, 2.0; 3x5x5,
//   M=4 5.7, 4.2 NCHW 3x3: 8x144x56x56 1.6, 1.2; 8x576x14x14 1.1, 1.2; 8x960x7x7 0.7, 0.8; 8x384x3x3
//   0.5, 0.7 NCHW 5x5: 8x240x28x28 1.0, 0.9; 8x672x14x14 0.8, 0.9 NCHW 7x7: 8x192x28x28 0.9, 0.8;
//   8x384x14x14 0.7, 0.8; 8x768x7x7 0.4, 0.4; 31x31 0.5, 0.6 NCHW, stride of 2: 3x3, 8x96x112x112 1.2,
//   0.8; 5x5, 8x192x28x28 0.9, 0.9; 8x672x14x14 0.5, 0.5
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
  // phases, and twice the lines of sums, but each value as often as it is repeated.
  const RowPlan plan(call, 1);
  const int64_t repeated = is_filter_grad ? (plan.repeats - 1) * plan.source_lines : 0;
  if (plan.lines + repeated > most_lines) return false;
  if (plan.Sums(plan.band) > kMostSums) return false;
  const int64_t height = rows.OutSize(0), dilation = rows.dilation;
  const int64_t together = call.kernels.row_lanes->rows, line_step = std::min(call.LineStep(), lanes);
  const int64_t turns = std::min(dilation, height) * RoundUp(CeilDiv(height, dilation), together);
  const int64_t lines =
      (plan.by_row ? height : turns) * CeilDiv(columns.OutSize(0) * period, line_step);
  const int64_t phases = rows.OutPhases() * columns.OutPhases();
  int64_t row_cost = 60 + 3 * taps + lines * (taps * (is_filter_grad ? 9 : 8) / 6 + 6 * phases);
  // What is moved other than by whole lines.
  RowPixels pixels = call.InPixels(is_filter_grad ? call.Repeats() : call.PackedRepeats());
  pixels.column_step *= columns.read_step;
  const bool by_vectors = call.kernels.row_moves->by_vectors;
  const int64_t in = rows.in * columns.in, out = rows.out * columns.out;
  if (!pixels.AreDense()) {
    const int64_t at_once = pixels.AtOnce(lanes);
    const int64_t moves = at_once > 0 ? CeilDiv(in, at_once) : in * CeilDiv(pixels.period, lanes);
    const bool are_moved = by_vectors && pixels.Span() <= 2 * lanes;
    row_cost += call.Sources() * (are_moved ? 12 * moves : 2 * in * period / call.Repeats());
  }
  if (columns.write_step > 1) {
    row_cost +=
        by_vectors && columns.write_step == 2 ? CeilDiv(out * period, line_step) * 8 : 2 * out * period;
  }
  const int64_t multiplier = call.sizes.multiplier;
  int64_t channel_cost = out * multiplier * rows.kernel * columns.kernel * 5 / 4 / phases;
  if (call.channels_first && call.kernels.channel_moves->by_vectors) {
    // Squares of lines are transposed.
    const int64_t squares =
        call.Sources() * rows.in * CeilDiv(columns.in, lanes) +
        multiplier * rows.out * columns.OutPhases() * CeilDiv(columns.OutSize(0), lanes);
    channel_cost += 12 * lanes * squares;
  } else {
    channel_cost += 8 * out * multiplier + (call.channels_first ? 25 : 40) * in * call.Sources();
  }
  return call.Planes() * row_cost <= CeilDiv(channels, lanes) * channel_cost;
}

}  // namespace jax_dwbp
