// The vector code of rows. What vectors.h says of instruction sets holds here too.

#include "row_lanes.h"

#include <type_traits>

#include "kernels.h"
#include "lines.h"
#include "vectors.h"

// kRows rows of kLines lines of a result are held in registers: twice, as a running sum and as the sum
// of those before it. What is loaded for one row of the filter serves as many rows of the result.
#if defined(__AVX512F__)
#define ROWS 4
#define LINES 3
#define LINES_OF_ONE 4
#elif defined(__AVX2__) || defined(__aarch64__)
#define ROWS 2
#define LINES 1
#define LINES_OF_ONE 2
#else
#define ROWS 1
#define LINES 1
#define LINES_OF_ONE 1
#endif

namespace jax_dwbp {
namespace {

// So many running sums are added one after the other, then such sums pairwise: those of a piece of few
// rows, which may be four, count as one.
constexpr int64_t kGroup = 4;
// Taps of a long row that make a running sum.
constexpr int64_t kRowPart = 16;

template <typename T, int kRows, int kLines>
struct Sums {
  typename Vector<T>::type of[kRows][kLines][kVectors];

  // What was added is added before what comes next: else more is loaded at once than there are
  // registers.
  INLINE void KeepOrder() {
    UNROLL for (int o = 0; o < kRows; ++o) {
      UNROLL for (int l = 0; l < kLines; ++l) {
        UNROLL for (int v = 0; v < kVectors; ++v) IN_ORDER(of[o][l][v]);
      }
    }
  }
  INLINE void Add(const Sums& others) {
    UNROLL for (int o = 0; o < kRows; ++o) {
      UNROLL for (int l = 0; l < kLines; ++l) {
        UNROLL for (int v = 0; v < kVectors; ++v) of[o][l][v] += others.of[o][l][v];
      }
    }
  }
};

// How a line is read.
template <typename T>
struct ReadsEach {
  INLINE explicit ReadsEach(const RowConvolution&) {}
  INLINE typename Vector<T>::type operator()(const T* from) const {
    return Load<T>(reinterpret_cast<const char*>(from));
  }
};

#if defined(__AVX512F__)
// Half a line of values has all that a line reads, (lanes + repeats - 2) / repeats + 1 of them. Of two
// repeats that would be one more, but there lines start with a first one.
template <typename T>
struct ReadsRepeated {
  __m512i places;

  INLINE explicit ReadsRepeated(const RowConvolution& conv) {
    alignas(64) std::conditional_t<sizeof(T) == 4, int32_t, int64_t> values[kLanes<T>];
    int64_t place = 0, repeat = conv.read_before;
    for (int l = 0; l < kLanes<T>; ++l) {
      values[l] = place;
      if (++repeat == conv.repeats) repeat = 0, ++place;
    }
    places = _mm512_load_si512(values);
  }
  INLINE __m512 operator()(const float* from) const {
    return _mm512_permutexvar_ps(places, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
  }
  INLINE __m512d operator()(const double* from) const {
    return _mm512_permutexvar_pd(places, _mm512_castpd256_pd512(_mm256_loadu_pd(from)));
  }
};
#endif

// A filter's sizes, if they are known when this is compiled, or 0.
template <int rows = 0, int columns = 0>
struct Known {
  static constexpr int kRows = rows, kColumns = columns;
};

// Adds what some taps of a row of the filter give to the rows `first` to `last` of the
// result; row `first` meets it by row r of the filter, the next by r - 1.
template <typename T, typename R, int kRows, int kLines>
INLINE void AddTap(Sums<T, kRows, kLines>& sums, const R& reads, const T* read, int64_t line_step,
                   const T* weight, int64_t row_weights, int first, int last) {
  using V = typename Vector<T>::type;
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  UNROLL for (int v = 0; v < kVectors; ++v) {
    V x[kLines];
    UNROLL for (int l = 0; l < kLines; ++l) {
      x[l] = reads(read + l * line_step + v * kStep);
      if (first < last) IN_ORDER(x[l]);
    }
    UNROLL for (int o = 0; o < kRows; ++o) {
      if (o < first || o > last) continue;
      V w = *reinterpret_cast<const V*>(weight - (o - first) * row_weights + v * kStep);
      if (kLines > 1) IN_ORDER(w);
      UNROLL for (int l = 0; l < kLines; ++l) sums.of[o][l][v] += x[l] * w;
    }
  }
}

// Adds what a piece of few rows gives, whose number is known: then so is what meets what.
template <int kPieceRows, typename T, typename R, int kRows, int kLines>
INLINE void AddPiece(Sums<T, kRows, kLines>& total, Sums<T, kRows, kLines>& sums,
                     const RowConvolution& conv, const R& reads, const T* row, const T* weights,
                     int64_t line) {
  constexpr int kChainRows = 2;
  const int64_t weight_step = conv.weight_step * kLanes<T>;
  UNROLL for (int i = 0; i < kPieceRows + kRows - 1; ++i, row += conv.in_step) {
    AS_POINTER(row);
    UNROLL for (int o = 0; o < kRows; ++o) {
      const int r = i - o;
      if (r <= 0 || r >= kPieceRows || r % kChainRows > 0) continue;
      UNROLL for (int l = 0; l < kLines; ++l) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
          total.of[o][l][v] += sums.of[o][l][v];
          sums.of[o][l][v] = typename Vector<T>::type{};
        }
      }
    }
    const int first = Max(0, i - kPieceRows + 1), last = Min(i, kRows - 1);
    const T* weight = weights + (i - first) * weight_step;
    for (int64_t s = 0; s < conv.column_count; ++s, weight += kLanes<T>) {
      AddTap(sums, reads, row + conv.columns[s], line, weight, weight_step, first, last);
    }
  }
}

// Adds what a piece gives if it has one of these numbers of rows.
template <int... kPieceRows, typename T, typename R, int kRows, int kLines>
INLINE bool AddKnown(Sums<T, kRows, kLines>& total, Sums<T, kRows, kLines>& sums,
                     const RowConvolution& conv, const R& reads, int64_t rows, const T* row,
                     const T* weights, int64_t line) {
  const auto add = [&](auto piece_rows) __attribute__((always_inline)) {
    AddPiece<decltype(piece_rows)::value>(total, sums, conv, reads, row, weights, line);
    return true;
  };
  return ((rows == kPieceRows && add(Index<kPieceRows>())) || ...);
}

// The sums of a filter of any size.
template <typename T, int kRows, int kLines, typename R>
INLINE Sums<T, kRows, kLines> SumAny(const RowConvolution& conv, const R& reads, const T* in,
                                     int64_t line) {
  const T* const weights = reinterpret_cast<const T*>(conv.weights);
  const int64_t columns = conv.column_count, weight_step = conv.weight_step * kLanes<T>;
  const int64_t parts = columns < kLongRow ? 1 : (columns + kRowPart - 1) / kRowPart;
  const int64_t chain_rows = ChainRows(Max(columns, 1));
  Sums<T, kRows, kLines> total = {}, sums = {}, pairs[kLevels];
  int64_t chained = 0, chains = 0, groups = 0;
  const auto chain = [&]() __attribute__((always_inline)) {
    total.Add(sums);
    sums = {};
    chained = 0;
    if (++chains < kGroup) return;
    // Like a binary counter: where a bit is set, a sum of as many groups waits for its pair.
    int level = 0;
    for (; groups >> level & 1; ++level) total.Add(pairs[level]);
    pairs[level] = total;
    total = {};
    chains = 0;
    ++groups;
  };
  const RowPiece *const pieces = conv.pieces, *const end = pieces + conv.piece_count;
  for (const RowPiece* piece = pieces; piece < end; ++piece) {
    const T* row = in + piece->first;
    const T* const first_weight = weights + piece->weight * kLanes<T>;
    if (kRows > 1 && parts == 1 &&
        AddKnown<1, 2, 3, 5, 7>(total, sums, conv, reads, piece->rows, row, first_weight, line)) {
      chain();
      continue;
    }
    for (int64_t i = 0; i < piece->rows + kRows - 1; ++i, row += conv.in_step) {
      const int64_t first = Max(0, i - piece->rows + 1), last = Min(i, kRows - 1);
      const T* weight = first_weight + (i - first) * weight_step;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * columns / parts, part_end = (part + 1) * columns / parts;
        WithRows<kRows>(first, last, [&](auto first, auto last) __attribute__((always_inline)) {
          constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
          for (int64_t s = begin; s < part_end; ++s, weight += kLanes<T>) {
            AddTap(sums, reads, row + conv.columns[s], line, weight, weight_step, kFirst, kLast);
          }
        });
        if (++chained == chain_rows) chain();
      }
    }
  }
  total.Add(sums);
  for (int level = 0; groups >> level; ++level) {
    if (groups >> level & 1) total.Add(pairs[level]);
  }
  return total;
}

// From what a column of the filter reads to what the next one reads, if that is the same for all.
INLINE int64_t TapStep(const RowConvolution& conv) {
  return conv.column_count > 1 ? conv.columns[1] - conv.columns[0] : 0;
}

// Whether it is one piece with as many rows and columns, whose columns are as far apart as each other.
template <typename F>
bool Is(const RowConvolution& conv) {
  bool is = conv.piece_count == 1 && conv.pieces->rows == F::kRows &&
            conv.column_count == F::kColumns && conv.weight_step == F::kColumns;
  for (int s = 1; is && s < F::kColumns; ++s) {
    is = conv.columns[s] - conv.columns[s - 1] == TapStep(conv);
  }
  return is;
}

// The sums of a filter of few taps, without a branch.
template <typename T, typename F, int kRows, int kLines>
INLINE Sums<T, kRows, kLines> SumKnown(const RowConvolution& conv, const T* in, int64_t line) {
  using V = typename Vector<T>::type;
  constexpr int kChainRows = ChainRows(F::kColumns);
  const T* const weights = reinterpret_cast<const T*>(conv.weights + conv.pieces->weight);
  const int64_t tap_step = TapStep(conv);
  const ReadsEach<T> reads(conv);
  Sums<T, kRows, kLines> total = {}, sums = {};
  in += conv.pieces->first + conv.columns[0];
  UNROLL for (int i = 0; i < kRows + F::kRows - 1; ++i, in += conv.in_step) {
    const T* read = in;
    AS_POINTER(read);
    UNROLL for (int o = 0; o < kRows; ++o) {
      const int r = i - o;
      if (r < 0 || r >= F::kRows || r % kChainRows) continue;
      UNROLL for (int l = 0; l < kLines; ++l) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
          if (r > 0) total.of[o][l][v] += sums.of[o][l][v];
          sums.of[o][l][v] = V{};
        }
      }
    }
    const int first = Max(0, i - F::kRows + 1), last = Min(i, kRows - 1);
    const T* weight = weights + (i - first) * F::kColumns * kLanes<T>;
    AS_POINTER(weight);
    UNROLL for (int s = 0; s < F::kColumns; ++s, read += tap_step, weight += kLanes<T>) {
      AddTap(sums, reads, read, line, weight, F::kColumns * kLanes<T>, first, last);
      AS_POINTER(read);
    }
    sums.KeepOrder();
  }
  total.Add(sums);
  return total;
}

// Lines of a result that are computed together: side by side or, of the same columns, from one row of
// lines to the next. Then come as many others beside them.
template <typename S>
struct Block {
  const typename Compute<S>::type* in;
  S* out;
  int64_t in_line, out_line;   // from one line to the next
  int64_t rows, rows_of_line;  // of the result, of which the first line has the first ones
  int64_t values;              // of each line
  int64_t blocks;              // beside each other
  int64_t in_step, out_step;   // from one of them to the next
};

template <typename S, typename F, typename R, int kRows, int kLines>
__attribute__((noinline)) void ConvolveBlocks(const RowConvolution& convolution, const R& reads,
                                              const Block<S>& block) {
  using T = typename Compute<S>::type;
  // A copy, which no result that is stored may change.
  const RowConvolution conv = convolution;
  const T* in = block.in;
  S* first_out = block.out;
  for (int64_t i = 0; i < block.blocks; ++i, in += block.in_step, first_out += block.out_step) {
    Sums<T, kRows, kLines> sums;
    if constexpr (F::kRows > 0) {
      sums = SumKnown<T, F, kRows, kLines>(conv, in, block.in_line);
    } else {
      sums = SumAny<T, kRows, kLines>(conv, reads, in, block.in_line);
    }
    // Not all of the addresses are to be found ahead of the blocks, of which there may be one.
    UNROLL for (int l = 0; l < kLines; ++l) {
      S* out = first_out + l * block.out_line;
      int64_t rows = block.rows - l * block.rows_of_line;
      AS_POINTER(rows);
      UNROLL for (int o = 0; o < kRows; ++o, out += conv.out_step) {
        AS_POINTER(out);
        if (o < rows) StoreLine<S, T>(sums.of[o][l], block.values, out);
        // What is written next, of which a processor would wait for each line.
        if (o + kRows * kLines < rows) __builtin_prefetch(out + kRows * kLines * conv.out_step, 1);
      }
    }
  }
}

// The template of a number of lines that is known when it runs.
template <typename S, typename F, typename R, int kRows, int kLines>
INLINE void ConvolveStacked(const RowConvolution& conv, const R& reads, const Block<S>& block,
                            int64_t lines) {
  if constexpr (kLines > 1) {
    if (lines != kLines) return ConvolveStacked<S, F, R, kRows, kLines - 1>(conv, reads, block, lines);
  }
  ConvolveBlocks<S, F, R, kRows, kLines>(conv, reads, block);
}

template <typename S, typename F, typename R, int kRows, int kLines>
void ConvolveRows(const RowConvolution& conv) {
  using T = typename Compute<S>::type;
  const T* in = reinterpret_cast<const T*>(conv.in) + conv.first;
  S* out = static_cast<S*>(conv.out);
  const R reads(conv);
  const int64_t whole_lines =
      conv.width < kLanes<T> ? 0 : (conv.width - kLanes<T>) / conv.line_step + 1;
  const int64_t blocks = whole_lines / kLines, in_line = conv.line_step / conv.repeats;
  const int64_t in_step = kLines * in_line, out_step = kLines * conv.line_step;
  for (int64_t rows = conv.rows; rows > 0; rows -= kRows * kLines) {
    const int64_t lines = Min((rows + kRows - 1) / kRows, kLines);
    for (int64_t line = 0; line < lines && blocks > 0; ++line) {
      const int64_t row = line * kRows;
      ConvolveBlocks<S, F, R, kRows, kLines>(
          conv, reads,
          {in + row * conv.in_step, out + row * conv.out_step, in_line, conv.line_step, rows - row, 0,
           kLanes<T>, blocks, in_step, out_step});
    }
    // What is left of the columns.
    for (int64_t j = blocks * kLines; j * conv.line_step < conv.width; ++j) {
      const int64_t value = j * conv.line_step;
      ConvolveStacked<S, F, R, kRows, kLines>(
          conv, reads,
          {in + j * in_line, out + value, kRows * conv.in_step, kRows * conv.out_step, rows, kRows,
           conv.width - value, 1, 0, 0},
          lines);
    }
    in += kRows * kLines * conv.in_step, out += kRows * kLines * conv.out_step;
  }
}

// How filters are read that nothing is known of.
template <typename S, typename R>
INLINE void ConvolveAny(const RowConvolution& conv) {
  if (conv.by_row) return ConvolveRows<S, Known<>, R, 1, LINES_OF_ONE>(conv);
  ConvolveRows<S, Known<>, R, ROWS, LINES>(conv);
}

template <typename S>
void Convolve(const RowConvolution& conv) {
  using T = typename Compute<S>::type;
#if defined(__AVX512F__)
  if (conv.repeats > 1) return ConvolveAny<S, ReadsRepeated<T>>(conv);
#endif
  if constexpr (sizeof(T) == 4) {
    if (!conv.by_row && Is<Known<3, 3>>(conv)) {
      return ConvolveRows<S, Known<3, 3>, ReadsEach<T>, ROWS, LINES>(conv);
    }
  }
  ConvolveAny<S, ReadsEach<T>>(conv);
}

template <typename S>
constexpr RowKernels Table() {
  return {ROWS, BY_VECTORS, Convolve<S>};
}

}  // namespace

const RowKernels OF_INSTRUCTION_SET(RowKernels)[4] = {Table<Half>(), Table<Brain>(), Table<float>(),
                                                      Table<double>()};

}  // namespace jax_dwbp
