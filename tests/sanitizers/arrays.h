// Arrays of small numbers, and how the kernel gets them: in each type and layout.

#ifndef JAX_DWBP_TESTS_SANITIZERS_ARRAYS_H_
#define JAX_DWBP_TESTS_SANITIZERS_ARRAYS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct Type {
  XLA_FFI_DataType code;
  const char* name;
  int64_t size;
  double rounding;  // by how much of it a result may be off, being rounded to this type
};
inline constexpr Type kTypes[] = {{XLA_FFI_DataType_F16, "float16", 2, 0x1p-11},
                                  {XLA_FFI_DataType_BF16, "bfloat16", 2, 0x1p-8},
                                  {XLA_FFI_DataType_F32, "float32", 4, 0},
                                  {XLA_FFI_DataType_F64, "float64", 8, 0}};

template <typename T>
void Write(T value, char* to) {
  std::memcpy(to, &value, sizeof(T));
}
template <typename T>
T Read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// A bfloat16 is the upper half of a float32, whose lower half is zero for small integers.
inline void Store(const Type& type, double value, char* to) {
  if (type.code == XLA_FFI_DataType_F64) return Write(value, to);
  if (type.code == XLA_FFI_DataType_F16) return Write(static_cast<_Float16>(value), to);
  char single[4];
  Write(static_cast<float>(value), single);
  std::memcpy(to, single + 4 - type.size, type.size);
}
inline double Load(const Type& type, const char* from) {
  if (type.code == XLA_FFI_DataType_F64) return Read<double>(from);
  if (type.code == XLA_FFI_DataType_F16) return static_cast<double>(Read<_Float16>(from));
  char single[4] = {};
  std::memcpy(single + 4 - type.size, from, type.size);
  return Read<float>(single);
}

// [G,N,D,H,W,C], or [G,K,R,S,C,M] of a filter, where G is an axis of problems.
struct Array {
  int64_t dims[6];
  std::vector<double> values;

  explicit Array(const int64_t (&sizes)[6]) {
    std::copy_n(sizes, 6, dims);
    values.resize(std::accumulate(dims, dims + 6, int64_t{1}, std::multiplies<int64_t>()));
  }
  double* At(int64_t g, const int64_t (&place)[4]) {
    for (int i = 0; i < 4; ++i) g = g * dims[1 + i] + place[i];
    return &values[g * dims[5]];
  }
};

// How an array lies in memory: those of its axes that are spatial, and those behind them.
struct Layout {
  int axes, behind;
  bool has_problems;
};

// An array as the kernel gets it.
struct Buffer {
  const Type& type;
  const Array& array;
  std::vector<int64_t> order;  // of the array's values
  std::vector<int64_t> dims;
  std::vector<char> bytes;

  Buffer(const Type& type, const Array& array, const Layout& layout)
      : type(type), array(array), dims(array.dims + !layout.has_problems, array.dims + 6) {
    // Not a number, which a result that is not written remains.
    bytes.assign(array.values.size() * type.size, '\xff');
    const bool channels_first = layout.behind == 0;
    const int64_t channels = array.dims[5], pixels = array.dims[2] * array.dims[3] * array.dims[4];
    for (int64_t image = 0; image < array.dims[0] * array.dims[1]; ++image) {
      for (int64_t i = 0; i < pixels * channels; ++i) {
        const int64_t in_image = channels_first ? i % pixels * channels + i / pixels : i;
        order.push_back(image * pixels * channels + in_image);
      }
    }
    if (channels_first) std::rotate(dims.end() - 4, dims.end() - 1, dims.end());
    // The first of three spatial axes are left out.
    const auto end = dims.end() - layout.behind - layout.axes;
    dims.erase(end - (3 - layout.axes), end);
  }
  void Fill() {
    for (size_t i = 0; i < order.size(); ++i) {
      Store(type, array.values[order[i]], bytes.data() + i * type.size);
    }
  }
  bool IsRight() const {
    for (size_t i = 0; i < order.size(); ++i) {
      const double want = array.values[order[i]], got = Load(type, bytes.data() + i * type.size);
      if (!(std::abs(got - want) <= std::abs(want) * type.rounding)) return false;
    }
    return true;
  }
  XLA_FFI_Buffer ForXla() {
    const int64_t rank = dims.size();
    return {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type.code, bytes.data(), rank, dims.data()};
  }
};

#endif  // JAX_DWBP_TESTS_SANITIZERS_ARRAYS_H_
