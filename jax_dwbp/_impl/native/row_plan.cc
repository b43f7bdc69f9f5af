#include "row_plan.h"

namespace jax_dwbp {
namespace {

// Bytes that a thread may pack, for a part of the result that is as large as what the filter spans.
constexpr int64_t kMostBytes = 2 << 20;
// Bytes of weights that are packed for all images.
constexpr int64_t kFilterBytes = 16 << 10;
// Calls of a kernel for a part, which are listed.
constexpr int64_t kMostSums = 1024;

// Lines of weights that a multiple may take.
constexpr int64_t kMostWeights = 4096;

}  // namespace

// Where a line ends with its last whole pixel, lanes are left that compute nothing. Where it does not,
// as many lines differ in their weights as a multiple of both has. Each of them costs about 4 cycles
// for a tap, and 200 for a call; a line that is saved, one for a tap and 4. A quarter of the lanes is
// worth it: of 56x56 pixels 9 values with 7x7 taps take 0.7 of the time, 12 values with 3x3 taps 0.92,
// but 15 values 1.1.
int64_t RowCall::LineStep() const {
  const int64_t lanes = kernels.lanes, period = Period(), taps = Taps();
  const int64_t whole = lanes / period * period, multiple = std::lcm(lanes, period);
  if (whole == 0 || whole == lanes) return multiple;
  if (4 * whole > 3 * lanes) return whole;
  const int64_t variants = multiple / lanes, phases = rows.OutPhases() * columns.OutPhases();
  if (variants * taps * Sources() > kMostWeights || phases > kMostPhases) return whole;
  const int64_t width = columns.OutSize(0) * period;
  const int64_t saved = rows.OutSize(0) * (CeilDiv(width, whole) - CeilDiv(width, lanes));
  return saved * (taps + 4) > variants * (4 * taps + 200) ? multiple : whole;
}

int64_t RowCall::PackedRepeats() const { return kernels.row_lanes->can_repeat ? 1 : Repeats(); }

RowPlan::RowPlan(const RowCall& call, int64_t pool_threads)
    : call(call),
      kernels(*call.kernels.row_lanes),
      period(call.Period()),
      lanes(call.kernels.lanes),
      line_step(call.LineStep()),
      variants(call.Variants()),
      slices(call.Slices()),
      pixels(call.InPixels(call.PackedRepeats())),
      repeats(call.Repeats() / call.PackedRepeats()) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t element = sizeof(Line) / lanes, width = columns.OutSize(0), height = rows.OutSize(0);
  variant_lines = call.Sources() * call.Taps();
  weight_lines = variants * variant_lines;
  const int64_t work = slices * height * CeilDiv(width * period, lanes) * (variant_lines + 4);
  threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
  const int64_t wanted = threads == 1 ? 1 : CeilDiv(kTasks * threads, slices);

  const int64_t fitting = columns.Fitting(kRowBytes / element / pixels.period);
  const int64_t of_one_row = height == 1 ? wanted : 1;
  const int64_t least = 8 * lanes;
  tile = std::min(width, std::max(std::min(fitting, CeilDiv(width, of_one_row)), least));
  tiles = CeilDiv(width, tile);
  in_step = (CeilDiv(columns.Packed(tile) * pixels.period, lanes) | 1) * lanes;

  // Rows are summed alike in any band that starts where the kernel's turn would start without bands.
  by_row = call.ByRow();
  const int64_t turn = by_row ? 1 : kernels.rows * rows.dilation;
  band = std::min(rows.Fitting(kBandBytes / element / in_step / call.AllSources()),
                  std::max(CeilDiv(height, wanted), rows.Least()));
  band = RoundUp(std::min(band, height), turn);
  bands = CeilDiv(height, band);
  group = tiles * bands > 1 ? 1 : CeilDiv(slices, kTasks * threads);
  groups = CeilDiv(slices, group);
  const int64_t fitting_filters = kFilterBytes / static_cast<int64_t>(sizeof(Line)) / weight_lines;
  filters =
      group == 1 || call.sizes.batch == 1 ? 1 : std::clamp<int64_t>(fitting_filters, 1, call.Planes());
  phase_step = RoundUp(tile * period, lanes);
  const int64_t phases = columns.OutPhases();
  const int64_t phase_bytes = band * phases * phase_step * call.kernels.element_size;
  // What is read last is read up to a line too far.
  phase_lines = columns.write_step == 1 ? 0 : CeilDiv(phase_bytes, sizeof(Line)) + 1;
  source_lines = CeilDiv(rows.Packed(band) * in_step, lanes);
  lines = filters * weight_lines + phase_lines + call.AllSources() * source_lines + 1;
  reads.reserve(columns.kernel);
  for (int64_t i = 0; i < columns.taps.Size(); ++i) {
    const int64_t first = columns.Read(i, tile);
    for (int64_t k = 0; k < columns.taps[i].count; ++k) {
      reads.push_back((first + k * columns.dilation) * pixels.period);
    }
  }
}

bool HasRows(const RowCall& call, bool is_filter_grad) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t lanes = call.kernels.lanes, period = call.Period();
  if (period > lanes && call.Repeats() == 1) return false;
  if (call.Variants() > kMostVariants || period > kMostLinesOfPixel * lanes) return false;
  for (const RowAxis* axis : {&rows, &columns}) {
    if (axis->taps.Size() == 0 || axis->write_step > kMostPhases) return false;
    // What is packed for the padding.
    if (axis->Packed(axis->OutSize(0)) > 4 * axis->in + 64) return false;
  }
  if (rows.taps.Size() * call.AllSources() > kMostPieces) return false;
  const int64_t most_lines = kMostBytes / static_cast<int64_t>(sizeof(Line));
  if (call.Sources() * call.Taps() > most_lines) return false;
  if (is_filter_grad) return CorrelationLines(call) <= most_lines;
  // By one thread, which has the largest parts.
  const RowPlan plan(call, 1);
  return plan.lines <= most_lines && plan.Sums(plan.band) <= kMostSums;
}

}  // namespace jax_dwbp
