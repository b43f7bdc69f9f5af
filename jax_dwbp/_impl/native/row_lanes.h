// What the scheduler of rows (row_schedule.cc) asks of the vector code (row_lanes.cc), which is compiled
// once for each instruction set.
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

// Rows of the caller's array, to be packed.
struct RowCopy {
  const void* from;
  int64_t from_step;      // elements from one row to the next
  int64_t rows;
  int64_t count;          // values of a row
  Line* to;
  int64_t first;          // values from `to` to the first that is copied
  int64_t to_step;        // from one row to the next
  int64_t before, after;  // zeros in front of a row and behind it
};

// The weights of a filter, to be packed: a line for each tap.
struct RowWeights {
  const void* from;
  int64_t taps;
  int64_t tap_step;  // elements from one tap to the next
  int64_t period;    // values of a tap, which are repeated
  bool flipped;      // the last tap first
  Line* to;
};

// Rows of a result. Row p and tap row r meet in row p + r of what is packed.
struct RowConvolution {
  const Line* in;        // what the first tap reads for the first row, from its value `first` on
  int64_t first;
  int64_t in_step;       // values from one row to the next
  const Line* weights;
  int64_t kernel_rows, kernel_columns;
  int64_t tap_step;      // values from one column of the filter to the next
  int64_t rows, width;   // of the result
  int64_t line_step;     // values from one line to the next: a multiple of the weights' period
  void* out;
  int64_t out_step;      // elements from one row to the next
  bool by_row;           // no rows are computed together
};

// Of one instruction set and one data type.
struct RowKernels {
  // Rows are computed so many at a time: behind the last one there may be anything, but must be memory.
  int64_t rows;
  void (*copy)(const RowCopy&);
  void (*weights)(const RowWeights&);
  void (*convolve)(const RowConvolution&);
};

// A filter gradient. Row p of dy and tap row r meet in row p + offset + r * row_dilation of what is packed,
// if there is such a row. Only rows that there are are packed, but columns with zeros around them.
struct RowCorrelation {
  const Line* in;
  int64_t first;  // the value that the first tap reads for the first line
  int64_t in_step, in_rows;
  const Line* dy;
  int64_t dy_first, dy_step, dy_rows;
  int64_t offset, row_dilation;
  int64_t kernel_rows, kernel_columns;
  int64_t tap_step;          // values from one column of the filter to the next
  int64_t lines, line_step;  // of a row
  Line* sums;                // of each tap, to which is added
};

// The values of lines that are a sum, of which the first `values` count, are added to one value for each
// place of the period.
struct RowFold {
  const Line* from;
  int64_t taps, period, values;
  Line* to;
};

// Parts of the sums of a filter are joined and stored.
struct RowJoin {
  Line* parts;
  int64_t part_count;
  int64_t part_step;  // values from one part to the next
  int64_t taps, period;
  void* to;
  int64_t tap_step;  // elements from one tap to the next
};

struct RowSums {
  void (*correlate)(const RowCorrelation&);
  void (*fold)(const RowFold&);
  void (*join)(const RowJoin&);
};

// By data type.
extern const RowSums BaselineRowSums[4];
extern const RowSums Avx2RowSums[4];
extern const RowSums Avx512RowSums[4];
extern const RowKernels BaselineRowKernels[4];
extern const RowKernels Avx2RowKernels[4];
extern const RowKernels Avx512RowKernels[4];

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_LANES_H_
