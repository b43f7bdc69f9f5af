#include "row_axis.h"

#include <numeric>

namespace jax_dwbp {

RowAxis::RowAxis(int64_t in, int64_t out, int64_t kernel, int64_t dilation, int64_t first,
                 int64_t stride, bool is_transposed)
    : in(in),
      out(out),
      kernel(kernel),
      read_step(is_transposed ? 1 : stride),
      write_step(is_transposed ? stride : 1),
      tap_step(stride / std::gcd(stride, dilation)),
      dilation(dilation / std::gcd(stride, dilation)),
      extra(0) {
  const int64_t phases = std::min(tap_step, kernel);
  if (phases > kMostPhases) return;
  RowRegion all{};
  for (int64_t k = 0; k < phases; ++k) {
    const int64_t position = first + dilation * k, count = CeilDiv(kernel - k, tap_step);
    const int64_t offset = (is_transposed ? CeilDiv : FloorDiv)(position, stride);
    const int64_t span = (count - 1) * this->dilation;
    if (!is_transposed) {
      taps.Add({k, count, position - offset * stride, offset});
      regions.Add({position - offset * stride, offset, span});
      continue;
    }
    taps.Add({k, count, offset * stride - position, offset});
    const int64_t end = std::max(all.first + all.extra, offset + span);
    const int64_t begin = std::min(all.first, offset);
    all = k == 0 ? RowRegion{0, offset, span} : RowRegion{0, begin, end - begin};
  }
  if (is_transposed) regions.Add(all);
  extra = Start(regions.Size(), 0);
}

int64_t RowAxis::Start(int64_t region, int64_t count) const {
  int64_t start = region * count;
  for (int64_t i = 0; i < region; ++i) start += regions[i].extra;
  return start;
}

int64_t RowAxis::Read(int64_t i, int64_t count) const {
  const int64_t region = std::min(i, regions.Size() - 1);
  return Start(region, count) + taps[i].offset - regions[region].first;
}

RowAxis::Range RowAxis::Meeting(int64_t out_phase) const {
  if (write_step == 1) return {0, taps.Size()};
  for (int64_t i = 0; i < taps.Size(); ++i) {
    if (taps[i].phase == out_phase) return {i, i + 1};
  }
  return {0, 0};
}

std::vector<int64_t> RowAxis::Order() const {
  std::vector<int64_t> order;
  order.reserve(kernel);
  for (const RowTaps& some : taps) {
    for (int64_t i = 0; i < some.count; ++i) order.push_back(some.first + i * tap_step);
  }
  return order;
}

int64_t RowAxis::Before(int64_t i) const {
  int64_t before = 0;
  for (int64_t j = 0; j < i; ++j) before += taps[j].count;
  return before;
}

}  // namespace jax_dwbp
