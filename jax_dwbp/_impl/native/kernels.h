// What the schedulers of channels (channel_schedule.cc, channel_reduction.cc) ask of the vector code
// (channel_moves.cc, channel_lanes.cc, channel_sums.cc), compiled once for each instruction set.
//
// Both speak of lines: 64 bytes that hold 16 float32 or 8 float64 values, one for each of as many
// adjacent channels. Arrays of the caller are packed into lines of scratch, by which layout, data type,
// padding, stride and depth multiplier are out of the way, and results are emitted from lines. Where an
// array consists of lines, small filters read it in place, and results are written in place. Half types
// are widened to float32 as they are loaded, if that is one operation, and else as they are packed.

#ifndef JAX_DWBP_KERNELS_H_
#define JAX_DWBP_KERNELS_H_

#include <cstdint>

namespace jax_dwbp {

struct PlaneKernels;
struct RowKernels;
struct RowMoves;
struct RowSums;

struct alignas(64) Line {
  unsigned char bytes[64];
};

// Columns of an array of the caller, and the planes of lines that they are packed to or emitted from.
// Channel b * lanes + l of multiple m lies in lane l of plane b * multiplier + m.
struct ChannelCopy {
  void* data;            // the first channel of column 0
  Line* lines;           // the first line of the first plane
  int64_t plane;         // lines from one plane to the next
  int64_t channels;      // how many
  int64_t multiplier;    // values for each channel
  int64_t column_step;   // elements from one column to the next
  int64_t channel_step;  // elements from one value of a column to the next
  int64_t ahead = 0;     // elements to what is packed next, to be fetched where values lie side by side
};

inline constexpr int64_t kFirstPhase = 0;

// The columns that are packed: line p of phase i takes column stride * (first + p) + phases[i], or
// zeros if there is none. Phases follow each other in a plane. Without a stride there is one phase.
struct PackedColumns {
  const int64_t* phases = &kFirstPhase;
  int64_t phase_count = 1;
  int64_t stride = 1;
  int64_t first = 0;
  int64_t width;  // lines for each phase
  int64_t size;   // columns that there are
};

// Rows of the caller's array that will be read next, or what comes next in a single row, to be fetched:
// in steps of a column the caches don't foresee it. They lie side by side.
struct Ahead {
  const char* data;
  int64_t rows;
};

// What is read: packed rows, with lines of zeros for the padding, or rows of the caller's array. Blocks
// that are computed apart have the same rows, and another start in all of them.
struct Source {
  const char* const* rows;  // that the rows of the filter meet
  int64_t row_count;
  int64_t start_bytes;   // from each of `rows` to the first block of channels
  int64_t column_bytes;  // from what a tap reads for one column to what it reads for the next
  int64_t line_bytes;    // from one line of a row to the next; both are 64 if packed
  int64_t block_bytes;   // from one block of channels to the next
  bool packed;
  Ahead ahead{};
};

// Taps of a slice of a filter that reads in place. Larger ones meet a line so often that packing it,
// close to others, saves more than it costs.
constexpr int64_t kInPlaceTaps = 49;

// A running sum over columns has at most so many.
constexpr int64_t kReductionColumns = 128;

// A column of the filter, for the output columns t = 0, 1, ... of one row.
struct Tap {
  int64_t read;        // bytes to what t = 0 reads, of each row
  int64_t weight;      // the line of its weight, of each row of the filter
  int64_t begin, end;  // where t meets more than padding; in a correlation 0 <= begin <= end <= columns
};

// One row of the result or, where the kernel takes two at a time, two. Rows that only the first of them
// reads come first, then those that both read, then those that only the second reads.
struct Convolution {
  Source in;
  const Line* const* weights[2];  // the rows of the filter, for each row of the result
  int64_t weight_start;           // lines from each of these to the weights of the first block
  int64_t both_begin, both_end;
  const Tap* taps;
  int64_t tap_count;
  int64_t columns;
  char* out[2]{};        // null for a second row that there is not
  int64_t column_bytes;  // in `out`, from one column to the next
  // Rounds lines to those of `out` and stores them there, or null where these are as they are computed.
  void (*store)(const Line* lines, int64_t columns, char* out, int64_t column_bytes);
  int64_t blocks;                   // of one line of channels each
  int64_t weight_lines, out_bytes;  // from one block to the next
};

struct Correlation {
  Source in;
  Source dy;          // one row
  Line* const* sums;  // of the rows of the filter
  int64_t sum_start;  // lines from each of these to the sums of the first block
  const Tap* taps;
  int64_t tap_count;
  int64_t columns;
  int64_t blocks;
  int64_t sum_lines;  // from one block to the next
};

// Of one instruction set and one data type.
struct ChannelMoves {
  bool by_vectors;  // planes of channels that are apart
  void (*pack)(const ChannelCopy&, const PackedColumns&);
  void (*emit)(const ChannelCopy&, int64_t columns);
  // See Convolution.
  void (*store)(const Line* lines, int64_t columns, char* out, int64_t column_bytes);
  // a[i] += b[i]
  void (*add)(Line* a, const Line* b, int64_t lines);
};

struct ChannelKernels {
  int64_t rows;  // of the result that `convolve` takes at a time
  // out[i][t] = sum over rows and taps of what tap reads for t * weights[i][r][tap.weight]
  void (*convolve)(const Convolution&);
  // The same of rows of the caller's array, or null if these have to be packed.
  void (*convolve_in_place)(const Convolution&);
};

struct ChannelSums {
  // sums[r][tap.weight] += sum over t of dy[t] * what tap reads for t
  void (*correlate)(const Correlation&);
  // The same of rows of the caller's arrays, both of them, or null.
  void (*correlate_in_place)(const Correlation&);
};

// By data type.
extern const ChannelMoves BaselineChannelMoves[4];
extern const ChannelMoves Avx2ChannelMoves[4];
extern const ChannelMoves Avx512ChannelMoves[4];
extern const ChannelKernels BaselineChannelKernels[4];
extern const ChannelKernels Avx2ChannelKernels[4];
extern const ChannelKernels Avx512ChannelKernels[4];
extern const ChannelSums BaselineChannelSums[4];
extern const ChannelSums Avx2ChannelSums[4];
extern const ChannelSums Avx512ChannelSums[4];

// Those of rows are in row_lanes.h, those of planes in plane_lanes.h.
struct Kernels {
  int64_t lanes;         // values in a line
  int64_t element_size;  // of the caller's arrays
  const ChannelMoves* channel_moves;
  const ChannelKernels* channel_lanes;
  const ChannelSums* channel_sums;
  const RowMoves* row_moves;
  const RowKernels* row_lanes;
  const RowSums* row_sums;
  const PlaneKernels* plane_lanes;  // or null
};

enum class Type { kFloat16, kBFloat16, kFloat32, kFloat64 };

const Kernels& BaselineKernels(Type type);
#ifdef JAX_DWBP_X86
const Kernels& Avx2Kernels(Type type);
const Kernels& Avx512Kernels(Type type);
#endif

}  // namespace jax_dwbp

#endif  // JAX_DWBP_KERNELS_H_
