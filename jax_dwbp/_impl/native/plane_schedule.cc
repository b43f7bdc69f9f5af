// The forward op and the input gradient by planes, which both are what row_schedule.cc says of them.

#include "plane_schedule.h"

#include "plane_lanes.h"

namespace jax_dwbp {
namespace {

// Masks that are made for a call.
constexpr int64_t kMostMasks = 4096;
// Taps that are summed without pairs of sums.
constexpr int64_t kMostTaps = 64;

// What the taps read and leave out, in the order of the filter's rows.
struct PlaneTaps {
  std::vector<int64_t> weights, reads;
  std::vector<uint16_t> masks;

  explicit PlaneTaps(const RowCall& call) {
    const RowAxis &rows = call.rows, &columns = call.columns;
    const int64_t width = columns.out, lanes = call.kernels.lanes;
    for (int64_t tap : call.Order()) weights.push_back(tap * call.TapStep());
    const int64_t tap_count = weights.size();
    masks.resize(tap_count * CeilDiv(PlaneLines(call), kPlaneLines) * kPlaneLines);
    uint16_t* mask = masks.data();
    for (int64_t r = 0; r < rows.kernel; ++r) {
      const int64_t down = rows.taps[0].offset + r * rows.dilation;
      const int64_t begin = std::clamp<int64_t>(-down, 0, rows.out);
      const int64_t end = std::clamp<int64_t>(rows.in - down, 0, rows.out);
      for (int64_t s = 0; s < columns.kernel; ++s, mask += kPlaneLines) {
        const int64_t right = columns.taps[0].offset + s * columns.dilation;
        reads.push_back(down * width + right);
        // A tap may meet no column.
        const int64_t first = std::clamp<int64_t>(-right, 0, width);
        const int64_t last = std::clamp<int64_t>(width - right, 0, width);
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t i = row * width + first; i < row * width + last; ++i) {
            const int64_t line = i / lanes, group = line / kPlaneLines;
            mask[group * tap_count * kPlaneLines + line % kPlaneLines] |= 1 << i % lanes;
          }
        }
      }
    }
  }
};

}  // namespace

int64_t PlaneLines(const RowCall& call) {
  return CeilDiv(call.rows.out * call.columns.out, call.kernels.lanes);
}

bool HasNarrowPlanes(const RowCall& call) {
  const RowAxis &rows = call.rows, &columns = call.columns;
  if (!call.kernels.plane_lanes || call.Period() > 1 || call.Sources() > 1) return false;
  if (!call.depth.IsBatch()) return false;
  for (const RowAxis* axis : {&rows, &columns}) {
    if (axis->read_step > 1 || axis->write_step > 1) return false;
  }
  const bool is_narrow = columns.in == columns.out && columns.out < call.kernels.lanes &&
                         columns.kernel <= kMostPlaneColumns;
  const int64_t taps = rows.kernel * columns.kernel;
  return is_narrow && taps <= kMostTaps && taps * PlaneLines(call) <= kMostMasks;
}

void ConvolvePlanes(ffi::ThreadPool& pool, const RowCall& call) {
  const PlaneTaps taps(call);
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  const int64_t slices = call.Slices(), lines = PlaneLines(call);
  const int64_t tap_count = taps.weights.size();
  const int64_t threads = slices * lines * (tap_count + 4) < kSmall ? 1 : pool.num_threads();
  const int64_t group = CeilDiv(slices, kTasks * std::max<int64_t>(threads, 1));
  PreferHugePages(call.out.data, call.sizes.problems * call.out.problem * element);
  ParallelFor(pool, threads, CeilDiv(slices, group), 0, [&](Scratch&, int64_t task) {
    const int64_t end = std::min((task + 1) * group, slices);
    for (int64_t i = task * group; i < end; ++i) {
      const int64_t slice = i % call.depth.out, plane = i / call.depth.out;
      const int64_t image = plane / channels, channel = plane % channels;
      const int64_t problem = image / call.sizes.batch;
      const int64_t in = image * call.in.image + call.InPlane(channel) + slice * call.in.slice;
      const int64_t filter = problem * call.filter.problem + call.FilterPlane(channel);
      const int64_t out = image * call.out.image + call.OutPlane(channel) + slice * call.out.slice;
      call.kernels.plane_lanes->convolve({.in = call.in.data + in * element,
                                          .filter = call.filter.data + filter * element,
                                          .out = call.out.data + out * element,
                                          .values = call.rows.out * call.columns.out,
                                          .kernel_columns = call.columns.kernel,
                                          .tap_count = tap_count,
                                          .weights = taps.weights.data(),
                                          .reads = taps.reads.data(),
                                          .masks = taps.masks.data()});
    }
  });
}

}  // namespace jax_dwbp
