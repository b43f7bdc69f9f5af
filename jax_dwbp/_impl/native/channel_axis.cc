// Which taps meet which phases, and from where to where (see channel_axis.h).

#include "channel_axis.h"

#include <numeric>

namespace jax_dwbp {

void Axis::Add(int64_t k, int64_t offset, int64_t read_phase) {
  const int64_t write_phase = starts.size() - 1, index = taps.size();
  AxisTap tap{};
  tap.k = k;
  tap.offset = offset;
  tap.next = -1;
  tap.begin = -offset;
  tap.end = CeilDiv(read_size - read_phase, read_step) - offset;
  const int64_t end = std::min(tap.end, Count(write_phase, write_size));
  if (std::max<int64_t>(tap.begin, 0) >= end) return;
  const bool is_first = phases.empty();
  first = is_first ? tap.offset : std::min(first, tap.offset);
  last = is_first ? tap.offset : std::max(last, tap.offset);
  if (index - starts.back() < period) {
    if (is_first || phases.back() != read_phase) phases.push_back(read_phase);
    tap.phase = phases.size() - 1;
  } else {
    AxisTap& other = taps[index - period];
    tap.phase = other.phase;
    if (other.offset == tap.offset + 1) {
      other.next = index;
      tap.is_next = true;
    } else if (other.offset == tap.offset - 1) {
      tap.next = index - period;
      other.is_next = true;
    }
  }
  taps.push_back(tap);
}

int64_t Window::Distance(int64_t k) const { return dilation * k - low; }
int64_t Window::Period() const { return stride / std::gcd(stride, dilation); }

Axis ForwardAxis(int64_t in, int64_t out, const Window& window) {
  Axis axis{.read_size = in, .write_size = out, .read_step = window.stride, .period = 0};
  for (int64_t k = 0; k < std::min(window.Period(), window.kernel); ++k) {
    axis.period += window.Phase(k) < in;  // else its phase is empty
  }
  axis.taps.reserve(window.kernel);
  for (int64_t k = 0; k < window.kernel; ++k) axis.Add(k, window.Offset(k), window.Phase(k));
  axis.starts.push_back(axis.taps.size());
  return axis;
}

Axis TransposedAxis(int64_t in, int64_t out, const Window& window) {
  Axis axis{.read_size = out, .write_size = in, .write_step = window.stride, .falls = true};
  axis.taps.reserve(window.kernel);
  const int64_t phases = std::min(window.stride, in), period = window.Period();
  // The first k of each phase.
  std::vector<int64_t> first(phases, window.kernel);
  for (int64_t k = 0; k < std::min(period, window.kernel); ++k) {
    if (window.Phase(k) < in) first[window.Phase(k)] = k;
  }
  axis.starts.reserve(phases + 1);
  for (int64_t k : first) {
    for (; k < window.kernel; k += period) axis.Add(k, -window.Offset(k), 0);
    axis.starts.push_back(axis.taps.size());
  }
  return axis;
}

}  // namespace jax_dwbp
