// What is known of a filter when the vector code of channels is compiled.

#ifndef JAX_DWBP_CHANNEL_FILTER_H_
#define JAX_DWBP_CHANNEL_FILTER_H_

#include "kernels.h"
#include "vectors.h"

// ROWS rows of COLUMNS columns of a result, and the sums of TAPS taps, are held in registers: a line
// each, in 16 registers or, with AVX-512 and on arm64, 32. 7 divides the sizes of ImageNet's feature
// maps.
#if defined(__AVX512F__)
#define ROWS 2
#define COLUMNS 7
#define TAPS 14
#elif defined(__AVX2__)
#define ROWS 1
#define COLUMNS 7
#define TAPS 7
#else
#define ROWS 1
#if defined(__aarch64__)
#define COLUMNS 6
#define TAPS 6
#else
#define COLUMNS 2
#define TAPS 2
#endif
#endif

namespace jax_dwbp {
namespace {

// Whether arrays of S are read in place: half types are where one operation widens a line.
template <typename S>
constexpr bool kReadsInPlace = sizeof(S) >= 4 || VECTOR_BYTES == 64;

// What is known of a filter when this is compiled, or 0: its taps, which read adjacent lines, how many
// lines the columns are apart, and the rows that only the first of two rows of the result reads, that
// both read and that only the second reads. A single row is the first.
template <int taps = 0, int stride = 1, int first = 0, int both = 0, int second = 0>
struct Filter {
  static constexpr int kTaps = taps, kStride = stride;
  // What computes least for what it reads.
  static constexpr bool kReads = taps == 3 && stride == 2 && COLUMNS > 4;
  static constexpr int kFirst = first, kBoth = both, kAll = first + both + second;
};

// Columns at a time, and where rows are long and taps few.
template <typename F>
constexpr int kMost = F::kReads ? 4 : COLUMNS;
template <typename F>
constexpr int kFewer = 0 < F::kTaps && F::kTaps <= 3 && kVectors == 1 ? (kMost<F> + 1) / 2 : kMost<F>;

// Taps of a long row that are added at once: else each line is loaded for each tap. Few columns are not
// worth the time to compile it.
constexpr int kTapsAtOnce = TAPS / ROWS;
template <typename T, int kColumns>
constexpr bool kAddsAtOnce = kVectors == 1 && sizeof(T) == 4 && 2 * kColumns > COLUMNS;

// Lines that are read for some columns.
template <typename F, int kColumns>
constexpr int kLines = F::kStride * (kColumns - 1) + F::kTaps;

// One tap after the other, or the other way round: packed, the last of a phase and the first of the
// next may lie side by side too.
INLINE bool AreAdjacent(const Source& in, const Tap* taps, int64_t count) {
  bool adjacent = true;
  for (int64_t i = 1; i < count; ++i) {
    adjacent &= taps[i].read == taps[i - 1].read + in.line_bytes;
    adjacent &= taps[i].weight - taps[i - 1].weight == taps[1].weight - taps[0].weight;
  }
  return adjacent;
}

}  // namespace
}  // namespace jax_dwbp

#endif  // JAX_DWBP_CHANNEL_FILTER_H_
