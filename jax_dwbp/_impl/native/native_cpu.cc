// What XLA calls: one handler for the three ops on a CPU.
//
// It checks what it is given, chooses the instruction set and the kind of vectors (choice.cc), and
// turns exceptions to errors. In vectors of channels (channel_schedule.cc, channel_reduction.cc) are
// the adjacent channels of one pixel. In vectors of rows (row_schedule.cc, row_reduction.cc) are
// neighbours in a row, which is better where channels are few or lie far apart, and in vectors of
// planes (plane_schedule.cc) several rows, where they are short. Of three spatial axes the first is the
// depth: each kind computes a slice of the result at a time, as one sum over the taps of the depth.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "channel_axis.h"
#include "channel_schedule.h"
#include "choice.h"
#include "kernels.h"
#include "plane_schedule.h"
#include "row_axis.h"
#include "row_schedule.h"
#include "runtime.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dwbp {
namespace {

const Kernels* KernelsFor(ffi::DataType dtype) {
  Type type;
  switch (dtype) {
    case ffi::F16:
      type = Type::kFloat16;
      break;
    case ffi::BF16:
      type = Type::kBFloat16;
      break;
    case ffi::F32:
      type = Type::kFloat32;
      break;
    case ffi::F64:
      type = Type::kFloat64;
      break;
    default:
      return nullptr;
  }
#ifdef JAX_DWBP_X86
  // For tests, and to find out what an instruction set is worth.
  static const std::string most = [] {
    const char* value = std::getenv("JAX_DWBP_MAX_ISA");
    return std::string(value ? value : "");
  }();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && most != "avx2" && most != "baseline") return &Avx512Kernels(type);
  if (avx2 && most != "baseline") return &Avx2Kernels(type);
#endif
  return &BaselineKernels(type);
}

enum class Op { kForward, kInputGrad, kFilterGrad };

std::optional<Op> OpOf(std::string_view name) {
  if (name == "forward") return Op::kForward;
  if (name == "input_grad") return Op::kInputGrad;
  if (name == "filter_grad") return Op::kFilterGrad;
  return std::nullopt;
}

// Depth, rows and columns. An array that has fewer is of size 1 along the first of them.
constexpr size_t kAxes = 3;
constexpr int kDepth = 0, kRows = 1, kColumns = 2;

// The sizes of the three arrays with all axes, be some of size 1: [G,N,D,H,W,C] or [G,N,C,D,H,W] and,
// of f, [G,K,R,S,C,M]. G is of problems.
struct Shapes {
  int64_t x[6] = {1, 1, 1, 1, 1, 1}, f[6] = {1, 1, 1, 1, 1, 1}, y[6] = {1, 1, 1, 1, 1, 1};
};

// Sets the sizes of an array, of which so many dimensions are spatial, and so many lie behind those.
void SetSizes(const ffi::AnyBuffer& array, size_t axes, size_t behind, int64_t* sizes) {
  const ffi::AnyBuffer::Dimensions dims = array.dimensions();
  const auto spatial = dims.end() - behind - axes;
  std::copy_backward(dims.begin(), spatial, sizes + 6 - kAxes - behind);
  std::copy_backward(spatial, dims.end(), sizes + 6);
}

// Of each of these what is wrong, or null. Nothing below looks at it again.
const char* WrongWindow(ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                        ffi::Span<const int64_t> rhs_dilation) {
  const size_t axes = window_strides.size();
  const auto positive = [](ffi::Span<const int64_t> values) {
    return std::all_of(values.begin(), values.end(), [](int64_t value) { return value >= 1; });
  };
  if (axes < 1 || axes > kAxes || !positive(window_strides)) {
    return "`window_strides` must be one to three positive integers";
  }
  if (low.size() != axes) return "`low` must be as many integers as `window_strides`";
  if (rhs_dilation.size() != axes || !positive(rhs_dilation)) {
    return "`rhs_dilation` must be as many positive integers as `window_strides`";
  }
  return nullptr;
}

const char* WrongArrays(size_t axes, const ffi::AnyBuffer& x, const ffi::AnyBuffer& f,
                        const ffi::AnyBuffer& y) {
  const size_t rank = x.dimensions().size(), filter_rank = f.dimensions().size();
  if (f.element_type() != x.element_type() || y.element_type() != x.element_type()) {
    return "x, f and y must be of one dtype";
  }
  if (rank < axes + 2 || rank > axes + 3) {
    return "x must have two or three dimensions more than `window_strides` has integers";
  }
  if (y.dimensions().size() != rank) return "y must have as many dimensions as x";
  if (filter_rank < axes + 2 || filter_rank > rank) {
    return "f must have as many dimensions as x, but for that of problems";
  }
  for (const ffi::AnyBuffer* array : {&x, &f, &y}) {
    if (array->element_count() == 0) return "no array may be empty";
  }
  return nullptr;
}

const char* WrongShapes(const Shapes& shapes, bool shared_filter, bool channels_first) {
  const auto& [x, f, y] = shapes;
  const int channels = channels_first ? 2 : 5;
  if (y[0] != x[0]) return "y must have the problems of x";
  if (!shared_filter && f[0] != x[0]) return "f must have the problems of x";
  if (y[1] != x[1]) return "y must have the batch size of x";
  if (f[4] != x[channels]) return "f must have the channels of x";
  if (y[channels] != f[4] * f[5]) return "y must have the channels of x times the multiplier of f";
  return nullptr;
}

// How the filter lies along each axis.
using Windows = std::array<Window, kAxes>;

Windows WindowsOf(ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                  ffi::Span<const int64_t> rhs_dilation, const Shapes& shapes) {
  const size_t missing = kAxes - window_strides.size();
  Windows windows;
  for (size_t axis = 0; axis < kAxes; ++axis) {
    windows[axis] = {.kernel = shapes.f[1 + axis], .stride = 1, .low = 0, .dilation = 1};
    if (axis < missing) continue;
    windows[axis].stride = window_strides[axis - missing];
    windows[axis].low = low[axis - missing];
    windows[axis].dilation = rhs_dilation[axis - missing];
  }
  return windows;
}

// Where a filter has depth alone, the pixels of a slice become one row: of rows two are computed at a
// time. Dilated ones would have to be packed with all that lie between them.
void TurnDepthToRows(Shapes& shapes, Windows& windows, bool channels_first) {
  int64_t *const x = shapes.x + (channels_first ? 3 : 2), *const y = shapes.y + (x - shapes.x);
  if (windows[kDepth].kernel == 1 || windows[kDepth].dilation > 1) return;
  for (const int axis : {kRows, kColumns}) {
    const auto& [kernel, stride, low, dilation] = windows[axis];
    if (kernel > 1 || stride > 1 || low != 0 || x[axis] != y[axis]) return;
  }
  for (int64_t* sizes : {x, y}) {
    sizes[kColumns] *= std::exchange(sizes[kRows], std::exchange(sizes[kDepth], 1));
  }
  std::swap(shapes.f[1 + kDepth], shapes.f[1 + kRows]);
  std::swap(windows[kDepth], windows[kRows]);
}

// What is asked, once that is known to be right.
struct Request {
  Op op;
  const Kernels& kernels;
  Shapes shapes;
  bool channels_first;
  Windows windows;
  Tensor x, f, y;

  bool IsTransposed() const { return op == Op::kInputGrad; }
  // What is read and what is written or, for a filter gradient, x and y.
  const Tensor& In() const { return IsTransposed() ? y : x; }
  const Tensor& Out() const { return IsTransposed() ? x : y; }
  Sizes ArraySizes() const {
    return {.problems = shapes.x[0],
            .batch = shapes.x[1],
            .channels = shapes.f[4],
            .multiplier = shapes.f[5],
            .kernel_rows = shapes.f[2],
            .kernel_columns = shapes.f[3]};
  }
  int64_t XSize(int axis) const { return shapes.x[(channels_first ? 3 : 2) + axis]; }
  int64_t YSize(int axis) const { return shapes.y[(channels_first ? 3 : 2) + axis]; }
};

DepthAxis DepthAxisOf(const Request& request) {
  const int64_t x = request.XSize(kDepth), y = request.YSize(kDepth);
  const auto& [kernel, stride, low, dilation] = request.windows[kDepth];
  return {.in = request.IsTransposed() ? y : x,
          .out = request.IsTransposed() ? x : y,
          .kernel = kernel,
          .stride = stride,
          .low = low,
          .dilation = dilation,
          .is_transposed = request.IsTransposed()};
}

RowAxis RowAxisOf(const Request& request, int axis) {
  const int64_t x = request.XSize(axis), y = request.YSize(axis);
  const auto& [kernel, stride, low, any_dilation] = request.windows[axis];
  const int64_t dilation = kernel == 1 ? 1 : any_dilation;
  if (!request.IsTransposed()) return RowAxis(x, y, kernel, dilation, -low, stride, false);
  return RowAxis(y, x, kernel, dilation, low - dilation * (kernel - 1), stride, true);
}

Axis ChannelAxisOf(const Request& request, int axis) {
  const int64_t x = request.XSize(axis), y = request.YSize(axis);
  const Window& window = request.windows[axis];
  return request.IsTransposed() ? TransposedAxis(x, y, window) : ForwardAxis(x, y, window);
}

void Dispatch(ffi::ThreadPool& pool, const Request& request) {
  const bool is_filter_grad = request.op == Op::kFilterGrad;
  const RowCall by_rows{.kernels = request.kernels,
                        .sizes = request.ArraySizes(),
                        .channels_first = request.channels_first,
                        .is_transposed = request.IsTransposed(),
                        .depth = DepthAxisOf(request),
                        .rows = RowAxisOf(request, kRows),
                        .columns = RowAxisOf(request, kColumns),
                        .in = request.In(),
                        .filter = request.f,
                        .out = request.Out()};
  switch (Choose(by_rows, is_filter_grad)) {
    case Vectors::kRows:
      return (is_filter_grad ? CorrelateRows : ConvolveRows)(pool, by_rows);
    case Vectors::kPlanes:
      return ConvolvePlanes(pool, by_rows);
    case Vectors::kChannels:
      break;
  }
  const ChannelCall by_channels{.kernels = request.kernels,
                                .sizes = request.ArraySizes(),
                                .is_transposed = request.IsTransposed(),
                                .depth = by_rows.depth,
                                .rows = ChannelAxisOf(request, kRows),
                                .columns = ChannelAxisOf(request, kColumns),
                                .in = request.In(),
                                .filter = request.f,
                                .out = request.Out()};
  (is_filter_grad ? CorrelateChannels : ConvolveChannels)(pool, by_channels);
}

ffi::Error DepthwiseConv2d(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                           ffi::Result<ffi::AnyBuffer> result, std::string_view op_name,
                           ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                           ffi::Span<const int64_t> rhs_dilation, bool channels_first) try {
  const std::optional<Op> op = OpOf(op_name);
  if (!op) return ffi::Error::InvalidArgument("`op` must be forward, input_grad or filter_grad");
  const ffi::AnyBuffer& x = op == Op::kInputGrad ? *result : a;
  const ffi::AnyBuffer& f = op == Op::kForward ? b : op == Op::kInputGrad ? a : *result;
  const ffi::AnyBuffer& y = op == Op::kForward ? *result : b;
  const Kernels* kernels = KernelsFor(x.element_type());
  const char* wrong = kernels ? nullptr : "x must be of float16, bfloat16, float32 or float64";
  if (!wrong) wrong = WrongWindow(window_strides, low, rhs_dilation);
  const size_t axes = window_strides.size();
  if (!wrong) wrong = WrongArrays(axes, x, f, y);
  if (wrong) return ffi::Error::InvalidArgument(wrong);

  Shapes shapes;
  auto& [xs, fs, ys] = shapes;
  const size_t behind = channels_first ? 0 : 1;
  SetSizes(x, axes, behind, xs), SetSizes(f, axes, 2, fs), SetSizes(y, axes, behind, ys);
  const bool shared_filter = f.dimensions().size() < x.dimensions().size();
  if ((wrong = WrongShapes(shapes, shared_filter, channels_first))) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (shared_filter) {
    // All problems are one.
    for (int64_t* shape : {xs, ys}) shape[1] *= std::exchange(shape[0], 1);
  }
  Windows windows = WindowsOf(window_strides, low, rhs_dilation, shapes);
  TurnDepthToRows(shapes, windows, channels_first);
  Dispatch(pool, {.op = *op,
                  .kernels = *kernels,
                  .shapes = shapes,
                  .channels_first = channels_first,
                  .windows = windows,
                  .x = Tensor(x.untyped_data(), xs, channels_first),
                  .f = Tensor(f.untyped_data(), fs, false),
                  .y = Tensor(y.untyped_data(), ys, channels_first)});
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  // A text that is short enough to take no memory.
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
} catch (const std::exception& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, error.what());
}

}  // namespace
}  // namespace jax_dwbp

// Of the headers. A jaxlib with an older one refuses the handler.
extern "C" __attribute__((visibility("default")))
const int jax_dwbp_ffi_version[] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* jax_dwbp_depthwise_conv2d(
    XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_dwbp_depthwise_conv2d, jax_dwbp::DepthwiseConv2d,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("op")
                                  .Attr<xla::ffi::Span<const int64_t>>("window_strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("low")
                                  .Attr<xla::ffi::Span<const int64_t>>("rhs_dilation")
                                  .Attr<bool>("channels_first"));
