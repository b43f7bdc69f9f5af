// What the scheduler of planes (plane_schedule.cc) asks of the vector code (plane_lanes.cc), which is
// compiled for AVX-512 only.
//
// Here a vector is a part of a small plane, whose rows follow one another in it: of rows that are
// narrower than a vector it has several. Nothing is packed. What a tap reads beside a row, or above or
// below the plane, is left out by a mask, and the masks are the same for all planes.

#ifndef JAX_DWBP_PLANE_LANES_H_
#define JAX_DWBP_PLANE_LANES_H_

#include <cstdint>

namespace jax_dwbp {

// Columns of a filter: more would be long chains of sums.
constexpr int64_t kMostPlaneColumns = 15;
// Lines that are computed together.
constexpr int64_t kPlaneLines = 4;

// A plane of a result, of the caller's arrays.
struct PlaneConvolution {
  const void* in;
  const void* filter;
  void* out;
  int64_t values;  // of the result
  int64_t kernel_columns, tap_count;
  const int64_t* weights;  // of each tap: elements from `filter` to its weight,
  const int64_t* reads;    // elements from `in` to what it reads for the first value,
  // and a bit for each value that it reads: of kPlaneLines for all taps, then of the next ones.
  const uint16_t* masks;
};

// Of one data type.
struct PlaneKernels {
  void (*convolve)(const PlaneConvolution&);
};

extern const PlaneKernels Avx512PlaneKernels[4];

}  // namespace jax_dwbp

#endif  // JAX_DWBP_PLANE_LANES_H_
