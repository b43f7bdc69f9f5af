// What the schedulers of rows (row_schedule.cc, row_reduction.cc) ask of the vector code (row_moves.cc,
// row_lanes.cc, row_sums.cc), which is compiled once for each instruction set.
//
// Here a vector, of as many values as a line has, is a part of a row: of a row of pixels with few
// channels, whose weights repeat themselves from pixel to pixel, or of a row of a plane, whose weights
// are all alike. To read another column is to read a few values further on, from any address. What is
// read was packed to rows with zeros around them, as float32 or float64; results are rounded and stored
// where the caller wants them.

#ifndef JAX_DWBP_ROW_LANES_H_
#define JAX_DWBP_ROW_LANES_H_

#include <cstdint>

namespace jax_dwbp {

struct Line;

// Lines that a pixel may have.
constexpr int64_t kMostLinesOfPixel = 8;

// How pixels of the caller's array are packed, in elements. Value v of a pixel is v / repeats *
// value_step behind its first one. The vector code of each instruction set asks it, so all is inlined:
// one of their copies must not be linked for all CPUs.
struct RowPixels {
  int64_t period;  // values
  int64_t repeats, value_step;
  int64_t column_step;  // from one pixel to the next

  __attribute__((always_inline)) bool AreDense() const {
    return repeats == 1 && value_step == 1 && column_step == period;
  }
  // From the first value of a pixel to behind its last one.
  __attribute__((always_inline)) int64_t Span() const {
    return (period - 1) / repeats * value_step + 1;
  }
  // Pixels that two lines have and one line holds, of which 0 says less than a whole one.
  __attribute__((always_inline)) int64_t AtOnce(int64_t lanes) const {
    const int64_t read = (2 * lanes - Span()) / column_step + 1;
    return read < lanes / period ? read : lanes / period;
  }
};

// Rows of the caller's array, to be packed.
struct RowCopy {
  const void* from;
  int64_t from_step;  // elements from one row to the next
  int64_t rows;
  RowPixels pixels;
  int64_t count;  // values of a row
  Line* to;
  int64_t first;          // values from `to` to the first that is copied
  int64_t to_step;        // from one row to the next
  int64_t before, after;  // zeros in front of a row and behind it
  int64_t ahead;          // bytes to what is copied next, to be fetched, or 0
};

// The weights of a filter, to be packed: a line for each tap.
struct RowWeights {
  const void* from;
  const int64_t* taps;  // which of the filter's comes first, and so on
  int64_t tap_count;
  int64_t tap_step;    // elements from one tap to the next
  int64_t period;      // values of a tap, which are repeated
  int64_t first;       // that of them with which a line starts
  int64_t value_step;  // elements from one of them to the next
  Line* to;
};

// Phases of rows of a result, to be stored: pixel t * phases + i of a row is the t-th of phase i. Of
// two phases lines are read behind what counts.
struct RowInterleave {
  const void* from;
  int64_t from_step;      // elements from one phase to the next
  int64_t from_row_step;  // and from one row to the next
  int64_t rows;
  int64_t phases, period;
  int64_t count;  // values of a row of the result
  void* to;
  int64_t to_step;  // elements from one row to the next
};

// Of one instruction set and one data type.
struct RowMoves {
  bool by_vectors;  // pixels that are not dense and, of two phases, those of a result
  void (*copy)(const RowCopy&);
  void (*weights)(const RowWeights&);
  void (*interleave)(const RowInterleave&);
};

// Rows of the filter that read rows of the source which lie side by side: row r of them meets row p of
// the result in row p + r of what is packed.
struct RowPiece {
  int64_t first;   // the value that row 0 reads for row 0
  int64_t weight;  // the line of its first weight
  int64_t rows;
};

// Rows of a result, which are a sum of pieces.
struct RowConvolution {
  const Line* in;
  int64_t first;    // values from there to what the first line reads
  int64_t in_step;  // and from one row to the next
  // Each value that is packed is read so often, as the results of a depth multiplier do. So many
  // repeats of the first one come before the first line.
  int64_t repeats, read_before;
  const RowPiece* pieces;
  int64_t piece_count;
  // Of the filter: the values from what a row's first value is to what each reads.
  const int64_t* columns;
  int64_t column_count;
  const Line* weights;
  int64_t weight_step;  // lines from one row of the filter to the next
  int64_t rows, width;  // of the result
  int64_t line_step;    // results from one line to the next: a multiple of the weights' period
  void* out;
  int64_t out_step;  // elements from one row to the next
  bool by_row;       // no rows are computed together
};

// Of one instruction set and one data type.
struct RowKernels {
  // Rows are computed so many at a time: behind the last one there may be anything, but must be memory.
  int64_t rows;
  bool can_repeat;  // what it reads
  void (*convolve)(const RowConvolution&);
};

// A filter gradient. Row p of dy and tap row r meet in row p + offset + r * row_dilation of what is
// packed, if there is such a row. Only rows that there are are packed, but columns with zeros around
// them.
struct RowCorrelation {
  const Line* in;
  int64_t first;  // the value that the first tap reads for the first line
  int64_t in_step, in_rows;
  const void* dy;  // packed or of the caller, of which a line is read to its end behind what counts
  int64_t dy_first, dy_step, dy_rows;
  int64_t offset, row_dilation;
  int64_t kernel_rows, kernel_columns;
  int64_t tap_step;          // values from one column of the filter to the next
  int64_t lines, line_step;  // of a row
  Line* sums;                // of each tap, to which is added
  int64_t sum_step;          // lines from one row of the filter to the next
};

// The values of lines that are a sum, of which the first `values` count, are added to one value for
// each place of the period, with place `first` as the first.
struct RowFold {
  const Line* from;
  int64_t taps, period, first, values;
  Line* to;
};

// Parts of the sums of a filter are joined and stored.
struct RowJoin {
  Line* parts;
  int64_t part_count;
  int64_t part_step;    // values from one part to the next
  const int64_t* taps;  // which of the filter's is the first, and so on
  int64_t tap_count, period;
  void* to;
  int64_t tap_step;  // elements from one tap to the next
};

struct RowSums {
  void (*correlate)(const RowCorrelation&);
  void (*fold)(const RowFold&);
  void (*join)(const RowJoin&);
};

// By data type.
extern const RowMoves BaselineRowMoves[4];
extern const RowMoves Avx2RowMoves[4];
extern const RowMoves Avx512RowMoves[4];
extern const RowSums BaselineRowSums[4];
extern const RowSums Avx2RowSums[4];
extern const RowSums Avx512RowSums[4];
extern const RowKernels BaselineRowKernels[4];
extern const RowKernels Avx2RowKernels[4];
extern const RowKernels Avx512RowKernels[4];

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_LANES_H_
