// The vector code of filter gradients by rows. What vectors.h says of instruction sets holds
// here too.

#include "kernels.h"
#include "lines.h"
#include "row_lanes.h"
#include "vectors.h"

// The sums of so many columns of three rows of the filter are held in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
#define SUM_COLUMNS 7
#else
#define SUM_COLUMNS 3
#endif

namespace jax_dwbp {
namespace {

constexpr int kSumRows = 3;
// A running sum of one lane has at most so many products, but for those of one row.
constexpr int64_t kChainLines = 128;

// Adds the products of one row with those that `first` to `last` of the rows of dy meet there.
template <typename T, int kRows, int kColumns>
INLINE void AddLines(typename Vector<T>::type (&sums)[kRows][kColumns], const RowCorrelation& corr,
                     const T* read, const T* dy, int64_t dy_rows_step, int first, int last) {
  using V = typename Vector<T>::type;
  for (int64_t line = 0; line < corr.lines; ++line, dy += corr.line_step, read += corr.line_step) {
    V u[kRows];
    UNROLL for (int i = 0; i < kRows; ++i) {
      if (i < first || i > last) continue;
      u[i] = Load<T>(reinterpret_cast<const char*>(dy - (i - first) * dy_rows_step));
      IN_ORDER(u[i]);
    }
    const T* x = read;
    UNROLL for (int s = 0; s < kColumns; ++s, x += corr.tap_step) {
      AS_POINTER(x);
      V value = Load<T>(reinterpret_cast<const char*>(x));
      if (first < last) IN_ORDER(value);
      UNROLL for (int i = 0; i < kRows; ++i) {
        if (i >= first && i <= last) sums[i][s] += value * u[i];
      }
    }
  }
}

// The sums of kRows rows of the filter from row r on, and of kColumns columns from s on, of the vector
// v of each line.
template <typename T, int kRows, int kColumns>
__attribute__((noinline)) void SumTaps(const RowCorrelation& corr, int64_t r, int64_t s, int64_t v) {
  using V = typename Vector<T>::type;
  constexpr int64_t kStep = VECTOR_BYTES / sizeof(T);
  const int64_t rows = Min(kRows, corr.kernel_rows - r);
  const T* read = reinterpret_cast<const T*>(corr.in) + corr.first + s * corr.tap_step + v * kStep;
  const T* const dys = reinterpret_cast<const T*>(corr.dy) + corr.dy_first + v * kStep;
  T* const totals = reinterpret_cast<T*>(corr.sums + r * corr.sum_step + s) + v * kStep;
  V sums[kRows][kColumns] = {};
  int64_t chained = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    UNROLL for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      UNROLL for (int k = 0; k < kColumns; ++k) {
        *reinterpret_cast<V*>(totals + (i * corr.sum_step + k) * kLanes<T>) += sums[i][k];
        sums[i][k] = V{};
      }
    }
    chained = 0;
  };
  // A division takes as long as the products of a short row.
  const auto in_steps = [&](int64_t count) {
    return corr.row_dilation == 1 ? count : count / corr.row_dilation;
  };
  for (int64_t row = 0; row < corr.in_rows; ++row, read += corr.in_step) {
    // The row of dy that meets it by row r of the filter, and how many rows of the filter meet it too
    // early or too late.
    const int64_t met = row - corr.offset - r * corr.row_dilation;
    if (met < 0) continue;
    const int64_t late = met - corr.dy_rows + 1;
    const int64_t first = late <= 0 ? 0 : in_steps(late + corr.row_dilation - 1);
    const int64_t last = Min(in_steps(met), rows - 1);
    if (first > last) continue;
    const T* const dy = dys + (met - first * corr.row_dilation) * corr.dy_step;
    WithRows<kRows>(first, last, [&](auto first, auto last) __attribute__((always_inline)) {
      constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
      AddLines(sums, corr, read, dy, corr.row_dilation * corr.dy_step, kFirst, kLast);
    });
    chained += corr.lines;
    if (chained + corr.lines > kChainLines) flush();
  }
  flush();
}

// The template of a number of columns that is known when it runs.
template <typename T, int kRows, int kColumns>
INLINE void SumColumns(const RowCorrelation& corr, int64_t r, int64_t s, int64_t v, int64_t columns) {
  if constexpr (kColumns > 1) {
    if (columns != kColumns) return SumColumns<T, kRows, kColumns - 1>(corr, r, s, v, columns);
  }
  SumTaps<T, kRows, kColumns>(corr, r, s, v);
}

template <typename T>
void Correlate(const RowCorrelation& corr) {
  const int64_t parts = (corr.kernel_columns + SUM_COLUMNS - 1) / SUM_COLUMNS;
  for (int64_t r = 0; r < corr.kernel_rows; r += kSumRows) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t s = part * corr.kernel_columns / parts;
      const int64_t columns = (part + 1) * corr.kernel_columns / parts - s;
      for (int64_t v = 0; v < kVectors; ++v) {
        if (corr.kernel_rows == 1) {
          SumColumns<T, 1, SUM_COLUMNS>(corr, r, s, v, columns);
        } else {
          SumColumns<T, kSumRows, SUM_COLUMNS>(corr, r, s, v, columns);
        }
      }
    }
  }
}

// Of values that are folded, those that others are added to: half of the periods.
INLINE int64_t Kept(int64_t values, int64_t period) {
  return ((values + period - 1) / period + 1) / 2 * period;
}

#if defined(__AVX512F__)
// What lies further behind in a line, where there is a bit, and zeros.
INLINE __m512 Behind(__m512 line, __m512i places, uint32_t mask) {
  return _mm512_maskz_permutexvar_ps(mask, places, line);
}
INLINE __m512d Behind(__m512d line, __m512i places, uint32_t mask) {
  return _mm512_maskz_permutexvar_pd(mask, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(places)), line);
}

// What Fold does, of a period that a line has.
template <typename T>
INLINE void FoldLines(const RowFold& fold, const T* from, T* to) {
  constexpr int kSteps = 4;
  __m512i places[kSteps];
  uint32_t masks[kSteps];
  int steps = 0;
  for (int64_t values = fold.values, kept; values > fold.period; values = kept, ++steps) {
    kept = Kept(values, fold.period);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    places[steps] = _mm512_add_epi32(lanes, _mm512_set1_epi32(kept));
    masks[steps] = (uint32_t{1} << (values - kept)) - 1;
  }
  const int64_t values = Min(fold.values, fold.period), at_once = Min(values, fold.period - fold.first);
  for (int64_t tap = 0; tap < fold.taps; ++tap, from += kLanes<T>, to += fold.period) {
    auto line = LoadRaw(from, kLanes<T>);
    for (int step = 0; step < steps; ++step) line += Behind(line, places[step], masks[step]);
    // What is stored by a mask would be waited for by the next tap.
    T folded[kLanes<T>];
    __builtin_memcpy(folded, &line, sizeof(folded));
    for (int64_t i = 0; i < at_once; ++i) to[fold.first + i] += folded[i];
    for (int64_t i = at_once; i < values; ++i) to[i - at_once] += folded[i];
  }
}
#endif

// Adds the values of each place of a period, pairwise.
template <typename T>
void Fold(const RowFold& fold) {
  const T* from = reinterpret_cast<const T*>(fold.from);
  T* to = reinterpret_cast<T*>(fold.to);
#if defined(__AVX512F__)
  if (fold.period <= kLanes<T>) return FoldLines(fold, from, to);
#endif
  for (int64_t tap = 0; tap < fold.taps; ++tap, from += kLanes<T>, to += fold.period) {
    T folded[kLanes<T>];
    __builtin_memcpy(folded, from, sizeof(folded));
    int64_t values = fold.values;
    for (int64_t kept; values > fold.period; values = kept) {
      kept = Kept(values, fold.period);
      for (int64_t i = 0; i < values - kept; ++i) folded[i] += folded[kept + i];
    }
    for (int64_t i = 0; i < values; ++i) to[(fold.first + i) % fold.period] += folded[i];
  }
}

// Adds what the parts of a sum have for each value, pairwise, and stores it.
template <typename S>
void Join(const RowJoin& join) {
  using T = typename Compute<S>::type;
  T* const parts = reinterpret_cast<T*>(join.parts);
  const int64_t values = join.tap_count * join.period;
  for (int64_t count = join.part_count, half; count > 1; count = half) {
    half = (count + 1) / 2;
    for (int64_t part = 0; part < count - half; ++part) {
      T *a = parts + part * join.part_step, *b = a + half * join.part_step;
      for (int64_t i = 0; i < values; ++i) a[i] += b[i];
    }
  }
  for (int64_t tap = 0; tap < join.tap_count; ++tap) {
    S* const to = static_cast<S*>(join.to) + join.taps[tap] * join.tap_step;
    for (int64_t i = 0; i < join.period; ++i) Convert(parts[tap * join.period + i], to[i]);
  }
}

template <typename S>
constexpr RowSums Table() {
  using T = typename Compute<S>::type;
  return {Correlate<T>, Fold<T>, Join<S>};
}

}  // namespace

const RowSums OF_INSTRUCTION_SET(RowSums)[4] = {Table<Half>(), Table<Brain>(), Table<float>(),
                                                Table<double>()};

}  // namespace jax_dwbp
