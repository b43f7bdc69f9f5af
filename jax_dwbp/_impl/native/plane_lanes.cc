// The vector code of planes.

#include "plane_lanes.h"

#include "kernels.h"
#include "lines.h"
#include "vectors.h"

namespace jax_dwbp {

#if defined(__AVX512F__)
namespace {

template <typename S, int kLines>
INLINE void ConvolveLines(const PlaneConvolution& conv, int64_t line) {
  using T = typename Compute<S>::type;
  using V = typename Vector<T>::type;
  const S* const filter = static_cast<const S*>(conv.filter);
  const S* const in = static_cast<const S*>(conv.in) + line * kLanes<T>;
  const uint16_t* masks = conv.masks + line * conv.tap_count;
  const int64_t chain = ChainRows(conv.kernel_columns) * conv.kernel_columns;
  V total[kLines] = {}, sums[kLines];
  for (int64_t tap = 0; tap < conv.tap_count;) {
    const int64_t end = Min(tap + chain, conv.tap_count);
    UNROLL for (int l = 0; l < kLines; ++l) sums[l] = V{};
    for (; tap < end; ++tap, masks += kPlaneLines) {
      T value;
      Convert(filter[conv.weights[tap]], value);
      const V weight = value - V{};  // in all lanes
      const S* const read = in + conv.reads[tap];
      UNROLL for (int l = 0; l < kLines; ++l) {
        const auto x = Widened<S>(LoadMasked(read + l * kLanes<T>, masks[l]));
        sums[l] += reinterpret_cast<V>(x) * weight;
      }
    }
    UNROLL for (int l = 0; l < kLines; ++l) total[l] += sums[l];
  }
  UNROLL for (int l = 0; l < kLines; ++l) {
    const V out[kVectors] = {total[l]};
    const int64_t first = (line + l) * kLanes<T>;
    StoreLine<S, T>(out, conv.values - first, static_cast<S*>(conv.out) + first);
  }
}

// The template of a number of lines that is known when it runs.
template <typename S, int kLines>
INLINE void ConvolveUpTo(const PlaneConvolution& conv, int64_t line, int64_t lines) {
  if constexpr (kLines > 1) {
    if (lines < kLines) return ConvolveUpTo<S, kLines - 1>(conv, line, lines);
  }
  ConvolveLines<S, kLines>(conv, line);
}

template <typename S>
void Convolve(const PlaneConvolution& conv) {
  const int64_t lines = (conv.values - 1) / kLanes<typename Compute<S>::type> + 1;
  for (int64_t line = 0; line < lines; line += kPlaneLines) {
    ConvolveUpTo<S, kPlaneLines>(conv, line, Min(kPlaneLines, lines - line));
  }
}

}  // namespace

const PlaneKernels OF_INSTRUCTION_SET(PlaneKernels)[4] = {
    {Convolve<Half>}, {Convolve<Brain>}, {Convolve<float>}, {Convolve<double>}};
#endif

}  // namespace jax_dwbp
