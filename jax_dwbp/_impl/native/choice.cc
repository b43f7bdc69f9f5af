// Which vectors a call is computed with, by what each kind costs.

#include "choice.h"

#include "plane_schedule.h"
#include "row_lanes.h"
#include "row_plan.h"

namespace jax_dwbp {
namespace {

// Of a slice of a plane.
int64_t RowCost(const RowCall& call, bool is_filter_grad) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t lanes = call.kernels.lanes, period = call.Period();
  const int64_t slices = call.depth.MostMet(), sources = slices * call.Sources();
  const int64_t taps = sources * rows.kernel * columns.kernel;
  const int64_t height = rows.OutSize(0), dilation = rows.dilation;
  const int64_t together = call.kernels.row_lanes->rows, line_step = std::min(call.LineStep(), lanes);
  const int64_t turns = std::min(dilation, height) * RoundUp(CeilDiv(height, dilation), together);
  const int64_t lines =
      (call.ByRow() ? height : turns) * CeilDiv(columns.OutSize(0) * period, line_step);
  const int64_t phases = rows.OutPhases() * columns.OutPhases();
  int64_t cost = 60 + 3 * taps + lines * (taps * (is_filter_grad ? 9 : 8) / 6 + 6 * phases);
  // What is moved other than by whole lines.
  RowPixels pixels = call.InPixels(is_filter_grad ? call.Repeats() : call.PackedRepeats());
  pixels.column_step *= columns.read_step;
  const bool by_vectors = call.kernels.row_moves->by_vectors;
  const int64_t in = rows.in * columns.in, out = rows.out * columns.out;
  if (!pixels.AreDense()) {
    const int64_t at_once = pixels.AtOnce(lanes);
    const int64_t moves = at_once > 0 ? CeilDiv(in, at_once) : in * CeilDiv(pixels.period, lanes);
    const bool are_moved = by_vectors && pixels.Span() <= 2 * lanes;
    cost += sources * (are_moved ? 12 * moves : 2 * in * period / call.Repeats());
  }
  if (columns.write_step > 1) {
    cost +=
        by_vectors && columns.write_step == 2 ? CeilDiv(out * period, line_step) * 8 : 2 * out * period;
  }
  return cost;
}

// Of a slice of a line of channels.
int64_t ChannelCost(const RowCall& call) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  const int64_t slices = call.depth.MostMet(), sources = slices * call.Sources();
  const int64_t in = sources * rows.in * columns.in, lanes = call.kernels.lanes;
  const int64_t out = call.sizes.multiplier * rows.out * columns.out;
  const int64_t phases = rows.OutPhases() * columns.OutPhases();
  const int64_t cost = out * slices * rows.kernel * columns.kernel * 5 / 4 / phases;
  if (!call.channels_first) return cost + 8 * out + 40 * in;
  if (!call.kernels.channel_moves->by_vectors) return cost + 8 * out + 25 * in;
  // Squares of lines are transposed.
  const int64_t squares =
      sources * rows.in * CeilDiv(columns.in, lanes) +
      call.sizes.multiplier * rows.out * columns.OutPhases() * CeilDiv(columns.OutSize(0), lanes);
  return cost + 12 * lanes * squares;
}

// Of a slice of a plane.
int64_t PlaneCost(const RowCall& call) {
  const int64_t lanes = call.kernels.lanes, taps = call.rows.kernel * call.columns.kernel;
  const int64_t lines = PlaneLines(call);
  // The masks are made for all planes, bit by bit.
  return 40 + lines * (3 * taps + 6) + 10 * lines * lanes * taps / call.Slices();
}

}  // namespace

// By what each costs in cycles of a processor that multiplies a line in one. Roughly so: the times by
// channels over those by rows, of forward and filter gradient, on 2 cores with AVX-512 in float32.
// clang-format off
//   NHWC 8x56x56, 3x3: 1 channel 12, 11; 9 channels 2.4, 3.3; 15 channels 2.4, 2.7
//   NHWC 8x56x56, bfloat16, 16 channels: 3x3 1.0, 1.0; 7x7 1.0, 1.0; 3x3, stride of 2 0.7, 0.7
//   NHWC 8x56x56, 7x7: 9 channels 1.9, 1.7; 15 channels 1.3, 1.5; 11x11, 15 channels 1.1, 1.6
//   NHWC 8x56x56, stride of 2, 5x5: 6 channels 2.8, 3.5; 12 channels 1.8, 2.0; 3 channels, M=4 5.7, 4.2
//   NCHW 3x3: 8x144x56x56 1.6, 1.2; 8x576x14x14 1.1, 1.2; 8x960x7x7 0.7, 0.8; 8x384x3x3 0.5, 0.7
//   NCHW 5x5: 8x240x28x28 1.0, 0.9; 8x672x14x14 0.8, 0.9
//   NCHW 7x7: 8x192x28x28 0.9, 0.8; 8x384x14x14 0.7, 0.8; 8x768x7x7 0.4, 0.4; 31x31 0.5, 0.6
//   NCHW, stride of 2: 3x3, 8x96x112x112 1.2, 0.8; 5x5, 8x192x28x28 0.9, 0.9; 8x672x14x14 0.5, 0.5
//   NCHW with AVX2: 8x576x14x14 1.5, 1.2; 8x960x7x7 0.8, 0.8; stride of 2, 8x32x112x112 0.5, 0.5
// clang-format on
// By planes 3x3 filters take as long as by channels on 8x960x7x7, and two thirds of what they take by
// rows on 1,000 problems of 8x8.
Vectors Choose(const RowCall& call, bool is_filter_grad) {
  const int64_t channels = call.sizes.channels, lanes = call.kernels.lanes;
  // What consists of lines is computed where it is.
  if (!call.channels_first && channels % lanes == 0 && call.kernels.channel_lanes->convolve_in_place) {
    return Vectors::kChannels;
  }
  Vectors best = Vectors::kChannels;
  int64_t least = CeilDiv(channels, lanes) * ChannelCost(call);
  const auto consider = [&](Vectors vectors, int64_t plane_cost) {
    const int64_t cost = call.Planes() * plane_cost;
    if (cost <= least) best = vectors, least = cost;
  };
  if (HasRows(call, is_filter_grad)) consider(Vectors::kRows, RowCost(call, is_filter_grad));
  if (!is_filter_grad && HasNarrowPlanes(call)) consider(Vectors::kPlanes, PlaneCost(call));
  return best;
}

}  // namespace jax_dwbp
