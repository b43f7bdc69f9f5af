// Calls the native kernel as XLA does, without XLA or Python, so that sanitizers see nothing else.
//
// Each array lies in memory of its own and of exactly its size. Operands are small integers, whose sums
// are exact in what the kernel sums in: results are compared without a tolerance.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../jax_dwbp/_impl/native/kernels.h"
#include "arrays.h"
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
// Problems.

enum Op : int64_t { kForward, kInputGrad, kFilterGrad };
constexpr const char* kOps[] = {"forward", "input_grad", "filter_grad"};

struct Axis {
  int64_t size = 1, kernel = 1, stride = 1, low = 0, high = 0, dilation = 1;

  int64_t Out() const {
    const int64_t reach = (kernel - 1) * dilation + 1, padded = size + low + high;
    return padded < reach ? 0 : (padded - reach) / stride + 1;
  }
  // What tap k reads to write p, or -1.
  int64_t Read(int64_t p, int64_t k) const {
    const int64_t read = p * stride - low + k * dilation;
    return 0 <= read && read < size ? read : -1;
  }
  // Whether it can be left out.
  bool IsNone() const { return size == 1 && kernel == 1 && Out() == 1; }
};

// Of rows and columns, and of what more there is.
struct Spec {
  int64_t batch, size[2], channels, kernel[2], multiplier;
  int64_t stride[2] = {1, 1}, low[2] = {0, 0}, high[2] = {0, 0}, dilation[2] = {1, 1};
  Axis depth{};

  Axis Of(int axis) const {
    if (axis == 0) return depth;
    const int i = axis - 1;
    return {size[i], kernel[i], stride[i], low[i], high[i], dilation[i]};
  }
  bool IsEmpty() const { return Of(0).Out() == 0 || Of(1).Out() == 0 || Of(2).Out() == 0; }
  // The axes that there are at least.
  int LeastAxes() const { return !Of(0).IsNone() ? 3 : !Of(1).IsNone() ? 2 : 1; }
};

// Random operands of an op, and what it makes of them.
struct Problem {
  Spec spec;
  Op op;
  int64_t problems;  // 0 if there is no axis of them
  bool shared;       // is the filter
  int axes;
  Axis depth, rows, columns;
  Array x, f, y;

  Problem(const Spec& spec, Op op, int64_t problems, bool shared, int axes, std::mt19937& random)
      : spec(spec),
        op(op),
        problems(problems),
        shared(shared),
        axes(axes),
        depth(spec.Of(0)),
        rows(spec.Of(1)),
        columns(spec.Of(2)),
        x({std::max<int64_t>(problems, 1), spec.batch, depth.size, rows.size, columns.size,
           spec.channels}),
        f({shared ? 1 : x.dims[0], depth.kernel, rows.kernel, columns.kernel, spec.channels,
           spec.multiplier}),
        y({x.dims[0], spec.batch, depth.Out(), rows.Out(), columns.Out(),
           spec.channels * spec.multiplier}) {
    std::uniform_int_distribution<int> digit(-3, 3);
    for (Array* array : {&x, &f, &y}) {
      if (array == (op == kForward ? &y : op == kInputGrad ? &x : &f)) continue;
      for (double& value : array->values) value = digit(random);
    }
    // The ops are derivatives of one trilinear form: sums of products of an x, an f and a y that meet.
    for (int64_t o = 0; o < depth.Out(); ++o) {
      for (int64_t k = 0; k < depth.kernel; ++k) {
        if (depth.Read(o, k) >= 0) AddSlice(o, k);
      }
    }
  }

 private:
  void AddSlice(int64_t o, int64_t k) {
    for (int64_t p = 0; p < rows.Out(); ++p) {
      for (int64_t r = 0; r < rows.kernel; ++r) {
        if (rows.Read(p, r) >= 0) AddRow(o, k, p, r);
      }
    }
  }
  void AddRow(int64_t o, int64_t k, int64_t p, int64_t r) {
    const int64_t d = depth.Read(o, k), h = rows.Read(p, r);
    for (int64_t q = 0; q < columns.Out(); ++q) {
      for (int64_t s = 0; s < columns.kernel; ++s) {
        const int64_t w = columns.Read(q, s);
        if (w < 0) continue;
        for (int64_t g = 0; g < x.dims[0]; ++g) {
          double* const fs = f.At(g % f.dims[0], {k, r, s, 0});
          for (int64_t n = 0; n < spec.batch; ++n) {
            AddPixel(x.At(g, {n, d, h, w}), fs, y.At(g, {n, o, p, q}));
          }
        }
      }
    }
  }
  void AddPixel(double* xs, double* fs, double* ys) {
    for (int64_t d = 0; d < y.dims[5]; ++d) {
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
  add("x", problem.x.dims, 6), add("f", problem.f.dims, 6), add("y", problem.y.dims, 6);
  for (const Axis& axis : {problem.depth, problem.rows, problem.columns}) {
    add("stride", &axis.stride, 1), add("low", &axis.low, 1), add("dilation", &axis.dilation, 1);
  }
  std::printf("%s: %s\n", text.c_str(), why);
  std::fflush(stdout);
  std::_Exit(1);
}

// False if the handler had no memory.
bool Check(const Problem& problem, const Type& type, bool channels_first, Arrival arrival,
           int64_t allocations = INT64_MAX) {
  const bool has_problems = problem.problems > 0;
  const Layout layout{problem.axes, channels_first ? 0 : 1, has_problems};
  XLA_FFI_ExecutionContext pool{arrival};
  bool had_memory = true;
  {
    Buffer x(type, problem.x, layout), y(type, problem.y, layout);
    Buffer f(type, problem.f, {problem.axes, 2, has_problems && !problem.shared});
    Buffer& a = problem.op == kInputGrad ? f : x;
    Buffer& b = problem.op == kForward ? f : y;
    Buffer& result = problem.op == kForward ? y : problem.op == kInputGrad ? x : f;
    a.Fill(), b.Fill();
    Request request{
        kOps[problem.op], channels_first, {}, {}, {}, {a.ForXla(), b.ForXla(), result.ForXla()}};
    for (int i = 3 - problem.axes; i < 3; ++i) {
      const Axis axis = problem.spec.Of(i);
      request.window_strides.push_back(axis.stride), request.low.push_back(axis.low);
      request.rhs_dilation.push_back(axis.dilation);
    }
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
    // Volumes: depth with padding, strides, dilation, and where slices are images.
    {2, {5, 6}, 3, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {4, 3, 1, 1, 1}},
    {1, {4, 9}, 1, {3, 2}, 2, {2, 1}, {1, 0}, {1, 1}, {1, 1}, {7, 4, 2, 3, 1}},
    {1, {7, 3}, 2, {2, 3}, 3, {1, 2}, {0, 1}, {0, 1}, {2, 1}, {8, 3, 3, 4, 6, 2}},
    {1, {5, 7}, 2, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {6, 1}},
    {1, {4, 4}, 2, {1, 1}, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, {5, 1, 2, 3, 2}},
    {1, {3, 5}, 2, {8, 9}, 1, {1, 1}, {4, 4}, {4, 4}, {1, 1}, {2, 5, 1, 2, 2}},
    {1, {2, 3}, 2, {2, 2}, 2, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {3, 3, 1, kFar, kFar, kFar}},
    // Of one pixel, whose channels lie side by side in planes too.
    {1, {1, 1}, 2, {2, 2}, 1, {1, 1}, {1, 1}},
    {1, {3, 2}, 2, {3, 2}, 1},
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
    {1, {12, 11}, 18, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {6, 3, 1, 1, 1}},
    {2, {11, 20}, 3, {3, 3}, 2, {2, 2}, {1, 1}, {1, 1}, {1, 1}, {5, 3, 2, 1, 1}},
};
// The least that several threads do, packed and in place, to do it many times.
const Spec kFew[] = {
    {12, {12, 11}, 18, {3, 3}, 2, {2, 2}, {1, 1}, {1, 1}},
    {12, {12, 11}, 18, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {12, {30, 21}, 3, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}},
    {2, {12, 11}, 18, {3, 3}, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {6, 2, 1, 1, 0}},
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
    if (Pick(0, 2) == 0) {
      spec.depth = {Pick(1, 6), Pick(1, 4), Pick(1, 3), Pick(0, 4), Pick(0, 4), Pick(1, 3)};
    }
    if (spec.IsEmpty()) return;
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
    return Problem(spec, op, problems, shared, Pick(spec.LeastAxes(), 3), random_);
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
