// Calls the native kernel as XLA does, without XLA or Python, so that sanitizers see nothing else.
//
// Each array lies in memory of its own and of exactly its size. Operands are small integers, whose sums
// are exact in what the kernel sums in: results are compared without a tolerance.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../jax_dwbp/_impl/native/kernels.h"
#include "host.h"

// The vector code is compiled for one instruction set, the one that the kernel chooses on this machine.
#ifdef JAX_DWBP_X86
namespace jax_dwbp {
#ifdef __AVX2__
const Kernels& BaselineKernels(Type) { std::abort(); }
#endif
#if defined(__AVX512F__) || !defined(__AVX2__)
const Kernels& Avx2Kernels(Type) { std::abort(); }
#endif
#ifndef __AVX512F__
const Kernels& Avx512Kernels(Type) { std::abort(); }
#endif
}  // namespace jax_dwbp
#endif

// What all allocations go through, those of arrays too.
void* operator new(size_t size) {
  CountAllocation();
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t size, std::align_val_t alignment) {
  CountAllocation();
  const size_t align = static_cast<size_t>(alignment);
  if (void* memory = std::aligned_alloc(align, (size + align - 1) / align * align)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

// ---------------------------------------------------------------------------------------------------
// Arrays.

struct Type {
  XLA_FFI_DataType code;
  const char* name;
  int64_t size;
  double rounding;  // by how much of it a result may be off, being rounded to this type
};
constexpr Type kTypes[] = {{XLA_FFI_DataType_F16, "float16", 2, 0x1p-11},
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
void Store(const Type& type, double value, char* to) {
  if (type.code == XLA_FFI_DataType_F64) return Write(value, to);
  if (type.code == XLA_FFI_DataType_F16) return Write(static_cast<_Float16>(value), to);
  char single[4];
  Write(static_cast<float>(value), single);
  std::memcpy(to, single + 4 - type.size, type.size);
}
double Load(const Type& type, const char* from) {
  if (type.code == XLA_FFI_DataType_F64) return Read<double>(from);
  if (type.code == XLA_FFI_DataType_F16) return static_cast<double>(Read<_Float16>(from));
  char single[4] = {};
  std::memcpy(single + 4 - type.size, from, type.size);
  return Read<float>(single);
}

// [G,N,H,W,D], or [G,R,S,C,M] of a filter, where G is an axis of problems.
struct Array {
  int64_t dims[5];
  std::vector<double> values;

  Array(int64_t g, int64_t n, int64_t h, int64_t w, int64_t d)
      : dims{g, n, h, w, d}, values(g * n * h * w * d) {}
  double* At(int64_t i, int64_t j, int64_t k, int64_t l) {
    return &values[(((i * dims[1] + j) * dims[2] + k) * dims[3] + l) * dims[4]];
  }
};

// An array as the kernel gets it.
struct Buffer {
  const Type& type;
  const Array& array;
  std::vector<int64_t> order;  // of the array's values
  std::vector<int64_t> dims;
  std::vector<char> bytes;

  Buffer(const Type& type, const Array& array, bool channels_first, bool has_problems)
      : type(type), array(array), dims(array.dims + !has_problems, array.dims + 5) {
    // Not a number, which a result that is not written remains.
    bytes.assign(array.values.size() * type.size, '\xff');
    const int64_t depths = array.dims[4], pixels = array.dims[2] * array.dims[3];
    for (int64_t image = 0; image < array.dims[0] * array.dims[1]; ++image) {
      for (int64_t i = 0; i < pixels * depths; ++i) {
        const int64_t in_image = channels_first ? i % pixels * depths + i / pixels : i;
        order.push_back(image * pixels * depths + in_image);
      }
    }
    if (channels_first) std::rotate(dims.end() - 3, dims.end() - 1, dims.end());
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

// ---------------------------------------------------------------------------------------------------
// Problems.

enum Op : int64_t { kForward, kInputGrad, kFilterGrad };
constexpr const char* kOps[] = {"forward", "input_grad", "filter_grad"};

struct Spec {
  int64_t batch, size[2], channels, kernel[2], multiplier;
  int64_t stride[2] = {1, 1}, low[2] = {0, 0}, high[2] = {0, 0}, dilation[2] = {1, 1};

  int64_t Out(int i) const {
    const int64_t reach = (kernel[i] - 1) * dilation[i] + 1, padded = size[i] + low[i] + high[i];
    return padded < reach ? 0 : (padded - reach) / stride[i] + 1;
  }
};

// Random operands of an op, and what it makes of them.
struct Problem {
  Spec spec;
  Op op;
  int64_t problems;  // 0 if there is no axis of them
  bool shared;       // is the filter
  Array x, f, y;

  Problem(const Spec& spec, Op op, int64_t problems, bool shared, std::mt19937& random)
      : spec(spec),
        op(op),
        problems(problems),
        shared(shared),
        x(std::max<int64_t>(problems, 1), spec.batch, spec.size[0], spec.size[1], spec.channels),
        f(shared ? 1 : x.dims[0], spec.kernel[0], spec.kernel[1], spec.channels, spec.multiplier),
        y(x.dims[0], spec.batch, spec.Out(0), spec.Out(1), spec.channels * spec.multiplier) {
    std::uniform_int_distribution<int> digit(-3, 3);
    for (Array* array : {&x, &f, &y}) {
      if (array == (op == kForward ? &y : op == kInputGrad ? &x : &f)) continue;
      for (double& value : array->values) value = digit(random);
    }
    // The ops are derivatives of one trilinear form: sums of products of an x, an f and a y that meet.
    for (int64_t p = 0; p < y.dims[2]; ++p) {
      for (int64_t r = 0; r < spec.kernel[0]; ++r) {
        const int64_t h = p * spec.stride[0] - spec.low[0] + r * spec.dilation[0];
        if (0 <= h && h < spec.size[0]) AddRow(p, r, h);
      }
    }
  }

 private:
  void AddRow(int64_t p, int64_t r, int64_t h) {
    for (int64_t q = 0; q < y.dims[3]; ++q) {
      for (int64_t s = 0; s < spec.kernel[1]; ++s) {
        const int64_t w = q * spec.stride[1] - spec.low[1] + s * spec.dilation[1];
        if (w < 0 || w >= spec.size[1]) continue;
        for (int64_t g = 0; g < x.dims[0]; ++g) {
          double* const fs = f.At(g % f.dims[0], r, s, 0);
          for (int64_t n = 0; n < spec.batch; ++n) AddPixel(x.At(g, n, h, w), fs, y.At(g, n, p, q));
        }
      }
    }
  }
  void AddPixel(double* xs, double* fs, double* ys) {
    for (int64_t d = 0; d < y.dims[4]; ++d) {
      double &x = xs[d / spec.multiplier], &f = fs[d], &y = ys[d];
      if (op == kForward) y += x * f;
      if (op == kInputGrad) x += f * y;
      if (op == kFilterGrad) f += x * y;
    }
  }
};

void Fail(const Problem& problem, const Type& type, bool channels_first, const char* why) {
  std::string text = std::string(kOps[problem.op]) + " " + type.name;
  if (channels_first) text += " channels_first";
  const auto add = [&](const char* name, const int64_t* values, int count) {
    text += std::string(" ") + name;
    for (int i = 0; i < count; ++i) text += (i ? "," : "=") + std::to_string(values[i]);
  };
  add("x", problem.x.dims, 5), add("f", problem.f.dims, 5), add("y", problem.y.dims, 5);
  add("stride", problem.spec.stride, 2), add("low", problem.spec.low, 2);
  add("dilation", problem.spec.dilation, 2);
  std::printf("%s: %s\n", text.c_str(), why);
  std::fflush(stdout);
  std::_Exit(1);
}

// False if the handler had no memory.
bool Check(const Problem& problem, const Type& type, bool channels_first, Arrival arrival,
           int64_t allocations = INT64_MAX) {
  const Spec& spec = problem.spec;
  const bool has_problems = problem.problems > 0;
  XLA_FFI_ExecutionContext pool{arrival};
  bool had_memory = true;
  {
    Buffer x(type, problem.x, channels_first, has_problems);
    Buffer f(type, problem.f, false, has_problems && !problem.shared);
    Buffer y(type, problem.y, channels_first, has_problems);
    Buffer& a = problem.op == kInputGrad ? f : x;
    Buffer& b = problem.op == kForward ? f : y;
    Buffer& result = problem.op == kForward ? y : problem.op == kInputGrad ? x : f;
    a.Fill(), b.Fill();
    const Request request{kOps[problem.op],
                          channels_first,
                          {spec.stride[0], spec.stride[1]},
                          {spec.low[0], spec.low[1]},
                          {spec.dilation[0], spec.dilation[1]},
                          {a.ForXla(), b.ForXla(), result.ForXla()}};
    allocations_left = allocations;
    const std::unique_ptr<XLA_FFI_Error> error(Handle(request, pool));
    had_memory = !error || error->code != XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
    if (error && (had_memory || allocations == INT64_MAX)) {
      Fail(problem, type, channels_first, error->message.c_str());
    }
    if (!error && !result.IsRight()) Fail(problem, type, channels_first, "the result is wrong");
  }
  pool.Finish();
  return had_memory;
}

// ---------------------------------------------------------------------------------------------------
// Which problems.

// What one thread does, for these channels, for whole lines of them and for some that are left over.
constexpr int64_t kFar = 1 << 30;
const Spec kSmall[] = {
    {2, {5, 6}, 3, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {2, {5, 6}, 3, {3, 3}, 2, {1, 1}, {1, 1}, {1, 1}},
    {1, {6, 5}, 1, {3, 2}, 8, {1, 1}, {1, 0}, {1, 1}},
    {1, {7, 8}, 2, {3, 3}, 3, {2, 2}, {1, 0}, {1, 1}},
    {1, {8, 7}, 2, {5, 5}, 1, {2, 2}, {1, 2}, {2, 2}},
    {1, {7, 9}, 2, {3, 4}, 1, {1, 3}, {1, 0}, {1, 1}},
    {1, {9, 10}, 2, {2, 3}, 1, {3, 5}},
    {1, {5, 6}, 2, {3, 3}, 2, {2, 1}, {2, 1}, {0, 3}},
    {1, {4, 5}, 2, {2, 3}, 1, {1, 2}, {4, 0}, {1, 6}},
    {1, {9, 11}, 2, {3, 3}, 4, {3, 2}, {0, 0}, {0, 0}, {2, 3}},
    {1, {3, 2}, 2, {7, 6}, 1, {1, 1}, {3, 2}, {3, 3}},
    {1, {9, 8}, 2, {9, 8}, 1, {1, 1}, {4, 3}, {4, 4}},
    {1, {12, 3}, 1, {40, 2}, 1, {1, 1}, {20, 0}, {19, 1}},
    {1, {2, 70}, 2, {1, 60}, 1, {1, 2}, {0, 29}, {0, 30}},
    {2, {3, 4}, 5, {1, 1}, 2},
    {2, {1, 12}, 3, {1, 4}, 1, {1, 1}, {0, 3}, {0, 0}},
    {1, {5, 7}, 1, {3, 7}, 3, {2, 2}},
    {1, {2, 11}, 2, {5, 8}, 1, {3, 6}, {10, 7}, {9, 10}, {1, 3}},
    // Of which 32 bits can't hold the products.
    {1, {3, 4}, 2, {3, 3}, 1, {1, 1}, {kFar, kFar}, {kFar, kFar}, {kFar, kFar}},
    {1, {3, 4}, 2, {2, 2}, 1, {3 * kFar, 3 * kFar}, {3 * kFar - 1, 0}, {kFar, 3 * kFar}},
};
// What several threads do: images, bands of rows, tiles of long rows, chunks of channels, large sums.
const Spec kLarge[] = {
    {2, {19, 18}, 51, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {3, {15, 16}, 24, {5, 5}, 2, {2, 2}, {2, 1}, {2, 2}},
    {1, {20, 20}, 16, {9, 9}, 1, {1, 1}, {4, 4}, {4, 4}},
    {1, {2, 3100}, 16, {2, 3}, 1, {1, 1}, {0, 1}, {1, 1}},
    {2, {1, 1000}, 16, {1, 5}, 1, {1, 1}, {0, 4}, {0, 0}},
    {1, {2, 90}, 32, {1, 70}, 1, {1, 1}, {0, 35}, {0, 34}},
    {1, {4, 3}, 500, {9, 9}, 2, {1, 1}, {4, 4}, {4, 4}},
    {40, {12, 11}, 3, {3, 3}, 1, {2, 2}, {0, 0}, {1, 1}},
    {1, {9, 3}, 3, {9, 10}, 1, {1, 1}, {4, 540}, {4, 540}, {1, 60}},
    {1, {17, 543}, 3, {9, 10}, 1, {1, 1}, {0, 0}, {0, 0}, {1, 60}},
    // By rows: bands, tiles, small planes, dilated rows, the last of which are computed in vain.
    {1, {67, 300}, 3, {5, 5}, 1, {1, 1}, {2, 2}, {2, 2}},
    {1, {1, 9000}, 1, {1, 20}, 1, {1, 1}, {0, 9}, {0, 10}},
    {30, {9, 8}, 5, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {1, {23, 19}, 7, {3, 4}, 1, {1, 1}, {3, 3}, {3, 3}, {3, 2}},
};
// The least that several threads do, packed and in place, to do it many times.
const Spec kFew[] = {
    {12, {12, 11}, 18, {3, 3}, 2, {2, 2}, {1, 1}, {1, 1}},
    {12, {12, 11}, 18, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {12, {30, 21}, 3, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
};
constexpr int kRandom = 500;

class Calls {
 public:
  int Count() const { return count_; }

  // By each op in each layout and type. The rest is drawn.
  void All(const Spec& spec) {
    for (const Op op : {kForward, kInputGrad, kFilterGrad}) {
      const Problem problem = Draw(spec, op);
      for (const Type& type : kTypes) {
        for (const bool channels_first : {false, true}) {
          const Arrival arrival = DrawArrival();
          // On a thread of its own, whose scratch has no room left over.
          std::thread([&] { Check(problem, type, channels_first, arrival); }).join();
          ++count_;
        }
      }
    }
  }
  // By each op, without memory for one allocation after the other, until there are no more. What XLA's
  // headers do with a pool that refuses a task takes memory of its own.
  void Exhausted(const Spec& spec) {
    for (const Op op : {kForward, kInputGrad, kFilterGrad}) {
      const Problem problem = Draw(spec, op);
      for (const Arrival arrival : {kAtOnce, kTooLate}) {
        for (const bool all : {false, true}) Exhausted(problem, arrival, all);
      }
    }
  }
  // In the scratch that there is.
  void Random() {
    Spec spec{
        Pick(1, 3), {Pick(1, 14), Pick(1, 40)}, Pick(1, 40), {Pick(1, 7), Pick(1, 9)}, Pick(1, 4)};
    for (int i = 0; i < 2; ++i) {
      spec.stride[i] = Pick(1, 4), spec.dilation[i] = Pick(1, 3);
      spec.low[i] = Pick(0, 8), spec.high[i] = Pick(0, 8);
    }
    if (spec.Out(0) == 0 || spec.Out(1) == 0) return;
    const Problem problem = Draw(spec, static_cast<Op>(Pick(0, 2)));
    const Type& type = kTypes[Pick(0, 3)];
    const bool channels_first = Pick(0, 1) == 1;
    Check(problem, type, channels_first, DrawArrival());
    ++count_;
  }

 private:
  void Exhausted(const Problem& problem, Arrival arrival, bool all) {
    all_fail = all;
    int failures = 0;
    bool enough = false;
    for (int64_t allocations = 0; !enough; ++allocations) {
      std::thread([&] {
        failures += !Check(problem, kTypes[2], false, arrival, allocations);
        enough = allocations_left >= 0;
        // Whatever was left behind, the next call works.
        Check(problem, kTypes[2], false, arrival);
      }).join();
      count_ += 2;
    }
    if (failures == 0) Fail(problem, kTypes[2], false, "no allocation failed");
  }
  int64_t Pick(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  Problem Draw(const Spec& spec, Op op) {
    const int64_t problems = Pick(0, 2);
    const bool shared = problems > 0 && Pick(0, 1) == 1;
    return Problem(spec, op, problems, shared, random_);
  }
  // At once, half of them.
  Arrival DrawArrival() { return static_cast<Arrival>(std::max<int64_t>(Pick(-2, 3), 0)); }

  std::mt19937 random_{1};
  int count_ = 0;
};

}  // namespace

// With `small` all problems, else those of several threads.
int main(int count, char** arguments) {
  Calls calls;
  for (const Spec& large : kLarge) calls.All(large);
  for (const Spec& few : kFew) calls.Exhausted(few);
  if (count > 1 && arguments[1] == std::string("small")) {
    for (const Spec& small : kSmall) {
      for (const int64_t channels : {small.channels, int64_t{16}, int64_t{35}}) {
        Spec spec = small;
        spec.channels = channels;
        calls.All(spec);
      }
    }
    for (int i = 0; i < kRandom; ++i) calls.Random();
  }
  std::printf("%d calls\n", calls.Count());
}
